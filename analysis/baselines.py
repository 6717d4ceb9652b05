"""Baselines: linear models of words and word pairs, of latent semantics, of given features.

A method is a function that returns its `fit` and the grid of its choices. `fit(choice, train_idx,
eval_idx)` learns from some examples and scores others. Scores are probabilities (examples,
classes), or for regression the predicted numbers (examples,).
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import normalize

from data import Corpus
from files import model_folder
from files.disk import CACHE, UserError
from files.entities import TaggedDataset, most_frequent_tags
from labels import LabeledDataset, validation_splits
from model import Classifier

BASELINES = ("ngrams", "most_frequent")
# Inverse regularization strengths C.
NGRAM_GRID = (
    *(("tfidf", 1.0), ("tfidf", 3.0), ("tfidf", 10.0), ("tfidf", 30.0), ("tfidf", 100.0)),
    *(("nbsvm", 0.01), ("nbsvm", 0.1), ("nbsvm", 0.3), ("nbsvm", 1.0), ("nbsvm", 3.0)),
)
RIDGE_GRID = tuple(("ridge", c) for c in (0.1, 0.3, 1.0, 3.0, 10.0))
BAG_OF_WORDS_GRID = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LSA_WIDTHS = (100, 256, 512)
LSA_GRID = tuple((width, c) for width in LSA_WIDTHS for c in (1.0, 10.0))
LSA_WINDOWS = 50_000
HEAD_C = 1e-3  # fine-tuning from a head that fits better ends lower
WORD = r"(?u)\b\w+\b"  # scikit-learn's own pattern ignores words of one letter

Fit = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def fit_baseline(
    train: LabeledDataset | TaggedDataset, test: LabeledDataset | TaggedDataset, seed: int
) -> Any:
    """Fit `ngrams`, or for token labels the most frequent tag of each word.

    Returns:
        A tensor of the scores of the test examples, or a list of the tags of each of them.
    """
    if isinstance(train, TaggedDataset):
        return most_frequent_tags(train, test.words)
    examples = concatenate(train, test)
    fit, grid = ngrams(examples, seed)
    choice, _ = choose(fit, grid, train)
    train_idx, test_idx = np.split(np.arange(len(examples)), [len(train)])
    return torch.from_numpy(fit(choice, train_idx, test_idx))


def concatenate(train: LabeledDataset, test: LabeledDataset) -> LabeledDataset:
    pairs = None if train.pairs is None else train.pairs + test.pairs
    targets = np.concatenate((train.targets, test.targets))
    return replace(train, texts=train.texts + test.texts, pairs=pairs, targets=targets)


def choose(fit: Fit, grid: Sequence, train: LabeledDataset) -> tuple[Any, float]:
    """The choice with the best mean validation score, and this score: the accuracy, or for numbers
    the negative mean squared error. `train` are the first of the examples that `fit` knows."""
    scores = dict.fromkeys(grid, 0.0)
    splits = validation_splits(train)
    for train_idx, eval_idx in splits:
        targets = train.targets[eval_idx]
        for choice in grid:
            values = goodness(fit(choice, train_idx, eval_idx), targets)
            scores[choice] += float(values.mean()) / len(splits)
    best = max(grid, key=scores.get)
    return best, scores[best]


def goodness(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each example, 1 if it is classified correctly, else 0; of a number, minus its squared
    error."""
    return scores.argmax(1) == targets if scores.ndim == 2 else -((scores - targets) ** 2)


# ---------------------------------------------------------------------------------- the methods


def ngrams(examples: LabeledDataset, seed: int) -> tuple[Fit, Sequence]:
    """The better of two linear classifiers of unigrams and bigrams; for numbers, ridge regression.

    One is logistic regression on TF-IDF, the other NB-SVM (Wang & Manning 2012, section 2.3) with
    logistic regression as its classifier, each of one class against the rest.
    """
    counts = count_words(examples, ngram_range=(1, 2), token_pattern=WORD)

    def fit(choice: tuple, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        variant, c = choice
        tfidf = TfidfTransformer(sublinear_tf=True)
        # dual coordinate descent is the fastest solver for more n-grams than examples
        solver = {"solver": "liblinear", "dual": True, "random_state": seed, "max_iter": 1000}
        logistic = LogisticRegression(C=c, **solver)
        if variant == "tfidf":
            model = make_pipeline(tfidf, OneVsRestClassifier(logistic))
        elif variant == "nbsvm":
            model = OneVsRestClassifier(make_pipeline(LogCountRatio(), logistic))
        else:
            model = make_pipeline(tfidf, Ridge(alpha=1 / c))
        return fit_and_score(model, counts, examples, train_idx, eval_idx)

    return fit, NGRAM_GRID if examples.names else RIDGE_GRID


class LogCountRatio(TransformerMixin, BaseEstimator):
    """The features of NB-SVM: binarized counts f times r = log((p / |p|) / (q / |q|)), where p = 1
    + (the sum of f over the class) and q = 1 + (its sum over the rest)."""

    def fit(self, counts: csr_matrix, is_class: np.ndarray) -> "LogCountRatio":
        present = counts > 0
        p = 1 + present[is_class == 1].sum(axis=0)
        q = 1 + present[is_class == 0].sum(axis=0)
        self.ratio = np.log(p / p.sum()) - np.log(q / q.sum())
        return self

    def transform(self, counts: csr_matrix) -> csr_matrix:
        return (counts > 0).multiply(self.ratio).tocsr()


def bag_of_words(examples: LabeledDataset) -> tuple[Fit, Sequence]:
    """A linear model of the TF-IDF of the words of the training texts."""
    counts = count_words(examples)

    def fit(c: float, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        linear = linear_model(examples.names is not None, c)
        model = make_pipeline(TfidfTransformer(sublinear_tf=True), linear)
        return fit_and_score(model, counts, examples, train_idx, eval_idx)

    return fit, BAG_OF_WORDS_GRID


def lsa(examples: LabeledDataset, n_train: int, pretrained: Path) -> tuple[Fit, Sequence]:
    """A linear model of the first components of document vectors, whose number is chosen too."""
    texts = examples.joined_texts()
    vectors = document_vectors(texts, texts[:n_train], pretrained)

    def fit(choice: tuple, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        width, c = choice
        model = linear_model(examples.names is not None, c)
        return fit_and_score(model, normalize(vectors[:, :width]), examples, train_idx, eval_idx)

    return fit, LSA_GRID


def document_vectors(texts: list[str], labelled: list[str], pretrained: Path) -> np.ndarray:
    """Latent semantic analysis of texts, (texts, components): TF-IDF and its truncated SVD.

    Args:
        labelled: The texts to fit on if the text of the pretraining cannot be used.
        pretrained: The folder of the pretrained model, whose metrics.json names this text.
    """
    path = pretrained / "metrics.json"
    with model_folder.reading(path):
        metrics = json.loads(path.read_bytes()) if path.is_file() else {}
        cache = CACHE / metrics.get("tokens_folder", "none")
    try:
        model = latent_semantics_of(cache)
    except (UserError, ValueError):  # not in the cache, of another version, of one window
        model = fit_latent_semantics(labelled)
    return model.transform(texts)


@functools.lru_cache(1)  # an experiment embeds many draws of labels in one space
def latent_semantics_of(cache: Path) -> Pipeline:
    corpus = Corpus(cache, max_len=256, micro_batch_tokens=1, seed=0)
    return fit_latent_semantics(corpus.sample_texts(LSA_WINDOWS, seed=0))


def fit_latent_semantics(texts: list[str]) -> Pipeline:
    """TF-IDF of the texts, and its SVD with as many components as the widest choice has."""
    min_df = 2 if len(texts) > 1000 else 1
    # the SVD in float64 takes longer and gives the same accuracies
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=min_df, dtype=np.float32)
    features = tfidf.fit_transform(texts)
    width = min(max(LSA_WIDTHS), min(features.shape) - 1)
    return make_pipeline(tfidf, TruncatedSVD(width, random_state=0).fit(features))


# ------------------------------------------------------------------------------- what they share


def count_words(examples: LabeledDataset, **options) -> csr_matrix:
    """How often each example has each word or n-gram, (examples, n-grams); the options are those
    of CountVectorizer."""
    texts = examples.joined_texts()
    try:
        return CountVectorizer(**options).fit_transform(texts)
    except ValueError:  # there is no word
        return csr_matrix((len(texts), 0))


def linear_model(is_classification: bool, c: float) -> LogisticRegression | Ridge:
    """Logistic regression, or for numbers ridge regression, with inverse regularization c."""
    return LogisticRegression(C=c, max_iter=2000) if is_classification else Ridge(alpha=1 / c)


def fit_and_score(
    model: Any,
    features: np.ndarray | csr_matrix,
    examples: LabeledDataset,
    train_idx: np.ndarray,
    eval_idx: np.ndarray,
) -> np.ndarray:
    """Fit a model of scikit-learn on some examples and score others; features (examples, width)."""
    targets = examples.targets[train_idx]
    n_classes = len(examples.names) if examples.names else None
    inputs, eval_inputs = features[train_idx], features[eval_idx]
    if issparse(features):  # the words of other examples are not known
        is_known = inputs.getnnz(axis=0) > 0
        inputs, eval_inputs = inputs[:, is_known], eval_inputs[:, is_known]
    if inputs.shape[1] == 0 or len(np.unique(targets)) == 1:
        return constant_scores(targets, len(eval_idx), n_classes)
    model.fit(inputs, targets)
    if n_classes is None:
        return model.predict(eval_inputs)
    scores = np.zeros((len(eval_idx), n_classes))  # for a class without examples
    scores[:, model.classes_] = model.predict_proba(eval_inputs)
    return scores


def constant_scores(targets: np.ndarray, n_examples: int, n_classes: int | None) -> np.ndarray:
    """The class frequencies, or the mean number, for every example."""
    if n_classes is None:
        return np.full(n_examples, targets.mean())
    return np.tile(np.bincount(targets, minlength=n_classes) / len(targets), (n_examples, 1))


def fit_head(
    model: Classifier, features: np.ndarray, targets: np.ndarray, is_classification: bool
) -> None:
    """Set the last layer of a classifier to a linear fit on features (S, d_model)."""
    fitted = linear_model(is_classification, HEAD_C).fit(features, targets)
    weight = np.atleast_2d(fitted.coef_)
    bias = np.atleast_1d(fitted.intercept_)
    if is_classification and len(weight) == 1:  # of the second of two classes
        weight = np.concatenate((-weight / 2, weight / 2))
        bias = np.concatenate((-bias / 2, bias / 2))
    present = fitted.classes_ if is_classification else [0]
    layer = model.classifier
    layer.weight.data.zero_()
    layer.bias.data.fill_(-10.0)  # of a class without examples
    layer.weight.data[present] = torch.from_numpy(weight).to(layer.weight)
    layer.bias.data[present] = torch.from_numpy(bias).to(layer.bias)
