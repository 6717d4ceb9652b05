"""What stands beside a fine-tuned network: linear fits on counts, on latent semantics, on frozen features.

Each answers a choice's question: {choice: scores of the unseen examples}, scores being the probabilities of
the classes, (examples, n_classes), or numbers, (examples,), where n_classes is None.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import normalize

from data import CACHE, Corpus

LSA_WIDTHS = (100, 256, 512)
LSA_WINDOWS = 50_000

Fit = dict[Any, np.ndarray]  # choice: scores


def linear(features: Any, targets: np.ndarray, is_classes: bool, c: float) -> LogisticRegression | Ridge:
    """Logistic regression, or for numbers ridge regression, of inverse strength c."""
    estimator = LogisticRegression(C=c, max_iter=2000) if is_classes else Ridge(alpha=1 / c)
    return estimator.fit(features, targets)


def linear_scores(
    features: Any, targets: np.ndarray, unseen: Any, n_classes: int | None, c: float
) -> np.ndarray:
    """A class that the targets lack has probability 0."""
    fitted = linear(features, targets, n_classes is not None, c)
    if n_classes is None:
        return fitted.predict(unseen)
    scores = np.zeros((unseen.shape[0], n_classes))
    scores[:, fitted.classes_] = fitted.predict_proba(unseen)
    return scores


def linear_fits(
    features: Any, targets: np.ndarray, unseen: Any, n_classes: int | None, grid: Sequence[tuple[float]]
) -> Fit:
    """Of each C of the grid: what bag of words and frozen features end in."""
    return {(c,): linear_scores(features, targets, unseen, n_classes, c) for (c,) in grid}


def bag_of_words(
    texts: list[str],
    targets: np.ndarray,
    unseen: list[str],
    n_classes: int | None,
    grid: Sequence[tuple[float]],
) -> Fit:
    """TF-IDF, fitted on these texts alone."""
    tfidf = TfidfVectorizer(sublinear_tf=True)
    return linear_fits(tfidf.fit_transform(texts), targets, tfidf.transform(unseen), n_classes, grid)


def fit_latent_semantics(unlabelled: list[str]) -> tuple[TfidfVectorizer, TruncatedSVD]:
    """TF-IDF, and its SVD in the widest width."""
    min_df = 2 if len(unlabelled) > 1000 else 1
    # the SVD in float64 takes longer and gives the same accuracies
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=min_df, dtype=np.float32)
    counts = tfidf.fit_transform(unlabelled)
    width = min(max(LSA_WIDTHS), min(counts.shape) - 1)
    return tfidf, TruncatedSVD(width, random_state=0).fit(counts)


def open_corpus(tokens_folder: Path) -> Corpus:
    return Corpus(tokens_folder, max_len=256, row_tokens=1, seed=0)


@functools.lru_cache(1)  # analyze.py asks for the same one again and again, half a minute each
def corpus_semantics(tokens_folder: Path, seed: int) -> tuple[TfidfVectorizer, TruncatedSVD]:
    """Fitted on windows drawn with the seed."""
    corpus = open_corpus(tokens_folder)
    chosen = np.random.default_rng([seed, 4]).permutation(len(corpus.train.start))[:LSA_WINDOWS]
    windows = corpus.train[np.sort(chosen)]
    spans = zip(windows.start.tolist(), (windows.start + windows.length).tolist(), strict=True)
    texts = corpus.tokenizer.decode_batch([corpus.tokens[first:last].tolist() for first, last in spans])
    return fit_latent_semantics(texts)


def document_vectors(
    texts: list[str], labelled: list[str], model_folder: Path, seed: int
) -> tuple[np.ndarray, str]:
    """The vectors of `texts` in the space of the text that pretraining saw, whose token cache the run's
    folder names, or, where there is none, of the labelled texts; and a name for it."""
    run = model_folder / "metrics.json"
    with model_folder.reading(run):
        cache = run.is_file() and CACHE / json.loads(run.read_text()).get("tokens_folder", "none")
    if cache and cache.is_dir():
        takes_all = len(open_corpus(cache).train.start) <= LSA_WINDOWS  # whatever the seed
        tfidf, svd = corpus_semantics(cache, 0 if takes_all else seed)
        name = "the unlabelled text of pretraining"
    else:
        (tfidf, svd), name = fit_latent_semantics(labelled), "the training texts"
    return svd.transform(tfidf.transform(texts)), name


def lsa(
    vectors: np.ndarray,
    targets: np.ndarray,
    unseen: np.ndarray,
    n_classes: int | None,
    grid: Sequence[tuple[int, float]],
) -> Fit:
    """On the first components of document vectors, made of unit length."""
    fit = {}
    for width, c in grid:
        features, tested = normalize(vectors[:, :width]), normalize(unseen[:, :width])
        fit[width, c] = linear_scores(features, targets, tested, n_classes, c)
    return fit
