"""Predictions equal those of `transformers`, come in order, and broken lines are reported."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import WORDS, sentences

import predict
from files import model_folder
from model import Classifier, Tagger

TEXTS = sentences(11, 7)


def predictions(capsys, *flags) -> list[dict]:
    capsys.readouterr()
    predict.main([*map(str, flags), "--json", "--dtype", "float32"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_masks_are_filled_as_transformers_fills_them(pretrained, capsys):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    texts = ["bal [MASK] kist.", "dom kir", "[MASK] [MASK] mem nost."]
    records = predictions(capsys, "--model", pretrained, "--top", 3, *texts)
    assert [record["text"] for record in records] == [texts[0], texts[2]]
    assert [len(record["masks"]) for record in records] == [1, 2]
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    theirs = AutoModelForMaskedLM.from_pretrained(pretrained)
    for record in records:
        ids = tokenizer(record["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            rows = theirs(ids).logits[0][ids[0] == tokenizer.mask_token_id].softmax(-1)
        for words, probabilities in zip(record["masks"], rows, strict=True):
            expected = probabilities.topk(3)
            tokens = tokenizer.convert_ids_to_tokens(expected.indices)
            assert [word["token"] for word in words] == tokens
            ours = torch.tensor([word["probability"] for word in words])
            assert torch.allclose(ours, expected.values, atol=1e-5)


def test_classes_are_those_of_transformers_in_the_order_of_the_texts(finetuned, tmp_path, capsys):
    """They are those of the network alone: `transformers` does not read the n-grams."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, metrics = finetuned
    out = tmp_path / "network"
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("checkpoints", "ngrams.*"))
    records = predictions(capsys, "--model", out, "--batch-size", 4, *TEXTS)
    assert [record["text"] for record in records] == TEXTS
    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    for record in records:
        with torch.no_grad():
            logits = theirs(**tokenizer(record["text"], return_tensors="pt")).logits[0]
        ours = {answer["label"]: answer["probability"] for answer in record["answers"]}
        assert list(ours.values()) == sorted(ours.values(), reverse=True)
        in_order = torch.tensor([ours[name] for name in metrics["names"]])
        assert torch.allclose(in_order, logits.softmax(-1), atol=1e-5)


def test_a_line_is_the_best_class_and_the_text(finetuned, capsys):
    [record] = predictions(capsys, "--model", finetuned[0], "bal\n dom")
    predict.main(["--model", str(finetuned[0]), "--dtype", "float32", "bal\n dom"])
    best = record["answers"][0]
    assert capsys.readouterr().out == f"{best['label']} {best['probability']:.3f}\tbal dom\n"


BROKEN = {  # file: its content, and the lines of it that are broken; every other one holds a text
    "a.txt": (b"bal dom\n\nkir\xff\nlem bal\nnost\0\nkir", [3, 5]),
    "a.jsonl": (
        b'{"text": "bal"}\n{"text": 7}\n{"text"\n\n{"text": " "}\n[]\n{"text": "dom"}\n',
        [2, 3, 5, 6],
    ),
    "a.csv": (
        b'n,review\n1,bal\n1,bal,2\n"1"x,dom\n\xfe,kir\n1,"lem\nbal"\n1,\n1,nost\n',
        [3, 4, 5, 8],
    ),
    "a.tsv": (b"review\tn\nbal\t1\nbal\n\t3\nkir\t4", [3, 4]),
}


@pytest.mark.parametrize("zipped", (False, True))
@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_reported_and_the_others_answered(
    finetuned, tmp_path, capsys, name, zipped
):
    content, broken = BROKEN[name]
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    counts = predict.main(
        ["--model", str(finetuned[0]), "--file", str(path), "--json", "--batch-size", "2"]
    )
    output = capsys.readouterr()
    reports = [line for line in output.err.splitlines() if line.startswith("predict.py: ")]
    reported = {line.split(": ")[1] for line in reports}
    assert len(reports) == len(broken) and reported == {f"{path}:{line}" for line in broken}
    records = [json.loads(line) for line in output.out.splitlines()]
    assert counts["broken"] == len(broken) and counts["answered"] == len(records) > 1
    numbers = [int(record["place"].rpartition(":")[2]) for record in records]
    assert numbers == sorted(numbers) and not set(numbers) & set(broken)


def test_the_complete_lines_of_a_truncated_file_are_answered(finetuned, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS)) for _ in range(300)]
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-2000])
    counts = predict.main(["--model", str(finetuned[0]), "--file", str(path)])
    assert counts["answered"] > 100 and counts["broken"] == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == counts["answered"]
    assert f"{path}: cannot be read" in output.err


def test_both_texts_of_a_pair_are_read(finetuned, tmp_path, capsys):
    rows = [
        {"question": a, "answer": b} for a, b in (("bal", "dom"), ("bal", "kir"), ("bal", None))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = predictions(
        capsys, "--model", finetuned[0], "--file", path
    )  # without the third
    assert first["pair"] == "dom" and first["answers"] != second["answers"]
    flags = ("--text-column", "answer", "--pair-column", "question")
    turned, _ = predictions(capsys, "--model", finetuned[0], "--file", path, *flags)
    assert (turned["text"], turned["pair"]) == ("dom", "bal") and turned["answers"] != first[
        "answers"
    ]


PROBLEM_TYPES = ("regression", None, "single_label_classification", "multi_label_classification")


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_one_output_is_a_number(pretrained, tmp_path, capsys, problem_type):
    """Also without a problem_type, as cross-encoders are saved: its softmax would always be 1."""
    config, _, tokenizer, _ = model_folder.load_model(pretrained)
    torch.manual_seed(0)
    model = Classifier(config, 1).eval()
    model_folder.save_model(tmp_path, model, tokenizer, {"problem_type": problem_type})
    records = predictions(capsys, "--model", tmp_path, *TEXTS)
    for record in records:
        ids = torch.tensor(tokenizer.encode(record["text"]).ids)
        with torch.no_grad():
            value = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        assert record["value"] == pytest.approx(float(value), abs=1e-5)
    values = [record["value"] for record in records]
    assert len(set(values)) == len(TEXTS)
    # perhaps in bfloat16
    assert predict.predict_texts(tmp_path, TEXTS) == pytest.approx(values, abs=0.01)


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"classifier_pooling": "attention"}, "'attention'"),
        ({"problem_type": "regression"}, "'regression' with 3 outputs"),  # never the first alone
    ),
)
def test_a_model_with_unknown_settings_is_refused(finetuned, tmp_path, changes, message):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((finetuned[0] / name).read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(predict.UserError, match=message):
        predict.main(["--model", str(tmp_path), "bal"])


def test_standard_input_is_answered_as_it_comes(finetuned):
    command = [sys.executable, "predict.py", "--model", str(finetuned[0]), "--batch-size", "1", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        for text in (b"bal dom", b"kir"):
            process.stdin.write(text + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().rstrip().endswith(b"\t" + text)
        process.stdin.write(b"\xff\n")
        process.stdin.close()
        assert b"predict.py: -:3: not UTF-8" in process.stderr.read()
    assert process.returncode == 2


def test_batches_are_written_in_order_and_an_error_ends_the_reading(
    finetuned, tmp_path, capsys, monkeypatch
):
    path, encode, n_threads = tmp_path / "texts.txt", predict.encode, torch.get_num_threads()
    path.write_text("\n".join(["bal", *["kir"] * 6, "dom", *["nost"] * 9]))
    encoded = []

    def slow_first(examples, *rest):
        encoded.append(examples.texts[0])
        if examples.texts == ["bal"]:
            time.sleep(0.5)
        if examples.texts == ["dom"]:
            raise RuntimeError("broken")
        return encode(examples, *rest)

    monkeypatch.setattr(predict, "encode", slow_first)
    with pytest.raises(RuntimeError, match="broken"):
        predict.main(["--model", str(finetuned[0]), "--file", str(path), "--batch-size", "1"])
    printed = [line.rpartition("\t")[2] for line in capsys.readouterr().out.splitlines()]
    assert (
        printed == ["bal", *["kir"] * 6]
        and len(encoded) < 10
        and torch.get_num_threads() == n_threads
    )


def test_ctrl_c_ends_without_a_traceback(finetuned):
    command = [sys.executable, "predict.py", "--model", str(finetuned[0]), "--batch-size", "1", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"bal dom\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"stopped\n"
    assert process.returncode == 130


def test_a_long_text_keeps_head_and_tail_and_is_counted(finetuned, capsys):
    long = " ".join(["bal"] * 20 + ["kir"] * 500 + ["dom"] * 20)
    counts = predict.main(["--model", str(finetuned[0]), long, "bal"])
    assert counts == {"answered": 2, "broken": 0, "cut": 1}
    assert "1 texts cut to 32 tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- bfloat16


def inputs_of(tokenizer, text):
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)


def bfloat16_prediction(capsys, model, text):
    capsys.readouterr()
    flags = ["--device", "cpu", "--dtype", "bfloat16", "--json", "--top", "1000"]
    predict.main(["--model", str(model), *flags, text])
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def test_in_bfloat16_the_words_of_a_mask_have_float32_probabilities(pretrained, capsys):
    text = "bal [MASK] kist."
    words = bfloat16_prediction(capsys, pretrained, text)["masks"][0]
    model, tokenizer, _ = model_folder.open_model(pretrained, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        states = model.head(model.model(*inputs_of(tokenizer, text)))[2]
    logits = states.float() @ model.decoder.weight.T + model.decoder.bias
    ours = {word["token"]: word["probability"] for word in words}
    in_order = torch.tensor([ours[tokenizer.id_to_token(i)] for i in range(len(logits))])
    torch.testing.assert_close(in_order, logits.softmax(-1), rtol=1e-4, atol=1e-7)
    assert len(set(ours.values())) == len(ours) > 50  # bfloat16 logits have many ties


@torch.no_grad()
@pytest.mark.parametrize("n_labels", (1, 40))
def test_in_bfloat16_classes_and_numbers_are_float32(pretrained, tmp_path, capsys, n_labels):
    config, _, tokenizer, _ = model_folder.load_model(pretrained)
    torch.manual_seed(0)
    model = Classifier(config, n_labels).eval()
    extra = {"problem_type": "regression"} if n_labels == 1 else {}
    model_folder.save_model(tmp_path, model, tokenizer, extra)
    record = bfloat16_prediction(capsys, tmp_path, TEXTS[0])
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(*inputs_of(tokenizer, TEXTS[0]))
    logits = features.float() @ model.classifier.weight.T + model.classifier.bias
    if n_labels == 1:
        assert record["value"] == pytest.approx(logits.item(), rel=1e-4)
        return
    ours = {answer["label"]: answer["probability"] for answer in record["answers"]}
    in_order = torch.tensor([[ours[f"LABEL_{i}"] for i in range(n_labels)]])
    torch.testing.assert_close(in_order, logits.softmax(-1), rtol=1e-4, atol=1e-7)
    assert len(set(ours.values())) == n_labels


def test_in_bfloat16_the_logits_of_tags_are_float32(pretrained):
    config, _, tokenizer, _ = model_folder.load_model(pretrained)
    model = Tagger(config, 3).eval()
    answer = predict.make_answer(model, tokenizer, ["O", "B-X", "I-X"], 1, torch.bfloat16)
    dtypes = []
    for layer in (model.model.layers[0].mlp.Wi, model.classifier):
        layer.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    answer([predict.Item("text 1", TEXTS[0])])
    assert dtypes == [torch.bfloat16, torch.float32]


# ------------------------------------------------------------------------ Python, and the shell


def test_texts_are_classified_from_python(finetuned, pretrained, capsys):
    texts = TEXTS * 8  # more than one batch
    records = predictions(capsys, "--model", finetuned[0], *texts)
    results = predict.predict_texts(str(finetuned[0]), texts)
    assert len(results) == len(texts) and predict.predict_texts(finetuned[0], []) == []
    for (label, probability), record in zip(results, records, strict=True):
        by_label = {answer["label"]: answer["probability"] for answer in record["answers"]}
        assert by_label[label] == pytest.approx(probability, abs=0.01)  # perhaps in bfloat16
    with pytest.raises(predict.UserError, match="not a classifier"):
        predict.predict_texts(pretrained, ["bal"])


def test_a_pipe_that_closes_early_ends_it_quietly(finetuned, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("bal dom kist\n" * 20_000)
    command = [sys.executable, "predict.py", "--model", str(finetuned[0]), "--file", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline().endswith(b"bal dom kist\n")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
