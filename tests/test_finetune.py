"""Fine-tuning and its rivals: rows, choices inside the budget, the folder that is left."""

import json

import numpy as np
import pytest
import torch
from conftest import FAST, sentences, write_csv

import finetune
import labels
from analysis import baselines
from files import model_folder
from model import Classifier


def test_four_rows_stand_side_by_side(finetuned):
    out, metrics = finetuned
    assert metrics == json.loads((out / "metrics.json").read_text()) | {"choices": metrics["choices"]}
    assert set(metrics["test"]) == {"bag_of_words", "lsa", "scratch", "pretrained"}
    for row in metrics["test"].values():
        assert set(row) == {"accuracy", "macro_f1", "seconds"} and 0 <= row["accuracy"] <= 1
    assert metrics["test"]["bag_of_words"]["accuracy"] > metrics["majority"] == pytest.approx(1 / 3)
    assert metrics["names"] == ["2", "Birds & bees", "кошки"]
    confusion = np.array(metrics["confusion"])
    assert confusion.sum() == 60
    assert np.trace(confusion) / 60 == pytest.approx(metrics["test"]["pretrained"]["accuracy"])
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_reads_the_classifier_with_equal_logits(finetuned, topics):
    from transformers import AutoModelForSequenceClassification

    out, metrics = finetuned
    theirs, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(metrics["names"]))
    config, state, tokenizer, _ = model_folder.load_model(out)
    ours = Classifier(config, 3)
    model_folder.load_weights(ours, state, out)
    ours.eval()
    _, test = labels.load(None, *topics)
    rows, _ = labels.encode(test, tokenizer, 32)
    with torch.no_grad():
        for _, inputs in labels.batches(rows, np.arange(8), 8):
            logits = ours(*inputs)[:8]
        for row, logit in zip(rows, logits, strict=False):
            assert torch.allclose(theirs(torch.from_numpy(row[:, 0])[None]).logits[0], logit, atol=1e-5)


def test_the_saved_model_is_the_one_that_was_measured(finetuned, topics):
    out, metrics = finetuned
    config, state, tokenizer, _ = model_folder.load_model(out)
    model = Classifier(config, 3)
    model_folder.load_weights(model, state, out)
    _, test = labels.load(None, *topics)
    rows, _ = labels.encode(test, tokenizer, 32)
    autocast = torch.autocast("cpu", enabled=False)
    logits = finetune.outputs(model, rows, np.arange(len(rows)), autocast, model)
    assert np.mean(logits.argmax(1) == test.targets) == metrics["test"]["pretrained"]["accuracy"]


def test_baselines_are_scikit_learn_called_by_hand(topics):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    train, test = labels.load(None, *topics)
    tfidf = TfidfVectorizer(sublinear_tf=True).fit(train.texts)
    model = LogisticRegression(C=3, max_iter=2000).fit(tfidf.transform(train.texts), train.targets)
    found = baselines.bag_of_words(train.texts, train.targets, test.texts, 3, [(3.0,)])[3.0,]
    assert np.allclose(found, model.predict_proba(tfidf.transform(test.texts)))

    texts = [s for topic in range(6) for s in sentences(100, topic, topic)]
    tfidf, svd = baselines.fit_latent_semantics(texts)
    vectors, test_vectors = (svd.transform(tfidf.transform(x.texts)) for x in (train, test))
    tfidf = TfidfVectorizer(sublinear_tf=True).fit(texts)
    svd = TruncatedSVD(vectors.shape[1], random_state=0).fit(tfidf.transform(texts))
    a, b = (normalize(svd.transform(tfidf.transform(x.texts))[:, :100]) for x in (train, test))
    by_hand = LogisticRegression(C=10, max_iter=2000).fit(a, train.targets).predict_proba(b)
    found = baselines.lsa(vectors, train.targets, test_vectors, 3, [(100, 10.0)])[100, 10.0]
    assert np.allclose(found, by_hand)


def test_a_class_that_a_fold_lacks_has_no_probability():
    features, targets = np.eye(6), np.array([0, 0, 0, 2, 2, 2])
    found = baselines.linear_scores(features, targets, features, 4, 1.0)
    assert (found[:, [1, 3]] == 0).all() and (found.argmax(1) == targets).all()
    assert np.allclose(found.sum(1), 1)


def test_what_each_row_said_of_each_test_text_is_kept(finetuned):
    out, metrics = finetuned
    with np.load(out / "predictions.npz") as kept:
        assert set(kept) == {"targets", *metrics["test"]}
        for row, result in metrics["test"].items():
            assert kept[row].shape == (60, 3) and np.allclose(kept[row].sum(1), 1)
            assert np.mean(kept[row].argmax(1) == kept["targets"]) == result["accuracy"]


def test_frozen_vectors_are_a_row_where_they_are_asked_for(topics, pretrained, tmp_path):
    flags = ["--model", str(pretrained), "--train", str(topics[0]), "--test", str(topics[1]), *FAST]
    metrics = finetune.main([*flags, "--out", str(tmp_path), "--rows", "frozen"])
    assert metrics["test"]["frozen"]["accuracy"] > metrics["majority"]
    assert metrics["choices"]["frozen"]["choice"] in finetune.GRIDS["frozen"]


def test_no_row_searches_less_than_the_pretrained_one():
    assert all(len(grid) >= len(finetune.GRIDS["pretrained"]) for grid in finetune.GRIDS.values())


def test_no_choice_sees_the_test_set(topics, pretrained, tmp_path):
    """With its labels turned round, the test set gives other scores and the same choices."""
    rows = [line.rsplit(",", 1) for line in topics[1].read_text().splitlines()[1:]]
    turn = {"2": "кошки", "кошки": "Birds & bees", "Birds & bees": "2"}
    turned = write_csv(tmp_path / "turned.csv", [(text.strip('"'), turn[label]) for text, label in rows])
    found = []
    for test in (topics[1], turned):
        flags = ["--model", str(pretrained), "--train", str(topics[0]), "--test", str(test), *FAST]
        found.append(
            finetune.main([*flags, "--out", str(tmp_path / "out"), "--rows", "bag_of_words,pretrained"])
        )
    assert found[0]["choices"] == found[1]["choices"]
    assert found[0]["test"]["bag_of_words"]["accuracy"] > found[1]["test"]["bag_of_words"]["accuracy"]


def test_a_budget_is_the_whole_budget(topics, pretrained, tmp_path):
    flags = ["--model", str(pretrained), "--train", str(topics[0]), "--test", str(topics[1]), *FAST]
    metrics = finetune.main([*flags, "--out", str(tmp_path), "--labels", "30", "--rows", "bag_of_words"])
    assert metrics["n_train"] == 30 and set(metrics["test"]) == {"bag_of_words"}


def test_numbers_are_regressed(pretrained, tmp_path):
    """The number to predict goes with the topic; the folder predicts in the labels' own unit."""
    from transformers import AutoModelForSequenceClassification

    texts = [s for topic in (0, 1) for s in sentences(60, topic, topic)]
    order = np.random.default_rng(0).permutation(len(texts))
    rows = [(texts[i], f"{10 + 5 * (i >= 60) + 0.01 * i:.3f}") for i in order]
    path = write_csv(tmp_path / "numbers.csv", rows)
    out = tmp_path / "out"
    metrics = finetune.main(["--model", str(pretrained), "--train", str(path), "--out", str(out), *FAST])
    for row in ("bag_of_words", "lsa", "scratch", "pretrained"):
        assert set(metrics["test"][row]) == {"rmse", "pearson", "spearman", "seconds"}
    assert metrics["test"]["bag_of_words"]["rmse"] < metrics["majority"]
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.problem_type == "regression" and 5 < theirs.classifier.bias.item() < 25


def test_pairs_are_read_and_both_sides_count(pretrained, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["sentence1,sentence2,label"]
    for _ in range(60):
        a, b = rng.integers(0, 2, size=2)
        first, second = (
            sentences(1, int(rng.integers(1 << 30)), int(a)),
            sentences(1, int(rng.integers(1 << 30)), 3),
        )
        lines.append(f"{first[0]},{second[0]},{'same' if b else 'other'}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines))
    flags = ["--model", str(pretrained), "--train", str(path), "--out", str(tmp_path / "out"), *FAST]
    metrics = finetune.main([*flags, "--rows", "pretrained,bag_of_words"])
    assert metrics["names"] == ["other", "same"] and 45 < metrics["n_train"] < 52


def test_pieces_of_a_step_sum_to_the_step(pretrained, topics):
    train, _ = labels.load(None, *topics)
    config, state, tokenizer, _ = model_folder.load_model(pretrained)
    rows, _ = labels.encode(train, tokenizer, 32)
    models = []
    for pieces in (1, 4):
        args = finetune.parse(["--accumulate", str(pieces), "--epochs", "1", "--dropout", "0"])
        torch.manual_seed(0)
        model = Classifier(config, 3)
        model_folder.load_weights(model, state, pretrained, allow_missing=("classifier",))
        off = torch.autocast("cpu", enabled=False)
        finetune.fit_network(model, rows, train.targets, np.arange(64), 1e-3, args, off)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], atol=2e-4), name


def test_rare_words_move_a_pretrained_embedding_less(pretrained, topics, tmp_path, monkeypatch):
    """Adam moves rare and frequent words alike; the pretrained row, and it alone, is fitted otherwise."""
    train, _ = labels.load(None, *topics)
    config, state, tokenizer, _ = model_folder.load_model(pretrained)
    rows, _ = labels.encode(train, tokenizer, 32)
    counts = np.bincount(np.concatenate([row[:, 0] for row in rows]), minlength=config.vocab_size)
    once = np.flatnonzero(counts == 0)[-8:]
    for row, token in zip(rows[:8], once, strict=True):
        row[1, 0] = token
    shares = []
    for eps in (finetune.ADAM_EPS, finetune.EMBEDDING_EPS):
        args = finetune.parse(["--epochs", "2", "--weight-decay", "0"])
        torch.manual_seed(0)
        model = Classifier(config, 3)
        model_folder.load_weights(model, state, pretrained, allow_missing=("classifier",))
        embedding = model.model.embeddings.tok_embeddings.weight
        before, off = embedding.detach().clone(), torch.autocast("cpu", enabled=False)
        finetune.fit_network(model, rows, train.targets, np.arange(len(rows)), 3e-4, args, off, eps)
        moved = (embedding.detach() - before).norm(dim=1).numpy()
        shares.append(moved[once].mean() / moved[np.argsort(counts)[-8:]].mean())
    assert shares[1] < 0.7 * shares[0]

    fitted, fit = [], finetune.fit_network
    monkeypatch.setattr(finetune, "fit_network", lambda *given: (fitted.append(given[-1]), fit(*given)))
    flags = ["--model", str(pretrained), "--train", str(topics[0]), "--test", str(topics[1]), *FAST]
    for row, eps in (("scratch", finetune.ADAM_EPS), ("pretrained", finetune.EMBEDDING_EPS)):
        finetune.main([*flags, "--rows", row, "--lr", "1e-3", "--out", str(tmp_path / row)])
        assert fitted.pop() == eps and not fitted
