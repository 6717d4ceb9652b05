"""Baselines: linear models on word counts, on latent semantics, on frozen features.

Scores are the probabilities of the classes, (examples, classes), or for regression, where
`n_classes` is None, the predicted numbers, (examples,).
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import normalize

from data import Corpus
from files import model_folder
from files.disk import CACHE
from files.entities import TaggedDataset, most_frequent_tags
from labels import LabeledDataset, validation_splits
from model import Classifier

BASELINES = ("ngrams", "most_frequent")
# Inverse regularization strengths C of the n-gram models.
NGRAM_GRID = (
    *(("tfidf", 1.0), ("tfidf", 3.0), ("tfidf", 10.0), ("tfidf", 30.0), ("tfidf", 100.0)),
    *(("nbsvm", 0.01), ("nbsvm", 0.1), ("nbsvm", 0.3), ("nbsvm", 1.0), ("nbsvm", 3.0)),
)
RIDGE_GRID = tuple(("ridge", c) for c in (0.1, 0.3, 1.0, 3.0, 10.0))
WORD = r"(?u)\b\w+\b"  # scikit-learn's own pattern ignores words of one letter
HEAD_C = 1e-3  # fine-tuning from a head that fits better ends lower
LSA_WIDTHS = (100, 256, 512)
LSA_WINDOWS = 50_000

Scores = dict[Any, np.ndarray]  # hyperparameters: scores


def fit_baseline(
    train: LabeledDataset | TaggedDataset, test: LabeledDataset | TaggedDataset, seed: int
) -> Any:
    """Fit `ngrams`, or for token labels the most frequent tag of each word.

    Returns:
        A tensor of the scores of the test examples, or a list of the tags of each of them.
    """
    if isinstance(train, TaggedDataset):
        return most_frequent_tags(train, test.words)
    n_classes = len(train.names) if train.names else None
    texts = (train.joined_texts(), train.targets, test.joined_texts())
    return torch.from_numpy(ngrams(*texts, n_classes, seed))


# -------------------------------------------------------------------------------------- n-grams


def ngrams(
    texts: list[str],
    targets: np.ndarray,
    eval_texts: list[str],
    n_classes: int | None,
    seed: int = 0,
) -> np.ndarray:
    """The better of two linear classifiers of unigrams and bigrams; for numbers, ridge regression.

    One is logistic regression on TF-IDF, the other NB-SVM (Wang & Manning 2012, section 2.3) with
    logistic regression as its classifier. The variant and its C are those with the best accuracy
    (for numbers, the least squared error) on `labels.validation_splits` of the training texts.

    Args:
        texts: The training texts.
        targets: Their class numbers, or numbers to predict.
        eval_texts: The texts to score.
        n_classes: The number of classes, or None for regression.
        seed: Of the solver, which visits the examples in random order.

    Returns:
        Probabilities (examples, n_classes), or numbers (examples,).
    """
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=WORD)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:  # of an empty vocabulary
        print("ngrams: no word in the training texts; it predicts the majority class", flush=True)
        return constant_scores(targets, len(eval_texts), n_classes)
    grid = RIDGE_GRID if n_classes is None else NGRAM_GRID
    examples = LabeledDataset(texts, None, targets, None if n_classes is None else range(n_classes))
    totals = dict.fromkeys(grid, 0.0)
    for train_idx, eval_idx in validation_splits(examples):
        split = (counts[train_idx], targets[train_idx], counts[eval_idx])
        for choice, scores in ngram_scores(*split, n_classes, grid, seed).items():
            totals[choice] += goodness(targets[eval_idx], scores)
    best = max(totals, key=totals.get)
    eval_counts = vectorizer.transform(eval_texts)
    return ngram_scores(counts, targets, eval_counts, n_classes, (best,), seed)[best]


def goodness(targets: np.ndarray, scores: np.ndarray) -> float:
    """Accuracy, or for numbers the negative mean squared error."""
    if scores.ndim == 2:
        return float(np.mean(scores.argmax(1) == targets))
    return -float(np.mean((scores - targets) ** 2))


def constant_scores(targets: np.ndarray, n_examples: int, n_classes: int | None) -> np.ndarray:
    """The class frequencies, or the mean number, for every example."""
    if n_classes is None:
        return np.full(n_examples, targets.mean())
    return np.tile(np.bincount(targets, minlength=n_classes) / len(targets), (n_examples, 1))


def ngram_scores(
    counts: csr_matrix,
    targets: np.ndarray,
    eval_counts: csr_matrix,
    n_classes: int | None,
    grid: Sequence[tuple[str, float]],
    seed: int,
) -> Scores:
    """The scores of each (variant, C) of the grid, fitted on counts (examples, n-grams)."""
    seen = np.flatnonzero(counts.getnnz(axis=0))  # a split does not know the n-grams of others
    if len(seen) == 0 or len(np.unique(targets)) == 1:
        constant = constant_scores(targets, eval_counts.shape[0], n_classes)
        return dict.fromkeys(grid, constant)
    inputs = (counts[:, seen], targets, eval_counts[:, seen], n_classes)
    nbsvm_grid = [c for variant, c in grid if variant == "nbsvm"]
    tfidf_grid = [(variant, c) for variant, c in grid if variant != "nbsvm"]
    scores = tfidf_scores(*inputs, tfidf_grid, seed) if tfidf_grid else {}
    return scores | (nbsvm_scores(*inputs, nbsvm_grid, seed) if nbsvm_grid else {})


def tfidf_scores(
    counts: csr_matrix,
    targets: np.ndarray,
    eval_counts: csr_matrix,
    n_classes: int | None,
    grid: Sequence[tuple[str, float]],
    seed: int,
) -> Scores:
    """Logistic regression of one class against the rest on TF-IDF; ridge regression for numbers."""
    tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
    features = tfidf.transform(counts)
    eval_features = tfidf.transform(eval_counts)
    scores = {}
    for variant, c in grid:
        if variant == "ridge":
            model = Ridge(alpha=1 / c).fit(features, targets)
            scores[variant, c] = model.predict(eval_features)
        else:
            model = OneVsRestClassifier(sparse_logistic_regression(c, seed)).fit(features, targets)
            scores[variant, c] = np.zeros((eval_counts.shape[0], n_classes))
            scores[variant, c][:, model.classes_] = model.predict_proba(eval_features)
    return scores


def nbsvm_scores(
    counts: csr_matrix,
    targets: np.ndarray,
    eval_counts: csr_matrix,
    n_classes: int,
    strengths: Sequence[float],
    seed: int,
) -> Scores:
    """NB-SVM (Wang & Manning 2012, section 2.3) of one class against the rest, for each C.

    With f the binarized counts, p = 1 + (sum of f over the class) and q = 1 + (sum over the rest),
    the features are f * r with the log-count ratio r = log((p / |p|) / (q / |q|)).
    """
    present = (counts > 0).astype(np.float64)
    eval_present = (eval_counts > 0).astype(np.float64)
    totals = np.asarray(present.sum(axis=0)).ravel()
    classes = np.unique(targets)
    scores = {("nbsvm", c): np.zeros((eval_counts.shape[0], n_classes)) for c in strengths}
    for k in classes[1:] if len(classes) == 2 else classes:
        is_class = targets == k
        of_class = np.asarray(present[is_class].sum(axis=0)).ravel()
        p = 1 + of_class
        q = 1 + totals - of_class
        ratio = np.log(p / p.sum()) - np.log(q / q.sum())
        features = present.multiply(ratio).tocsr()
        eval_features = eval_present.multiply(ratio).tocsr()
        for c in strengths:
            model = sparse_logistic_regression(c, seed).fit(features, is_class)
            scores["nbsvm", c][:, k] = model.predict_proba(eval_features)[:, 1]
    for probabilities in scores.values():
        if len(classes) == 2:
            probabilities[:, classes[0]] = 1 - probabilities[:, classes[1]]
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return scores


def sparse_logistic_regression(c: float, seed: int) -> LogisticRegression:
    """Dual coordinate descent: the fastest solver for more n-grams than examples."""
    return LogisticRegression(C=c, solver="liblinear", dual=True, random_state=seed, max_iter=1000)


# ------------------------------------------------------ words, latent semantics, frozen features


def fit_linear(
    features: Any, targets: np.ndarray, is_classification: bool, c: float
) -> LogisticRegression | Ridge:
    """Logistic regression, or for numbers ridge regression, with inverse regularization c."""
    model = LogisticRegression(C=c, max_iter=2000) if is_classification else Ridge(alpha=1 / c)
    return model.fit(features, targets)


def fit_head(
    model: Classifier, features: np.ndarray, targets: np.ndarray, is_classification: bool
) -> None:
    """Set the last layer of a classifier to a linear fit on features (S, d_model)."""
    fitted = fit_linear(features, targets, is_classification, HEAD_C)
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


def linear_scores(
    features: Any, targets: np.ndarray, eval_features: Any, n_classes: int | None, c: float
) -> np.ndarray:
    """Fit on features (examples, width) and score others; an absent class has probability 0."""
    model = fit_linear(features, targets, n_classes is not None, c)
    if n_classes is None:
        return model.predict(eval_features)
    scores = np.zeros((eval_features.shape[0], n_classes))
    scores[:, model.classes_] = model.predict_proba(eval_features)
    return scores


def linear_fits(
    features: Any,
    targets: np.ndarray,
    eval_features: Any,
    n_classes: int | None,
    grid: Sequence[tuple[float]],
) -> Scores:
    """The scores of a linear model for each (C,) of the grid."""
    return {(c,): linear_scores(features, targets, eval_features, n_classes, c) for (c,) in grid}


def bag_of_words(
    texts: list[str],
    targets: np.ndarray,
    eval_texts: list[str],
    n_classes: int | None,
    grid: Sequence[tuple[float]],
) -> Scores:
    """TF-IDF of the words of these texts alone, then a linear model for each (C,) of the grid."""
    tfidf = TfidfVectorizer(sublinear_tf=True)
    features = tfidf.fit_transform(texts)
    return linear_fits(features, targets, tfidf.transform(eval_texts), n_classes, grid)


def lsa(
    vectors: np.ndarray,
    targets: np.ndarray,
    eval_vectors: np.ndarray,
    n_classes: int | None,
    grid: Sequence[tuple[int, float]],
) -> Scores:
    """A linear model for each (width, C) of the grid, on the first components of document vectors.

    Args:
        vectors: (examples, components), as `document_vectors` returns them.
    """
    scores = {}
    for width, c in grid:
        features = normalize(vectors[:, :width])
        eval_features = normalize(eval_vectors[:, :width])
        scores[width, c] = linear_scores(features, targets, eval_features, n_classes, c)
    return scores


def document_vectors(
    texts: list[str], labelled: list[str], pretrained: Path, seed: int
) -> tuple[np.ndarray, str]:
    """Latent semantic analysis: TF-IDF and its truncated SVD, fitted on unlabelled text.

    Args:
        texts: The texts to embed.
        labelled: The texts to fit on if the text of the pretraining is not in the cache.
        pretrained: The folder of the pretrained model, whose metrics.json names this text.
        seed: Of the sample of this text.

    Returns:
        The vectors (texts, components), and the name of what the SVD was fitted on.
    """
    run = pretrained / "metrics.json"
    with model_folder.reading(run):
        cache = run.is_file() and CACHE / json.loads(run.read_text()).get("tokens_folder", "none")
    if cache and cache.is_dir():
        corpus = Corpus(cache, max_len=256, micro_batch_tokens=1, seed=0)
        tfidf, svd = fit_latent_semantics(tuple(corpus.sample_texts(LSA_WINDOWS, seed)))
        name = "the unlabelled text of pretraining"
    else:
        tfidf, svd = fit_latent_semantics(tuple(labelled))
        name = "the training texts"
    return svd.transform(tfidf.transform(texts)), name


@functools.lru_cache(1)  # an experiment embeds many samples of labels in one space
def fit_latent_semantics(texts: tuple[str, ...]) -> tuple[TfidfVectorizer, TruncatedSVD]:
    """TF-IDF of the texts, and its SVD with as many components as the widest choice has."""
    min_df = 2 if len(texts) > 1000 else 1
    # the SVD in float64 takes longer and gives the same accuracies
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=min_df, dtype=np.float32)
    features = tfidf.fit_transform(texts)
    width = min(max(LSA_WIDTHS), min(features.shape) - 1)
    return tfidf, TruncatedSVD(width, random_state=0).fit(features)
