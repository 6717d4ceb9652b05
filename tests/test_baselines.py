"""Baselines equal scikit-learn called by hand, and choose inside the training labels."""

import functools
import json

import numpy as np
import pytest
from conftest import sentences
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace

import labels
from analysis import baselines
from data import Corpus
from files import disk
from files.disk import print_once
from files.tokenizer import train_tokenizer
from labels import LabeledDataset, cross_validation_splits

NGRAMS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
TOKENIZER = train_tokenizer(sentences(50, 0), 200)
SOLVER = {"solver": "liblinear", "dual": True, "random_state": 0, "max_iter": 1000}


def texts_of(n_classes, n_each, seed):
    """Texts and their classes, mixed."""
    texts = [s for k in range(n_classes) for s in sentences(n_each, seed + k, k)]
    targets = np.repeat(np.arange(n_classes), n_each)
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order], targets[order]


def fit_ngrams(texts, targets, eval_texts, n_classes):
    """The scores of the n-gram model that is fitted on texts; `n_classes` is None for numbers."""
    names = [str(k) for k in range(n_classes)] if n_classes else None
    train = LabeledDataset(texts, None, targets, names)
    unused = np.zeros(len(eval_texts), targets.dtype)
    test = LabeledDataset(eval_texts, None, unused, names)
    return baselines.fit_baseline(train, test, TOKENIZER, seed=0).numpy()


def tfidf_by_hand(texts, targets, eval_texts, n_classes, c):
    vectorizer = TfidfVectorizer(sublinear_tf=True, **NGRAMS)
    features = vectorizer.fit_transform(texts)
    eval_features = vectorizer.transform(eval_texts)
    if n_classes == 2:
        model = LogisticRegression(C=c, **SOLVER).fit(features, targets)
        return model.predict_proba(eval_features)
    scores = np.zeros((len(eval_texts), n_classes))
    for k in np.unique(targets):
        model = LogisticRegression(C=c, **SOLVER).fit(features, targets == k)
        scores[:, k] = model.predict_proba(eval_features)[:, 1]
    return scores / scores.sum(1, keepdims=True)


def nbsvm_by_hand(texts, targets, eval_texts, n_classes, c):
    """Wang & Manning 2012, section 2: r = log((p / |p|_1) / (q / |q|_1)) of binarized counts."""
    vectorizer = CountVectorizer(binary=True, **NGRAMS)
    features = vectorizer.fit_transform(texts).toarray()
    eval_features = vectorizer.transform(eval_texts).toarray()
    scores = np.zeros((len(eval_texts), n_classes))
    for k in [1] if n_classes == 2 else range(n_classes):
        p = 1 + features[targets == k].sum(0)
        q = 1 + features[targets != k].sum(0)
        r = np.log((p / np.abs(p).sum()) / (q / np.abs(q).sum()))
        model = LogisticRegression(C=c, **SOLVER).fit(features * r, targets == k)
        scores[:, k] = model.predict_proba(eval_features * r)[:, 1]
    if n_classes == 2:
        scores[:, 0] = 1 - scores[:, 1]
    return scores / scores.sum(1, keepdims=True)


BY_HAND = {"tfidf": tfidf_by_hand, "nbsvm": nbsvm_by_hand}


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("choice", [("tfidf", 3.0), ("nbsvm", 0.3)])
def test_each_variant_of_ngrams_is_scikit_learn_called_by_hand(monkeypatch, n_classes, choice):
    monkeypatch.setattr(baselines, "NGRAM_GRID", (choice,))
    texts, targets = texts_of(n_classes, 40, 0)
    eval_texts, _ = texts_of(n_classes, 20, 50)
    variant, c = choice
    scores = fit_ngrams(texts, targets, eval_texts, n_classes)
    expected = BY_HAND[variant](texts, targets, eval_texts, n_classes, c)
    assert np.allclose(scores, expected, atol=1e-3)
    assert np.allclose(scores.sum(1), 1)


@pytest.mark.parametrize("n_each", [30, 520])
def test_ngrams_chooses_variant_and_c_by_splits_of_the_training_labels(monkeypatch, n_each):
    """Three contiguous folds of few labels, the last tenth of many."""
    grid = (("tfidf", 1.0), ("tfidf", 100.0), ("nbsvm", 0.01), ("nbsvm", 1.0))
    monkeypatch.setattr(baselines, "NGRAM_GRID", grid)
    texts, targets = texts_of(2, n_each, 7)
    noise = np.random.default_rng(0).random(len(targets)) < 0.3
    targets = np.where(noise, 1 - targets, targets)
    examples = LabeledDataset(texts, None, targets, ["a", "b"])
    splits = cross_validation_splits(examples, 3 if n_each == 30 else 1, 0.1)
    accuracies = {}
    for variant, c in grid:
        correct = []
        for train_idx, eval_idx in splits:
            train_texts = [texts[i] for i in train_idx]
            eval_texts = [texts[i] for i in eval_idx]
            scores = BY_HAND[variant](train_texts, targets[train_idx], eval_texts, 2, c)
            correct.append(np.mean(scores.argmax(1) == targets[eval_idx]))
        accuracies[variant, c] = np.mean(correct)
    assert len(set(accuracies.values())) > 1
    variant, c = max(accuracies, key=accuracies.get)
    eval_texts, _ = texts_of(2, 20, 90)
    expected = BY_HAND[variant](texts, targets, eval_texts, 2, c)
    scores = fit_ngrams(texts, targets, eval_texts, 2)
    assert np.allclose(scores, expected, atol=1e-3)


def test_a_text_is_scored_alike_whatever_stands_beside_it():
    """The texts to score take no part in the vocabulary, the weights or the choice."""
    texts, targets = texts_of(3, 30, 0)
    eval_texts, _ = texts_of(3, 10, 50)
    together = fit_ngrams(texts, targets, eval_texts, 3)
    alone = fit_ngrams(texts, targets, eval_texts[:1], 3)
    assert np.allclose(together[:1], alone)


def test_ngrams_of_numbers_is_ridge_regression_on_tfidf(monkeypatch):
    monkeypatch.setattr(baselines, "RIDGE_GRID", (("ridge", 2.0),))
    texts, targets = texts_of(2, 40, 0)
    eval_texts, _ = texts_of(2, 20, 50)
    numbers = 100 + 5 * targets + np.linspace(0, 1, len(targets))
    vectorizer = TfidfVectorizer(sublinear_tf=True, **NGRAMS)
    model = Ridge(alpha=0.5).fit(vectorizer.fit_transform(texts), numbers)
    expected = model.predict(vectorizer.transform(eval_texts))
    scores = fit_ngrams(texts, numbers, eval_texts, None)
    assert np.allclose(scores, expected, atol=1e-2)


def test_without_words_ngrams_predicts_the_majority_class_and_says_so(capsys):
    print_once.cache_clear()
    texts = ["", " ", "\n", "\t"]
    targets = np.array([1, 1, 0, 1])
    scores = fit_ngrams(texts, targets, [" ", ""], 2)
    assert np.allclose(scores, [[0.25, 0.75]] * 2)
    scores = fit_ngrams(texts, targets.astype(np.float32), [""], None)
    assert np.allclose(scores, [0.75])
    line = "ngrams: the texts have no words: it predicts a constant"
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("M K a v", ["m", "k", "a", "v"]),
        ("don't stop!", ["don", "t", "stop"]),
        ("good😀😀 👍", ["good", "😀", "😀", "👍"]),
        ("电影很好", ["电", "影", "很", "好"]),
        ("かわいい", ["か", "わ", "い", "い"]),
        ("หนังดี", ["ห", "น", "ั", "ง", "ด", "ี"]),
        ("अच्छी फिल्म", ["अच्छी", "फिल्म"]),
        ("acgt" * 9, list("acgt" * 9)),
        ("!? .", ["!", "?", "."]),
    ],
)
def test_words_of_any_script(text, words):
    assert baselines.split_words(TOKENIZER, text) == words


@pytest.mark.parametrize("pre_tokenizer", [ByteLevel(), Metaspace(), None])
def test_words_of_other_tokenizers(pre_tokenizer):
    tokenizer = Tokenizer(BPE())
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert baselines.split_words(tokenizer, "ein café 电影") == ["ein", "café", "电", "影"]


@pytest.mark.parametrize("signs", ["GA", "😀😢", "好坏", "!?"])
def test_ngrams_learns_from_what_is_no_word_in_english(signs):
    texts = [f"{signs[i % 2]} {signs[i % 2]}" for i in range(12)]
    scores = fit_ngrams(texts, np.arange(12) % 2, list(signs), 2)
    assert scores.argmax(1).tolist() == [0, 1]


def test_spectral_is_the_mean_of_the_initial_vectors(topics, pretrained):
    train, test = labels.load(None, *topics)
    corpus = baselines.pretraining_corpus(pretrained, 32)
    vectors = corpus.spectral_embedding(256)
    frequency = np.load(corpus.folder / "counts.npy") / len(corpus.tokens)
    for variant, weight in (("plain", 1 + 0 * frequency), ("sif", 1e-3 / (1e-3 + frequency))):
        features = []
        for text in train.texts + test.texts:
            ids = corpus.tokenizer.encode(text, add_special_tokens=False).ids
            features.append(np.mean([weight[i] * vectors[i] for i in ids], axis=0))
        features = normalize(np.array(features))
        model = LogisticRegression(C=10, max_iter=2000)
        model.fit(features[: len(train)], train.targets)
        method = functools.partial(baselines.spectral, corpus=corpus, d_model=256)
        scores = fit_on_all(method, train, test, (variant, 10.0))
        assert np.allclose(scores, model.predict_proba(features[len(train) :]), atol=1e-3)


ODD = {
    "one letter": (["a", "b", "a", "b"], [0, 1, 0, 1], ["a", "b", "c"]),
    "one class": (["a b", "c d", "e"], [1, 1, 1], ["a", ""]),
    "no word in a class": (["", " ", "a b", "a"], [0, 0, 1, 1], ["a", ""]),
    "no word in a fold": (["", "", "a b", "", "", "b"], [0, 1, 0, 1, 0, 1], ["a", "b"]),
    "two of each class": (["a", "b", "c", "d"], [0, 1, 1, 0], ["a"]),
    "class 2 is absent": (["a b", "c d", "a", "c"], [0, 1, 0, 1], ["a"]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_have_probabilities(name):
    texts, targets, eval_texts = ODD[name]
    scores = fit_ngrams(texts, np.array(targets), eval_texts, 3)
    assert scores.shape == (len(eval_texts), 3)
    assert np.isfinite(scores).all() and np.allclose(scores.sum(1), 1)
    assert (scores[:, 2] == 0).all()
    if name == "one letter":
        assert scores[:2].argmax(1).tolist() == [0, 1]
    numbers = fit_ngrams(texts, np.array(targets, dtype=np.float32), eval_texts, None)
    assert numbers.shape == (len(eval_texts),) and np.isfinite(numbers).all()


def fit_on_all(method, train, test, choice):
    """The scores of a method of `baselines` with this choice; `method` takes the examples."""
    examples = baselines.concatenate(train, test)
    fit, _ = method(examples)
    train_idx, test_idx = np.split(np.arange(len(examples)), [len(train)])
    return fit(choice, train_idx, test_idx)


def test_lsa_of_a_text_of_one_word_is_a_constant_and_says_so(topics, pretrained, capsys):
    class Text:
        tokenizer = baselines.pretraining_corpus(pretrained).tokenizer

        def sample_texts(self, n_windows: int, seed: int) -> list[str]:
            return ["bal"] * 2

    print_once.cache_clear()
    train, test = labels.load(None, *topics)
    fit, grid = baselines.lsa(baselines.concatenate(train, test), Text())
    scores = fit(grid[0], np.arange(len(train)), np.array([len(train)]))
    frequencies = np.bincount(train.targets) / len(train)
    np.testing.assert_allclose(scores, frequencies[None], atol=1e-6)
    assert "lsa: fewer than two texts or words" in capsys.readouterr().err


def test_lsa_is_scikit_learn_called_by_hand(topics, pretrained):
    train, test = labels.load(None, *topics)
    lsa = functools.partial(baselines.lsa, corpus=baselines.pretraining_corpus(pretrained))
    scores = fit_on_all(lsa, train, test, (128, 10.0))

    cache = disk.CACHE / json.loads((pretrained / "metrics.json").read_text())["tokens_folder"]
    corpus = Corpus(cache, max_len=256, micro_batch_tokens=1, seed=0)
    texts = corpus.sample_texts(50_000, seed=0)
    tfidf = TfidfVectorizer(sublinear_tf=True).fit(texts)
    width = min(1024, len(texts) - 1, len(tfidf.vocabulary_) - 1)
    svd = TruncatedSVD(width, random_state=0).fit(tfidf.transform(texts))
    features = normalize(svd.transform(tfidf.transform(train.texts))[:, :128])
    eval_features = normalize(svd.transform(tfidf.transform(test.texts))[:, :128])
    model = LogisticRegression(C=10, max_iter=2000).fit(features, train.targets)
    assert np.allclose(scores, model.predict_proba(eval_features), atol=1e-3)


def test_a_class_that_the_targets_lack_has_no_probability():
    examples = LabeledDataset([""] * 6, None, np.array([0, 0, 0, 2, 2, 2]), list("abcd"))
    model = baselines.linear_model(True, 1.0)
    everything = np.arange(6)
    scores = baselines.fit_and_score(model, np.eye(6), examples, everything, everything)
    assert (scores[:, [1, 3]] == 0).all()
    assert (scores.argmax(1) == examples.targets).all()
    assert np.allclose(scores.sum(1), 1)


@pytest.mark.parametrize(
    ("choice", "grid", "on_edge"),
    [
        (3e-4, (0.0, 1e-4, 3e-4), True),
        (1e-4, (0.0, 1e-4, 3e-4), False),
        (0.0, (0.0, 1e-4, 3e-4), False),  # a rate of 0 has none below
        (("a", 1.0), (("a", 0.1), ("a", 1.0), ("b", 10.0)), True),
        (("a", 1.0), (("a", 0.1), ("a", 1.0), ("a", 10.0), ("b", 1.0)), False),
        ((8, 1.0), [(w, c) for w in (8, 16, 32) for c in (0.1, 1.0, 10.0)], True),
        ((16, 1.0), [(w, c) for w in (8, 16, 32) for c in (0.1, 1.0, 10.0)], False),
        (None, [None], False),
    ],
)
def test_choices_on_the_edge_of_a_grid(choice, grid, on_edge):
    assert baselines.is_on_edge(choice, grid) == on_edge
