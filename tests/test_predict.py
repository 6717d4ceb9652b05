"""Predictions: what `transformers` says of the same folder, in their order; what is broken is named."""

import gzip
import json
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
from model import Classifier

TEXTS = sentences(11, 7)


def answers(capsys, *flags) -> list[dict]:
    capsys.readouterr()
    predict.main([*map(str, flags), "--json", "--dtype", "float32"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_masks_are_filled_as_transformers_fills_them(pretrained, capsys):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    texts = ["bal [MASK] kist.", "dom kir", "[MASK] [MASK] mem nost."]
    records = answers(capsys, "--model", pretrained, "--top", 3, *texts)
    assert [record["text"] for record in records] == [texts[0], texts[2]]
    assert [len(record["masks"]) for record in records] == [1, 2]
    tokenizer, theirs = (x.from_pretrained(pretrained) for x in (AutoTokenizer, AutoModelForMaskedLM))
    for record in records:
        ids = tokenizer(record["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            rows = theirs(ids).logits[0][ids[0] == tokenizer.mask_token_id].softmax(-1)
        for group, probabilities in zip(record["masks"], rows, strict=True):
            assert [a["token"] for a in group] == tokenizer.convert_ids_to_tokens(
                probabilities.topk(3).indices
            )
            found = torch.tensor([a["probability"] for a in group])
            assert torch.allclose(found, probabilities.topk(3).values, atol=1e-5)


def test_classes_are_those_of_transformers_in_the_order_of_the_texts(finetuned, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out, metrics = finetuned
    records = answers(capsys, "--model", out, "--batch-size", 4, *TEXTS)
    assert [record["text"] for record in records] == TEXTS
    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    for record in records:
        with torch.no_grad():
            wanted = theirs(**tokenizer(record["text"], return_tensors="pt")).logits[0].softmax(-1)
        found = {answer["label"]: answer["probability"] for answer in record["answers"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert torch.allclose(torch.tensor([found[name] for name in metrics["names"]]), wanted, atol=1e-5)


def test_a_line_is_the_best_class_and_the_text(finetuned, capsys):
    [record] = answers(capsys, "--model", finetuned[0], "bal\n dom")
    predict.main(["--model", str(finetuned[0]), "--dtype", "float32", "bal\n dom"])
    best = record["answers"][0]
    assert capsys.readouterr().out == f"{best['label']} {best['probability']:.3f}\tbal dom\n"


BROKEN = {  # file: its content, and the lines of it that are broken; every other one holds a text
    "a.txt": (b"bal dom\n\nkir\xff\nlem bal\nnost\0\nkir", [3, 5]),
    "a.jsonl": (
        b'{"text": "bal"}\n{"text": 7}\n{"text"\n\n{"text": " "}\n[]\n{"text": "dom"}\n',
        [2, 3, 5, 6],
    ),
    "a.csv": (b'n,review\n1,bal\n1,bal,2\n"1"x,dom\n\xfe,kir\n1,"lem\nbal"\n1,\n1,nost\n', [3, 4, 5, 8]),
    "a.tsv": (b"review\tn\nbal\t1\nbal\n\t3\nkir\t4", [3, 4]),
}


@pytest.mark.parametrize("zipped", (False, True))
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_and_the_rest_is_served(finetuned, tmp_path, capsys, name, zipped):
    content, broken = BROKEN[name]
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    counts = predict.main(["--model", str(finetuned[0]), "--file", str(path), "--json", "--batch-size", "2"])
    said = capsys.readouterr()
    complaints = [line for line in said.err.splitlines() if line.startswith("predict.py: ")]
    named = {line.split(": ")[1] for line in complaints}
    assert len(complaints) == len(broken) and named == {f"{path}:{line}" for line in broken}
    assert counts["broken"] == len(broken) and counts["answered"] == len(said.out.splitlines()) > 1
    places = [int(json.loads(line)["place"].rpartition(":")[2]) for line in said.out.splitlines()]
    assert places == sorted(places) and not set(places) & set(broken)


def test_of_a_file_that_breaks_off_the_whole_lines_are_served(finetuned, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS)) for _ in range(300)]
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-2000])
    counts = predict.main(["--model", str(finetuned[0]), "--file", str(path)])
    assert counts["answered"] > 100 and counts["broken"] == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == counts["answered"] and f"{path}: cannot be read" in said.err


def test_both_texts_of_a_pair_count(finetuned, tmp_path, capsys):
    rows = [{"question": a, "answer": b} for a, b in (("bal", "dom"), ("bal", "kir"), ("bal", None))]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = answers(capsys, "--model", finetuned[0], "--file", path)  # without the third
    assert first["pair"] == "dom" and first["answers"] != second["answers"]
    flags = ("--text-column", "answer", "--pair-column", "question")
    turned, _ = answers(capsys, "--model", finetuned[0], "--file", path, *flags)
    assert (turned["text"], turned["pair"]) == ("dom", "bal") and turned["answers"] != first["answers"]


def test_a_number_is_predicted(pretrained, tmp_path, capsys):
    config, _, tokenizer, _ = model_folder.load_model(pretrained)
    torch.manual_seed(0)
    model = Classifier(config, 1).eval()
    model_folder.save_model(tmp_path, model, tokenizer, {"problem_type": "regression"})
    records = answers(capsys, "--model", tmp_path, *TEXTS)
    for record in records:
        ids = torch.tensor(tokenizer.encode(record["text"]).ids)
        with torch.no_grad():
            wanted = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        assert record["value"] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize(
    "changes, said",
    (
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"classifier_pooling": "cls"}, "'cls'"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
    ),
)
def test_refuses_a_model_that_it_would_misread(finetuned, tmp_path, changes, said):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((finetuned[0] / name).read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(predict.UserError, match=said):
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


def test_batches_that_end_early_wait_for_their_turn_and_a_failure_ends_the_reading(
    finetuned, tmp_path, capsys, monkeypatch
):
    path, encode, n_threads = tmp_path / "texts.txt", predict.encode, torch.get_num_threads()
    path.write_text("\n".join(["bal", *["kir"] * 6, "dom", *["nost"] * 9]))
    asked = []

    def slow_first(examples, *given):
        asked.append(examples.texts[0])
        if examples.texts == ["bal"]:
            time.sleep(0.5)
        if examples.texts == ["dom"]:
            raise RuntimeError("broken")
        return encode(examples, *given)

    monkeypatch.setattr(predict, "encode", slow_first)
    with pytest.raises(RuntimeError, match="broken"):
        predict.main(["--model", str(finetuned[0]), "--file", str(path), "--batch-size", "1"])
    printed = [line.rpartition("\t")[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["bal", *["kir"] * 6] and len(asked) < 10 and torch.get_num_threads() == n_threads


def test_ctrl_c_is_no_traceback(finetuned):
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
