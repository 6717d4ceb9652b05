"""A saved folder explains itself: the model card, and the vectors of sentence-transformers."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import sentences
from huggingface_hub import ModelCard

import predict
from files import model_card, run_folder

TEXTS = sentences(9, 11)


def embed(folder, out, *flags):
    counts = predict.main(["--model", str(folder), "--embeddings", str(out), *map(str, flags)])
    return np.load(out), counts


def test_the_card_states_what_the_run_measured_and_nothing_else(pretrained, finetuned):
    folder, metrics = finetuned
    card = ModelCard.load(folder / "README.md")
    header = card.data.to_dict()
    assert header["pipeline_tag"] == "text-classification"
    assert header["metrics"] == ["accuracy", "macro_f1", "matthews_correlation"]
    assert "language" not in header and "datasets" not in header and "base_model" not in header
    [result] = header["model-index"][0]["results"]
    scores = {metric["type"]: metric["value"] for metric in result["metrics"]}
    seconds = metrics["test"]["pretrained"].pop("seconds")
    assert scores == metrics["test"]["pretrained"]
    metrics["test"]["pretrained"]["seconds"] = seconds
    accuracy = metrics["test"]["ngrams"]["accuracy"]
    assert re.search(rf"\| ngrams \| accuracy {accuracy:.3f}", card.text)

    header = ModelCard.load(pretrained / "README.md").data.to_dict()
    assert header["pipeline_tag"] == "fill-mask" and header["metrics"] == ["validation_loss"]


def test_without_metrics_there_are_no_figures(pretrained, tmp_path):
    for name in ("config.json", "flags.json"):
        shutil.copy(pretrained / name, tmp_path)
    flags = json.loads((tmp_path / "flags.json").read_text())
    corpus = {"corpus": ["hf:owner/name:config:train"], "model": "owner/no-such-folder"}
    (tmp_path / "flags.json").write_text(json.dumps(flags | corpus))
    model_card.describe_folder(tmp_path, tmp_path, ["mr"])
    header = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert not {"metrics", "model-index"} & header.keys()
    assert header["language"] == "en"
    assert header["datasets"] == ["cornell-movie-review-data/rotten_tomatoes", "owner/name"]
    assert header["base_model"] == "owner/no-such-folder"


def test_a_new_run_removes_its_card_and_no_other_readme(pretrained, tmp_path, capsys):
    readme = tmp_path / "README.md"
    for name in ("README.md", "config.json"):
        shutil.copy(pretrained / name, tmp_path)
    run_folder.start_run(tmp_path, {"flags": {}, "environment": {}})
    assert not readme.exists()

    readme.write_text("# my project")
    run_folder.start_run(tmp_path, {"flags": {}, "environment": {}})
    shutil.copy(pretrained / "config.json", tmp_path)
    model_card.describe_folder(tmp_path, tmp_path, [])
    assert readme.read_text() == "# my project"
    assert str(readme) in capsys.readouterr().out


def test_embeddings_are_the_means_of_the_states_in_order(pretrained, finetuned, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    for folder in (pretrained, finetuned[0]):
        vectors, _ = embed(
            folder, tmp_path / "e.npy", "--batch-size", 2, "--dtype", "float32", *TEXTS
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        theirs = AutoModel.from_pretrained(folder)
        for text, vector in zip(TEXTS, vectors, strict=True):
            with torch.no_grad():
                states = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            assert np.allclose(vector, states.mean(0), atol=1e-5)
    assert vectors.dtype == np.float32


def test_embeddings_of_broken_files(pretrained, tmp_path, capsys):
    file, out = tmp_path / "texts.txt", tmp_path / "e.npy"
    file.write_bytes(b"bal dom\n\n\xff\nkist\n")
    vectors, counts = embed(pretrained, out, "--file", file)
    assert len(vectors) == 2 and counts == {"answered": 2, "broken": 1, "cut": 0}
    assert "texts.txt:3" in capsys.readouterr().err

    file.write_bytes(b"\n")
    before = out.read_bytes()
    predict.main(["--model", str(pretrained), "--embeddings", str(out), "--file", str(file)])
    assert out.read_bytes() == before  # no text, no new file
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(predict.UserError, match="a folder"):
        embed(pretrained, tmp_path, "bal")
    for flag in ("--json", "--top=2"):
        with pytest.raises(SystemExit):
            embed(pretrained, out, "bal", flag)


def test_sentence_transformers_loads_the_folder(pretrained, tmp_path):
    modules = json.loads((pretrained / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    package = pytest.importorskip("sentence_transformers", reason="not a dependency")
    theirs = package.SentenceTransformer(str(pretrained), device="cpu")
    vectors, _ = embed(pretrained, tmp_path / "e.npy", "--dtype", "float32", *TEXTS)
    assert theirs.max_seq_length == 32
    assert np.allclose(theirs.encode(TEXTS), vectors, atol=1e-5)
