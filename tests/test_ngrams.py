"""The n-gram model beside a classifier: its n-grams, its fit, its file, its explanation."""

import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import sentences
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from test_explain import logits_of, random_classifier

import explain
import finetune
import predict
from analysis.fit_ngrams import STRENGTHS, fit_ngrams, ngram_features
from files import model_folder
from files.disk import UserError
from files.ngrams import N_BUCKETS, NgramModel, find_ngrams, load_ngrams
from labels import LabeledDataset, load, validation_splits


def ngrams_by_hand(ids, cu_seqlens):
    texts = [ids[a:b] for a, b in itertools.pairwise(cu_seqlens)]
    return [
        (text, tuple(ids_of_text[i : i + n]))
        for n in (1, 2, 3)
        for text, ids_of_text in enumerate(texts)
        for i in range(len(ids_of_text) - n + 1)
    ]


def random_rows(n, seed, n_words=40):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(5, n_words, rng.integers(1, 12)) for _ in range(n)]
    return [np.stack((row, np.zeros_like(row)), axis=1) for row in rows]


def random_model(n_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randperm(N_BUCKETS, generator=generator)[: N_BUCKETS // 2].sort().values
    weight = torch.randn(len(buckets), n_classes, generator=generator)
    return NgramModel(buckets, weight, torch.randn(n_classes, generator=generator))


@pytest.mark.parametrize("lengths", ([4, 1, 0, 3], [1], [2, 2]))
def test_ngrams_lie_within_a_text(lengths):
    ids = np.random.default_rng(0).integers(0, 2**17, sum(lengths))
    cu_seqlens = np.cumsum([0, *lengths])
    ngrams = find_ngrams(torch.from_numpy(ids), torch.from_numpy(cu_seqlens).int())
    expected = ngrams_by_hand(ids.tolist(), cu_seqlens.tolist())
    buckets = (ngrams.key % N_BUCKETS).tolist()
    assert (ngrams.key // N_BUCKETS).tolist() == [text for text, _ in expected]
    assert ngrams.length.tolist() == [len(tokens) for _, tokens in expected]
    bucket_of = dict(zip((tokens for _, tokens in expected), buckets, strict=True))
    assert len(set(bucket_of.values())) == len(bucket_of)  # a collision of few is improbable
    assert all(0 <= bucket < N_BUCKETS for bucket in bucket_of.values())
    assert buckets == [bucket_of[tokens] for _, tokens in expected]


def test_the_hash_spreads_neighbouring_tokens():
    ids = torch.arange(20_000)
    buckets = find_ngrams(ids, torch.tensor([0, len(ids)], dtype=torch.int32)).key
    n_expected = N_BUCKETS * (1 - np.exp(-len(buckets) / N_BUCKETS))
    assert len(buckets.unique()) == pytest.approx(n_expected, rel=0.02)


def test_an_ngram_counts_once_per_text():
    model = random_model(3)
    once, twice = torch.tensor([7, 8, 9]), torch.tensor([7, 8, 9, 99_999, 7, 8, 9])
    ends = torch.tensor([0, 3, 10], dtype=torch.int32)
    scores = model.token_scores(torch.cat((once, twice)), ends)
    ngrams = find_ngrams(torch.cat((once, twice)), ends)
    for text, tokens in enumerate((slice(0, 3), slice(3, 10))):
        buckets = ngrams.key[ngrams.key // N_BUCKETS == text].unique() % N_BUCKETS
        is_known = torch.isin(model.buckets, buckets)
        expected = model.weight[is_known].sum(0)
        torch.testing.assert_close(scores[tokens].sum(0), expected)


@pytest.mark.parametrize("n_classes", (2, 3))
def test_the_fit_is_nb_svm(n_classes):
    rows = random_rows(150, 1)
    targets = np.array([min(n_classes - 1, int(row[0, 0]) % n_classes) for row in rows])
    names = [str(k) for k in range(n_classes)]
    train = LabeledDataset([""] * len(rows), None, targets, names)
    model = fit_ngrams(rows, train, seed=0)
    features = ngram_features(rows).toarray()[:, model.buckets]
    new = random_rows(30, 2)
    eval_features = ngram_features(new).toarray()[:, model.buckets]

    def by_hand(c, train_idx, eval_inputs):
        log_odds = []
        for k in range(n_classes):
            is_class = targets[train_idx] == k
            f = features[train_idx]
            p = 1 + f[is_class].sum(0)
            q = 1 + f[~is_class].sum(0)
            r = np.log(p / p.sum()) - np.log(q / q.sum())
            logistic = LogisticRegression(C=c, solver="liblinear", dual=True, max_iter=1000)
            logistic.set_params(random_state=0).fit(f * r, is_class)
            log_odds.append(logistic.decision_function(eval_inputs * r))
        return np.stack(log_odds, 1)

    losses = dict.fromkeys(STRENGTHS, 0.0)
    for train_idx, eval_idx in validation_splits(train):
        for c in STRENGTHS:
            p = expit(by_hand(c, train_idx, features[eval_idx]))
            p = p / p.sum(1, keepdims=True)
            losses[c] -= np.log(p[np.arange(len(eval_idx)), targets[eval_idx]]).mean()
    best = min(losses, key=losses.get)
    expected = np.log(expit(by_hand(best, np.arange(150), eval_features)))
    ids = torch.from_numpy(np.concatenate(new)[:, 0])
    ends = torch.from_numpy(np.cumsum([0, *map(len, new)])).int()
    actual = model(ids, ends).numpy()
    difference = actual - actual[:, :1] - (expected - expected[:, :1])
    assert np.abs(difference).max() < 0.05 and np.abs(expected).max() > 0.3


def test_labels_of_one_class_leave_the_network_as_it_is(tmp_path):
    rows = random_rows(9, 1)
    train = LabeledDataset([""] * 9, None, np.ones(9, dtype=int), ["a", "b", "c"])
    ids = torch.from_numpy(np.concatenate(rows)[:, 0])
    ends = torch.from_numpy(np.cumsum([0, *map(len, rows)])).int()
    model = fit_ngrams(rows, train, seed=0)
    model.save(tmp_path)
    assert load_ngrams(tmp_path, 3)(ids, ends).unique().numel() == 1


def test_the_saved_model_answers_as_it_was_measured(finetuned, topics):
    out, _ = finetuned
    with np.load(out / "predictions.npz") as arrays:
        expected = arrays["pretrained+ngrams"]
        network = arrays["pretrained"]
    texts = load(None, *topics)[1].texts
    model, tokenizer, names = model_folder.open_model(out, torch.device("cpu"))
    answer = predict.make_answer(model, tokenizer, names, len(names), torch.float32)
    answers, _ = answer([predict.Item("", text) for text in texts])
    probabilities = [
        [next(a["probability"] for a in one["answers"] if a["label"] == name) for name in names]
        for one in answers
    ]
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    assert np.abs(network - expected).max() > 0.01


def test_a_new_run_leaves_no_ngrams_of_an_old_one(topics, pretrained, finetuned, tmp_path):
    shutil.copytree(finetuned[0], tmp_path / "out")
    train, test = map(str, topics)
    flags = ["--model", str(pretrained), "--train", train, "--test", test]
    flags += ["--out", str(tmp_path / "out"), "--epochs", "1", "--methods", "pretrained"]
    finetune.main(flags)
    model, _, _ = model_folder.open_model(tmp_path / "out", torch.device("cpu"))
    assert model.ngrams is None


@pytest.mark.parametrize("damage", ("cut", "other", "wide"))
def test_a_damaged_file_is_one_line(finetuned, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(finetuned[0], folder, ignore=shutil.ignore_patterns("checkpoints"))
    path = folder / "ngrams.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        tensors = {"weights": torch.zeros(1)}
        if damage == "wide":
            tensors = {"buckets": torch.tensor([3]), "weight": torch.zeros(1, 9)}
            tensors["bias"] = torch.zeros(9)
        path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(UserError, match=str(folder)):
        model_folder.open_model(folder, torch.device("cpu"))


@pytest.mark.parametrize("n_labels", (2, 4))
def test_attributions_include_the_ngrams(n_labels):
    """From a text of masks, which has no n-grams, to the text: the sum is exact."""
    model, tokenizer = random_classifier("modern", n_labels)
    model.ngrams = random_model(n_labels)
    names = [f"class {i}" for i in range(n_labels)]
    explanation = explain.explain(model, tokenizer, names, sentences(1, 3)[0], 1)
    masked = explanation.row.copy()
    masked[1:-1, 0] = tokenizer.token_to_id("[MASK]")
    of_text = logits_of(model, [explanation.row])
    ngrams, model.ngrams = model.ngrams, None
    of_masks = logits_of(model, [masked]) + torch.nn.functional.logsigmoid(ngrams.bias)
    difference = explain.score(model, of_text, 1) - explain.score(model, of_masks, 1)
    # [CLS] and [SEP] have n-grams too, but are no words
    ids = torch.from_numpy(explanation.row[:, 0])
    edges = ngrams.token_scores(ids, torch.tensor([0, len(ids)]))
    slack = float(edges[[0, -1]].abs().sum())
    assert abs(float(explanation.attributions.sum() - difference)) <= 0.05 + slack


def test_ngrams_need_a_network(topics, pretrained, tmp_path):
    train, test = map(str, topics)
    flags = ["--model", str(pretrained), "--train", train, "--test", test, "--out", str(tmp_path)]
    with pytest.raises(UserError, match="it needs pretrained before it"):
        finetune.main([*flags, "--methods", "pretrained+ngrams"])
    assert "pretrained+ngrams" not in json.dumps(finetune.parse_args([]).methods)


def test_ngrams_before_the_network_are_refused(topics, pretrained, tmp_path):
    train, test = map(str, topics)
    flags = ["--model", str(pretrained), "--train", train, "--test", test, "--out", str(tmp_path)]
    with pytest.raises(UserError, match="it needs pretrained before it"):
        finetune.main([*flags, "--methods", "pretrained+ngrams,pretrained"])
