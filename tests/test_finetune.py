"""Fine-tuning: the three methods, the training loop, the folder that is left."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAST, sentences, write_csv

import finetune
import labels
import predict
from analysis.evaluation import forward_all
from files import model_folder
from files.disk import UserError
from model import Classifier

METHODS = ("ngrams", "random_weights", "pretrained", "pretrained+ngrams")


def files_of(topics, model, out, *more):
    """The flags of a short run on the three topics."""
    train, test = map(str, topics)
    return [
        "--model",
        str(model),
        "--train",
        train,
        "--test",
        test,
        "--out",
        str(out),
        *FAST,
        *more,
    ]


def load_classifier(folder, **extra):
    config, weights, tokenizer, _ = model_folder.load_model(folder)
    model = Classifier(config, 3)
    model_folder.load_weights(model, weights, folder, **extra)
    return model, tokenizer


def test_three_methods_are_measured_on_the_test_set(finetuned):
    out, metrics = finetuned
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert tuple(metrics["test"]) == METHODS
    for result in metrics["test"].values():
        assert set(result) == {"accuracy", "macro_f1", "matthews_correlation", "seconds"}
    assert metrics["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert metrics["test"]["ngrams"]["accuracy"] > 0.5
    assert metrics["names"] == ["2", "Birds & bees", "кошки"]
    assert (metrics["n_train"], metrics["n_test"], metrics["n_cut"]) == (120, 60, 0)
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_one_line_per_method_is_printed(topics, pretrained, tmp_path, capsys):
    finetune.main(files_of(topics, pretrained, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert "cut to" not in "".join(lines)
    assert [line.split()[0] for line in lines[-5:]] == [*METHODS, "majority"]
    finetune.main(files_of(topics, pretrained, tmp_path, "--max-len", "8", "--methods", "ngrams"))
    assert " examples were cut to 8 tokens" in capsys.readouterr().out


def test_transformers_reads_the_classifier_with_equal_logits(finetuned, topics):
    from transformers import AutoModelForSequenceClassification

    out, metrics = finetuned
    theirs, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(metrics["names"]))
    ours, tokenizer = load_classifier(out)
    ours.eval()
    _, test = labels.load(None, *topics)
    rows, _ = labels.encode(test, tokenizer, 32)
    with torch.no_grad():
        for _, inputs in labels.batches(rows, np.arange(8), 8):
            logits = ours(*inputs)[:8]
        for row, logit in zip(rows, logits, strict=False):
            ids = torch.from_numpy(row[:, 0])[None]
            assert torch.allclose(theirs(ids).logits[0], logit, atol=1e-5)


def test_the_saved_model_is_the_one_that_was_measured(finetuned, topics):
    out, metrics = finetuned
    model, tokenizer = load_classifier(out)
    _, test = labels.load(None, *topics)
    rows, _ = labels.encode(test, tokenizer, 32)
    autocast = torch.autocast("cpu", enabled=False)
    logits = forward_all(model, rows, np.arange(len(rows)), autocast, model)
    accuracy = np.mean(logits.argmax(1) == test.targets)
    assert accuracy == metrics["test"]["pretrained"]["accuracy"]
    # on a GPU, empty sequences may make as many rows as there are tokens
    padded = forward_all(
        model, rows, np.arange(9), autocast, lambda ids, *_: torch.zeros(len(ids), 3)
    )
    assert padded.shape == (9, 3)


def test_the_predictions_of_each_method_are_saved(finetuned):
    out, metrics = finetuned
    with np.load(out / "predictions.npz") as arrays:
        assert set(arrays) == {"targets", *metrics["test"]}
        for method, result in metrics["test"].items():
            assert arrays[method].shape == (60, 3)
            assert np.allclose(arrays[method].sum(1), 1)
            accuracy = np.mean(arrays[method].argmax(1) == arrays["targets"])
            assert accuracy == result["accuracy"]


def test_the_test_labels_change_neither_model_nor_predictions(
    finetuned, topics, pretrained, tmp_path
):
    rows = [line.rsplit(",", 1) for line in topics[1].read_text().splitlines()[1:]]
    swap = {"2": "кошки", "кошки": "Birds & bees", "Birds & bees": "2"}
    swapped = [(text.strip('"'), swap[label]) for text, label in rows]
    test = write_csv(tmp_path / "swapped.csv", swapped)
    out = tmp_path / "out"
    finetune.main(files_of((topics[0], test), pretrained, out))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, finetuned[0])]
    assert weights[0] == weights[1]
    with np.load(out / "predictions.npz") as a, np.load(finetuned[0] / "predictions.npz") as b:
        assert (a["targets"] != b["targets"]).any()
        for method in METHODS:
            assert (a[method] == b[method]).all()


def test_a_label_budget_is_sampled(topics, pretrained, tmp_path):
    flags = files_of(topics, pretrained, tmp_path, "--labels", "30", "--methods", "ngrams")
    metrics = finetune.main(flags)
    assert metrics["n_train"] == 30 and set(metrics["test"]) == {"ngrams"}


def test_examples_from_python_give_the_result_of_files(
    finetuned, topics, pretrained, tmp_path, monkeypatch
):
    """What analyze.py calls with folds: no checkpoint is written."""
    monkeypatch.setattr(finetune.run_folder, "save_checkpoint", None)
    data = labels.load(None, *topics)
    flags = ["--model", str(pretrained), "--out", str(tmp_path), *FAST]
    metrics = finetune.main([*flags, "--methods", "pretrained"], data=data)
    for name in ("accuracy", "macro_f1"):
        assert metrics["test"]["pretrained"][name] == finetuned[1]["test"]["pretrained"][name]
    a, b = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path, finetuned[0]))
    assert a == b


def test_a_fold_may_lack_a_class(topics, pretrained, tmp_path):
    train, test = labels.load(None, *topics)
    fold = train[np.flatnonzero(train.targets != 1)]
    flags = ["--model", str(pretrained), "--out", str(tmp_path), *FAST, "--lr", "0"]
    finetune.main(flags, data=(fold, test))
    with np.load(tmp_path / "predictions.npz") as arrays:
        for method in METHODS:
            assert arrays[method][:, 1].max() < 0.01


@pytest.mark.parametrize("n_labels", [1, 2, 4])
def test_a_budget_below_two_per_class(pretrained, topics, tmp_path, n_labels):
    """Of three classes; with one label there is one class to learn."""
    flags = ["--model", pretrained, "--train", topics[0], "--labels", n_labels, "--out", tmp_path]
    results = finetune.main(list(map(str, [*flags, *FAST])))["test"]
    assert len(results) == 4
    if n_labels == 1:  # as often as the class occurs
        accuracies = [results[method]["accuracy"] for method in ("ngrams", "pretrained")]
        assert accuracies == [pytest.approx(1 / 3)] * 2


@pytest.mark.parametrize("values", [["2.5"], ["1e30", "2e30", "5e30"], ["1e-30", "2e-30", "4e-30"]])
def test_numbers_without_variance_or_of_any_size(pretrained, tmp_path, capfd, values):
    rows = list(zip(sentences(30, 5), values * 30, strict=False))
    path = write_csv(tmp_path / "a.csv", rows)
    flags = ["--model", str(pretrained), "--train", str(path), "--task", "regress"]
    results = finetune.main([*flags, "--out", str(tmp_path), *FAST])["test"]
    unit = float(values[0])
    for scores in results.values():
        assert scores["rmse"] < 20 * unit and math.isfinite(scores["pearson"] + scores["spearmanr"])
    assert "Warning" not in capfd.readouterr().err


def test_lr_0_fits_the_linear_head_alone(topics, pretrained, tmp_path):
    metrics = finetune.main(files_of(topics, pretrained, tmp_path, "--lr", "0"))
    assert metrics["test"]["pretrained"]["accuracy"] > metrics["majority"]["accuracy"]
    before = model_folder.load_model(pretrained)[1]
    after = model_folder.load_model(tmp_path)[1]
    shared = before.keys() & after.keys() - {"decoder.bias"}
    assert "head.dense.weight" in shared and len(shared) > 10
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_clip_0_disables_clipping(topics, pretrained, tmp_path):
    weights = []
    for clip in ("0", "1e9", "1e-6"):
        out = tmp_path / clip
        more = ("--methods", "pretrained", "--clip", clip, "--epochs", "1")
        finetune.main(files_of(topics, pretrained, out, *more))
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_numbers_are_regressed_in_their_own_unit(pretrained, tmp_path):
    """The number to predict depends on the topic."""
    from transformers import AutoModelForSequenceClassification

    texts = [s for topic in (0, 1) for s in sentences(60, topic, topic)]
    order = np.random.default_rng(0).permutation(len(texts))
    rows = [(texts[i], f"{10 + 5 * (i >= 60) + 0.01 * i:.3f}") for i in order]
    path = write_csv(tmp_path / "numbers.csv", rows)
    out = tmp_path / "out"
    flags = ["--model", str(pretrained), "--train", str(path), "--out", str(out), *FAST]
    metrics = finetune.main([*flags, "--lr", "3e-3", "--epochs", "6"])
    assert tuple(metrics["test"]) == METHODS[:3]
    for result in metrics["test"].values():
        assert set(result) == {"rmse", "pearson", "spearmanr", "seconds"}
    assert metrics["test"]["ngrams"]["rmse"] < metrics["majority"]["rmse"]
    assert metrics["test"]["pretrained"]["rmse"] < 1.1 * metrics["majority"]["rmse"]
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.problem_type == "regression"
    with np.load(out / "predictions.npz") as arrays:
        assert 10 < arrays["pretrained"].mean() < 17


def test_pairs_are_read_and_both_sides_count(pretrained, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["sentence1,sentence2,label"]
    for _ in range(60):
        a, b = rng.integers(0, 2, size=2)
        first = sentences(1, int(rng.integers(1 << 30)), int(a))
        second = sentences(1, int(rng.integers(1 << 30)), 3)
        lines.append(f"{first[0]},{second[0]},{'same' if b else 'other'}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines))
    flags = [
        "--model",
        str(pretrained),
        "--train",
        str(path),
        "--out",
        str(tmp_path / "out"),
        *FAST,
    ]
    metrics = finetune.main([*flags, "--methods", "pretrained,ngrams"])
    assert metrics["names"] == ["other", "same"] and 45 < metrics["n_train"] < 52


def test_micro_batches_sum_to_the_step(topics, pretrained, tmp_path):
    weights = []
    for n_micro in ("1", "4"):
        out = tmp_path / n_micro
        more = (
            "--methods",
            "pretrained",
            "--dropout",
            "0",
            "--accumulate",
            n_micro,
            "--epochs",
            "1",
        )
        finetune.main(files_of(topics, pretrained, out, *more))
        weights.append(model_folder.load_model(out)[1])
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=2e-4), name


def test_rare_words_move_a_pretrained_embedding_less(pretrained, topics, tmp_path, monkeypatch):
    """Adam moves rare and frequent words alike; a pretrained embedding has a larger eps."""
    train, test = labels.load(None, *topics)
    config, weights, tokenizer, _ = model_folder.load_model(pretrained)
    rows, _ = labels.encode(train, tokenizer, 32)
    counts = np.bincount(np.concatenate([row[:, 0] for row in rows]), minlength=config.vocab_size)
    words = [i for i in np.flatnonzero(counts == 0) if tokenizer.id_to_token(int(i)).isalpha()]
    rare = [int(i) for i in words if tokenizer.encode(tokenizer.id_to_token(int(i))).ids[1] == i][
        -8:
    ]
    texts = [
        f"{tokenizer.id_to_token(rare[i])} {t}" if i < 8 else t for i, t in enumerate(train.texts)
    ]
    frequent = np.argsort(counts)[-8:]
    name = "model.embeddings.tok_embeddings.weight"
    shares = []
    for eps in (finetune.ADAM_EPS, finetune.EMBEDDING_EPS):
        monkeypatch.setattr(finetune, "EMBEDDING_EPS", eps)
        flags = ["--model", str(pretrained), "--out", str(tmp_path), *FAST, "--weight-decay", "0"]
        data = (replace(train, texts=texts), test)
        finetune.main([*flags, "--methods", "pretrained", "--lr", "3e-4"], data=data)
        change = model_folder.load_model(tmp_path)[1][name] - weights[name]
        moved = change.norm(dim=1).numpy()
        shares.append(moved[rare].mean() / moved[frequent].mean())
    assert shares[1] < 0.7 * shares[0]


@pytest.mark.parametrize(
    ("n_labels", "is_pretrained", "family", "lr", "eps"),
    [
        (3, True, "modern", finetune.LR_PRETRAINED, finetune.EMBEDDING_EPS),
        (3, False, "modern", finetune.LR_RANDOM_WEIGHTS, finetune.ADAM_EPS),
        (3, True, "bert", finetune.LR_PRETRAINED_BERT, finetune.ADAM_EPS),
        (3, False, "bert", finetune.LR_RANDOM_WEIGHTS, finetune.ADAM_EPS),
    ],
)
def test_rates_and_eps_depend_on_the_weights_that_training_starts_from(
    n_labels, is_pretrained, family, lr, eps
):
    config = finetune.Config(50, 32, 1, 2, 48, 32, family=family)
    model = Classifier(config, n_labels)
    optimizer = finetune.new_optimizer(finetune.parse_args([]), model, is_pretrained)
    embeddings, matrices, no_decay = optimizer.param_groups
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    assert (embeddings["eps"], matrices["eps"], no_decay["eps"]) == (eps, 1e-8, 1e-8)
    assert matrices["weight_decay"] == 0.01 and no_decay["weight_decay"] == 0
    with_flag = finetune.new_optimizer(finetune.parse_args(["--lr", "0.5"]), model, is_pretrained)
    assert with_flag.param_groups[0]["lr"] == 0.5


def test_a_figure_that_fails_costs_no_result(topics, pretrained, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError("no room for the figure")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    metrics = finetune.main(files_of(topics, pretrained, tmp_path, "--methods", "pretrained"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "confusion.png was not drawn: no room for the figure" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["magic", "most_frequent", "", "frozen"])
def test_unknown_methods_are_refused(topics, pretrained, tmp_path, method):
    flags = files_of(topics, pretrained, tmp_path, "--methods", f"pretrained,{method}")
    with pytest.raises(UserError, match=f"--methods {method}: choose from ngrams,random_weights"):
        finetune.main(flags)


# the 24 labels, the numbers of training and test examples, and a first answer
LISTS = {
    "classes": (["a"] * 12 + ["b"] * 12, (24, 8), lambda a: a[0] in "ab" and 0.5 <= a[1] <= 1),
    "numbers of classes": ([0] * 12 + [7] * 12, (20, 4), lambda a: a[0] in ("0", "7")),
    "several": ([["a"]] * 12 + [["b", "c"]] * 12, (22, 8), lambda a: set(dict(a)) <= set("abc")),
    "numbers": (np.linspace(5, 6, 24), (24, 8), lambda a: 4 < a < 7),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_learned_and_predicted_from_python(pretrained, tmp_path, kind):
    texts = [*sentences(12, 0, 0), *sentences(12, 1, 3)]
    answers, sizes, is_answer = LISTS[kind]
    ends = np.r_[:4, 20:24]
    test = ([texts[i] for i in ends], [answers[i] for i in ends]) if sizes[1] == 8 else None
    flags = {"methods": "pretrained", "dtype": "float32", "epochs": 1, "max_len": 32}
    metrics = finetune.fit(texts, answers, test, model=pretrained, out=tmp_path, **flags)
    assert (metrics["n_train"], metrics["n_test"]) == sizes
    predictions = predict.predict_texts(tmp_path, texts[:2])
    assert len(predictions) == 2 and is_answer(predictions[0])


@pytest.mark.parametrize(
    ("arguments", "flags", "error", "words"),
    [
        ((["a", "b"], [0]), {}, ValueError, "2 texts and 1 labels"),
        (([], []), {}, ValueError, "0 texts"),
        ((["a", "b"], ["x", "x"]), {}, ValueError, "fewer than two"),
        ((["a", "b"], ["x", "y"], (["c"], ["z"])), {}, ValueError, "'z' is none of"),
        ((["a", "b"], [0.5, 1.0], (["c", "d"], "yz")), {}, ValueError, "test labels are classes"),
        ((["a", "b"], ["x", "y"]), {"epoch": 3}, TypeError, "no flag 'epoch'"),
    ],
)
def test_lists_that_do_not_fit_are_an_error(arguments, flags, error, words):
    with pytest.raises(error, match=words):
        finetune.fit(*arguments, **flags)
