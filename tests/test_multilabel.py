"""Several labels per text: what is read, the metrics, the threshold, and what transformers says."""

import json

import numpy as np
import pytest
import torch
from conftest import FAST, sentences
from sklearn import metrics as sklearn_metrics

import explain
import finetune
import labels
import predict
from analysis import multilabel
from files.disk import UserError

NAMES = ["bees", "birds", "cats"]


def make_examples(n: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """A text has the sentences of its topics; every eighth text has no label."""
    rng = np.random.default_rng(seed)
    parts = [sentences(n, seed + i, i) for i in range(4)]  # the last one is of no label
    sets = [[name for name in NAMES if rng.random() < 0.4] for _ in range(n)]
    texts = [
        " ".join([parts[NAMES.index(name)][i] for name in of_text] or [parts[3][i]])
        for i, of_text in enumerate(sets)
    ]
    return texts, sets


def write(path, texts, sets):
    if path.suffix == ".jsonl":
        rows = [{"text": t, "labels": s} for t, s in zip(texts, sets, strict=True)]
        lines = [json.dumps(row) for row in rows]
    elif path.stem.startswith("columns"):
        flags = [",".join(str(int(name in s)) for name in NAMES) for s in sets]
        rows = [f'"{t}",{f}' for t, f in zip(texts, flags, strict=True)]
        lines = ["text,bees,birds,cats", *rows]
    else:
        rows = [f'"{t}",{" | ".join(s)}' for t, s in zip(texts, sets, strict=True)]
        lines = ["text,label", *rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multilabel")
    train = write(folder / "train.jsonl", *make_examples(120, 50))
    test = write(folder / "test.jsonl", *make_examples(60, 70))
    flags = ["--model", str(pretrained), "--train", str(train), "--test", str(test), *FAST]
    out = folder / "tuned"
    return out, finetune.main([*flags, "--out", str(out)]), test


def test_three_forms_of_one_file_are_equal(tmp_path):
    texts, sets = make_examples(30, 1)
    read = [
        labels.load(None, write(tmp_path / "a.jsonl", texts, sets)),
        labels.load(None, write(tmp_path / "a.csv", texts, sets), task="multilabel"),
        labels.load(
            None,
            write(tmp_path / "columns.csv", texts, sets),
            None,
            (None, None, "bees,birds,cats"),
        ),
    ]
    both = labels.from_lists(texts, sets)
    assert both.names == NAMES and both.targets.sum() == sum(map(len, sets))
    for train, test in read:
        assert train.names == NAMES and train.texts + test.texts == texts
        assert np.array_equal(np.concatenate((train.targets, test.targets)), both.targets)


def test_a_bar_or_lists_of_one_label_do_not_change_what_labels_mean(tmp_path):
    bars, lists = tmp_path / "bars.csv", tmp_path / "lists.jsonl"
    bars.write_text("text,label\n" + "bal,a|b\ndom,b|c\n" * 5)
    assert labels.load(None, bars)[0].names == ["a|b", "b|c"]
    lists.write_text('{"text": "bal", "label": ["a|b"]}\n{"text": "dom", "label": ["c"]}\n' * 5)
    assert labels.load(None, lists)[0].names == ["a|b", "c"]
    several = lists.with_name("several.jsonl")
    several.write_text(lists.read_text() + '{"text": "kist", "label": ["c", "a|b", 1.0]}\n')
    assert labels.load(None, several)[0].names == ["1", "a|b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", "text,a,b\nbal,1,2\n", "a,b", "a.csv:2: column 'b' has '2', neither 0 nor 1"),
        ("a.csv", "text,a,b\nbal,1,0\n", "a,c", "there is no column 'c'"),
        (
            "a.jsonl",
            '{"text": "bal", "label": ["a", "b"]}\n{"text": "c", "label": "d"}\n',
            None,
            "a.jsonl:1: no label",
        ),
        ("a.jsonl", '{"text": "bal", "label": ["a", {}]}\n', None, "a.jsonl:1: no label"),
        ("a.jsonl", '{"text": "bal", "label": ["a", "a"]}\n', None, "fewer than two classes: 'a'"),
    ],
)
def test_broken_labels_are_named(tmp_path, name, content, column, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        labels.load(None, path, None, (None, None, column))


def test_a_test_label_that_training_lacks_is_named(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"text": "bal", "label": ["a", "b"]}\n' * 3)
    test.write_text('{"text": "dom", "label": ["c"]}\n')
    with pytest.raises(UserError, match=r"test.jsonl:1: label \('c',\) is none"):
        labels.load(None, train, test)


def test_the_threshold_is_that_of_the_best_micro_f1():
    targets = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    probabilities = np.array([[0.3, 0.1], [0.6, 0.25], [0.2, 0.24]])
    threshold = multilabel.choose_threshold(targets, probabilities)
    assert threshold == 0.25
    assert multilabel.choose_threshold(targets[:0], probabilities[:0]) == 0.5
    scores = multilabel.measure(targets, probabilities, threshold)
    assert scores["micro_f1"] == scores["macro_f1"] == scores["mean_average_precision"] == 1


def test_metrics_threshold_and_predictions(tuned, capsys):
    out, metrics, test = tuned
    texts, sets = make_examples(60, 70)
    assert metrics["n_train"] == 108 and metrics["n_test"] == 60
    assert set(metrics["test"]) == {"ngrams", "random_weights", "pretrained"}
    majority = metrics["majority"]["mean_average_precision"]
    for scores in metrics["test"].values():
        assert scores["mean_average_precision"] > majority + 0.1
    with np.load(out / "predictions.npz") as arrays:
        targets, probabilities = arrays["targets"], arrays["pretrained"]
    assert targets.tolist() == [[float(name in s) for name in NAMES] for s in sets]
    scores = metrics["test"]["pretrained"]
    decisions = probabilities >= scores["threshold"]
    for average in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(targets, decisions, average=average)
        assert scores[f"{average}_f1"] == pytest.approx(expected)

    flags = ["--model", str(out), "--file", str(test), "--dtype", "float32"]
    capsys.readouterr()
    predict.main([*flags, "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for record, row, is_above in zip(records, probabilities, decisions, strict=True):
        answer = {choice["label"]: choice["probability"] for choice in record["answers"]}
        expected = {name: row[i] for i, name in enumerate(NAMES) if is_above[i]}
        assert answer == pytest.approx(expected, abs=1e-5)
    predict.main([*flags, "--top", "2"])
    assert all(line.count("\t") == 2 for line in capsys.readouterr().out.splitlines())
    explain.main(["--model", str(out), texts[0], "--class", "birds"])
    assert capsys.readouterr().out.startswith(f"birds {probabilities[0, 1]:.3f}\t")


def test_transformers_gives_the_same_probabilities(tuned):
    from transformers import pipeline

    out, *_ = tuned
    texts, _ = make_examples(60, 70)
    classify = pipeline("text-classification", model=str(out), top_k=None)
    assert classify.model.config.problem_type == "multi_label_classification"
    with np.load(out / "predictions.npz") as arrays:
        rows = arrays["pretrained"]
    # a longer text is cut in its middle here, and at its end there
    short = [i for i, text in enumerate(texts) if len(classify.tokenizer(text).input_ids) <= 32][:8]
    for i in short:
        [choices] = classify([texts[i]])
        theirs = {choice["label"]: choice["score"] for choice in choices}
        assert theirs == pytest.approx(dict(zip(NAMES, rows[i], strict=True)), abs=1e-5)


def test_class_weights():
    one = labels.LabeledDataset(["a"] * 4, None, np.array([0, 0, 0, 1]), ["x", "y"])
    weights = finetune.balanced_weights(one)
    assert weights.tolist() == pytest.approx([2 / 3, 2])
    loss = finetune.loss_sum(torch.zeros(4, 2), torch.from_numpy(one.targets), weights)
    assert float(loss) == pytest.approx(4 * np.log(2))
