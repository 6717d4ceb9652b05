"""Baselines: linear models of words and word pairs, latent semantics, word vectors, any features.

A method is a function that returns its `fit` and the grid of its choices. `fit(choice, train_idx,
eval_idx)` learns from some examples and scores others. Scores are probabilities (examples,
classes), or for regression the predicted numbers (examples,).
"""

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack, issparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer, pre_tokenizers

from data import Corpus
from files.disk import CACHE, UserError, print_once, read_json, reading
from files.entities import TaggedDataset, most_frequent_tags
from files.sequences import SEPARATOR, reads_items, split_items
from files.tokenizer import NO_SPACES
from labels import LabeledDataset, validation_splits

BASELINES = ("ngrams", "most_frequent")
WITH_NGRAMS = "pretrained+ngrams"
# Inverse regularization strengths C.
NGRAM_GRID = (
    *(("tfidf", 1.0), ("tfidf", 3.0), ("tfidf", 10.0), ("tfidf", 30.0), ("tfidf", 100.0)),
    *(("nbsvm", 0.01), ("nbsvm", 0.1), ("nbsvm", 0.3), ("nbsvm", 1.0), ("nbsvm", 3.0)),
)
RIDGE_GRID = tuple(("ridge", c) for c in (0.1, 0.3, 1.0, 3.0, 10.0))
LSA_WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LSA_GRID = tuple((w, c) for w in LSA_WIDTHS for c in (0.01, 0.1, 1.0, 10.0, 100.0, 1e3))
LSA_WINDOWS = 50_000
SPECTRAL_GRID = tuple((w, c) for w in ("plain", "sif") for c in (0.01, 0.1, 1.0, 10.0, 100.0, 1e3))
SIF = 1e-3  # the word frequency at which SIF halves the weight (Arora et al. 2017, section 4.1)
LONGEST_WORD = 32  # characters
# Characters that are words: of scripts without spaces, half-width kana, and emoji.
UNSPACED = f"{NO_SPACES}\uff66-\uff9f\u2600-\u27bf\U0001f000-\U0001faff"

Fit = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def choose_methods(names: str | None, train: LabeledDataset | TaggedDataset) -> list[str]:
    """What --methods names, by default all; UserError if a method is unknown or comes too soon."""
    is_tagged = isinstance(train, TaggedDataset)
    methods = ["most_frequent" if is_tagged else "ngrams", "random_weights", "pretrained"]
    if not is_tagged and train.has_one_class:
        methods.append(WITH_NGRAMS)
    chosen = names.split(",") if names else methods
    for i, method in enumerate(chosen):
        if method not in methods:
            raise UserError(f"--methods {method}: choose from {','.join(methods)}")
        if method == WITH_NGRAMS and "pretrained" not in chosen[:i]:
            raise UserError(f"--methods {WITH_NGRAMS}: it needs pretrained before it")
    return chosen


def fit_baseline(
    train: LabeledDataset | TaggedDataset,
    test: LabeledDataset | TaggedDataset,
    tokenizer: Tokenizer,
    seed: int,
) -> Any:
    """Fit `ngrams`, or for token labels the most frequent tag of each word.

    Returns:
        A tensor of the scores of the test examples, or a list of the tags of each of them.
    """
    if isinstance(train, TaggedDataset):
        return most_frequent_tags(train, test.words)
    examples = concatenate(train, test)
    fit, grid = ngrams(examples, tokenizer, seed)
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
    if len(grid) == 1:
        return grid[0], math.nan
    scores = dict.fromkeys(grid, 0.0)
    splits = validation_splits(train)
    for train_idx, eval_idx in splits:
        targets = train.targets[eval_idx]
        for choice in grid:
            values = goodness(fit(choice, train_idx, eval_idx), targets)
            scores[choice] += float(values.mean()) / len(splits)
    best = max(grid, key=scores.get)
    return best, scores[best]


def is_on_edge(choice: Any, grid: Sequence) -> bool:
    """Whether a number of the choice is the least or the greatest of its grid, so that a wider grid
    might hold a better one. A choice like ("sif", 10.0) has the grid of "sif"; nothing is below 0.
    """
    if not isinstance(choice, tuple):
        choice, grid = (choice,), [(other,) for other in grid]
    for i, value in enumerate(choice):
        if value and not isinstance(value, str):
            rest = choice[:i] + choice[i + 1 :]
            values = {other[i] for other in grid if other[:i] + other[i + 1 :] == rest}
            if len(values) > 1 and value in (min(values), max(values)):
                return True
    return False


def goodness(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each example, 1 if it is classified correctly, else 0; of a number, minus its squared
    error, and so of the probability of each of several labels (Brier 1950)."""
    has_classes = scores.ndim > targets.ndim
    return scores.argmax(1) == targets if has_classes else -((scores - targets) ** 2)


# ---------------------------------------------------------------------------------- the methods


def ngrams(examples: LabeledDataset, tokenizer: Tokenizer, seed: int) -> tuple[Fit, Sequence]:
    """The better of two linear classifiers of unigrams and bigrams; for numbers, ridge regression.

    One is logistic regression on TF-IDF, the other NB-SVM (Wang & Manning 2012, section 2.3) with
    logistic regression as its classifier, each of one class against the rest.
    """
    counts = count_ngrams(examples.joined_texts(), tokenizer)

    def fit(choice: tuple, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        variant, c = choice
        tfidf = TfidfTransformer(sublinear_tf=True)
        if variant == "tfidf":
            model = make_pipeline(tfidf, OneVsRestClassifier(sparse_logistic(c, seed)))
        elif variant == "nbsvm":
            model = nb_svm(c, seed)
        else:
            model = make_pipeline(tfidf, Ridge(alpha=1 / c))
        return fit_and_score(model, counts, examples, train_idx, eval_idx)

    return fit, NGRAM_GRID if examples.names else RIDGE_GRID


def nb_svm(c: float, seed: int) -> OneVsRestClassifier:
    """NB-SVM (Wang & Manning 2012, section 2.3) of one class against the rest."""
    return OneVsRestClassifier(make_pipeline(LogCountRatio(), sparse_logistic(c, seed)))


def sparse_logistic(c: float, seed: int) -> LogisticRegression:
    """Dual coordinate descent: the fastest solver for more n-grams than examples."""
    return LogisticRegression(C=c, solver="liblinear", dual=True, random_state=seed, max_iter=1000)


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


def lsa(examples: LabeledDataset, corpus: Corpus) -> tuple[Fit, Sequence]:
    """A linear model of the first components of document vectors, whose number is chosen too."""
    model = latent_semantics(corpus)
    texts = examples.joined_texts()
    vectors = model.transform(texts) if model else np.zeros((len(texts), 1))
    grid = [(width, c) for width, c in LSA_GRID if width < 2 * vectors.shape[1]]
    return fit_linear(lambda width: normalize(vectors[:, :width]), examples), grid or LSA_GRID[:1]


@functools.lru_cache(2)
def pretraining_corpus(pretrained: Path, max_len: int = 256) -> Corpus | None:
    """The text that a run of train.py learned from; None where it is not in the cache, of another
    version, or of a single window."""
    path = pretrained / "metrics.json"
    with reading(path):
        metrics = read_json(path)
        folder = CACHE / metrics.get("tokens_folder", "none")
    try:
        corpus = Corpus(folder, max_len, micro_batch_tokens=1, seed=0, mask="even")
    except UserError:
        return None
    return corpus if len(corpus.train) > 1 else None


@functools.lru_cache(1)  # an experiment embeds many draws of labels in one space
def latent_semantics(corpus: Corpus) -> Pipeline | None:
    """TF-IDF of the text of the pretraining, and its SVD as wide as the widest choice; None where
    the text has too few words that repeat.
    """
    texts = corpus.sample_texts(LSA_WINDOWS, seed=0)
    # the SVD in float64 takes longer and gives the same accuracies
    options = {"sublinear_tf": True, "min_df": 2 if len(texts) > 1000 else 1, "dtype": np.float32}
    tfidf = TfidfVectorizer(**options, **count_words(corpus.tokenizer))
    try:
        features = tfidf.fit_transform(texts)
        width = min(max(LSA_WIDTHS), min(features.shape) - 1)
        return make_pipeline(tfidf, TruncatedSVD(width, random_state=0).fit(features))
    except ValueError:
        print_once("lsa: fewer than two texts or words to learn from: it predicts a constant")
        return None


def spectral(examples: LabeledDataset, corpus: Corpus, d_model: int) -> tuple[Fit, Sequence]:
    """A linear model of the mean of the vectors that `train.py` starts from, scaled to length 1.

    The weight of a word is 1 or SIF's a / (a + frequency) (Arora et al. 2017, equation 1).
    """
    vectors = corpus.spectral_embedding(d_model)
    frequencies = corpus.counts / len(corpus.tokens)
    weights = {"plain": np.ones(len(vectors)), "sif": SIF / (SIF + frequencies)}
    texts = examples.joined_texts()
    encodings = corpus.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    features = {}
    for name, weight in weights.items():
        weighted = weight[:, None] * vectors
        sums = [weighted[encoding.ids].sum(0) for encoding in encodings]
        features[name] = normalize(np.stack(sums))
    return fit_linear(features.__getitem__, examples), SPECTRAL_GRID


# ------------------------------------------------------------------------------- what they share


def count_ngrams(texts: list[str], tokenizer: Tokenizer) -> csr_matrix:
    """How often each text has each unigram and bigram, (texts, n-grams).

    Sequences of items that all have the same length also have each item at each position.
    """
    options = count_words(tokenizer)
    try:
        counts = CountVectorizer(ngram_range=(1, 2), **options).fit_transform(texts)
        if not reads_items(tokenizer) or len({text.count(SEPARATOR) for text in texts}) > 1:
            return counts
        positions = [
            SEPARATOR.join(f"{i} {item}" for i, item in enumerate(split_items(text)))
            for text in texts
        ]
        return hstack((counts, CountVectorizer(**options).fit_transform(positions)), "csr")
    except ValueError:
        print_once("ngrams: the texts have no words: it predicts a constant")
        return csr_matrix((len(texts), 0))


def count_words(tokenizer: Tokenizer) -> dict[str, Any]:
    """The options by which the vectorizers of scikit-learn count the words of `split_words`."""
    is_text = not reads_items(tokenizer)
    split = functools.partial(split_words, tokenizer) if is_text else split_items
    return {"tokenizer": split, "token_pattern": None, "lowercase": is_text}


def split_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words into which the tokenizer splits a text before it cuts them into pieces.

    Where words have no spaces, these are characters. Punctuation counts only in texts that have
    nothing else: it would not help the n-grams of sentences.
    """
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    pre_tokenizer = tokenizer.pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    spans = [span for _, span in pre_tokenizer.pre_tokenize_str(text)]
    words = [part for start, end in spans for part in _split_unspaced(text[start:end].strip())]
    return [word for word in words if not _is_punctuation(word)] or words


@functools.lru_cache(2**16)
def _split_unspaced(word: str) -> list[str]:
    pattern = "." if len(word) > LONGEST_WORD else f"[{UNSPACED}]|[^{UNSPACED}]+"
    return re.findall(pattern, word, re.DOTALL)


@functools.lru_cache(2**16)
def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(character).startswith("P") for character in word)


def linear_model(is_classification: bool, c: float) -> LogisticRegression | Ridge:
    """Logistic regression, or for numbers ridge regression, with inverse regularization c."""
    return LogisticRegression(C=c, max_iter=2000) if is_classification else Ridge(alpha=1 / c)


def fit_linear(features_of: Callable[[Any], np.ndarray], examples: LabeledDataset) -> Fit:
    """The `fit` of a linear model, whose choice is (variant of the features, C)."""

    def fit(choice: tuple, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        variant, c = choice
        model = linear_model(examples.names is not None, c)
        return fit_and_score(model, features_of(variant), examples, train_idx, eval_idx)

    return fit


def fit_and_score(
    model: Any,
    features: np.ndarray | csr_matrix,
    examples: LabeledDataset,
    train_idx: np.ndarray,
    eval_idx: np.ndarray,
) -> np.ndarray:
    """Fit a model of scikit-learn on some examples and score others; features (examples, width)."""
    targets = examples.targets[train_idx]
    inputs, eval_inputs = features[train_idx], features[eval_idx]
    if issparse(features):  # the words of other examples are not known
        is_known = inputs.getnnz(axis=0) > 0
        inputs, eval_inputs = inputs[:, is_known], eval_inputs[:, is_known]
    if inputs.shape[1] == 0 or len(np.unique(targets)) == 1:
        return constant_scores(examples[train_idx], len(eval_idx))
    model.fit(inputs, targets)
    if examples.names is None:
        return model.predict(eval_inputs)
    scores = np.zeros((len(eval_idx), len(examples.names)))  # for a class without examples
    scores[:, model.classes_] = model.predict_proba(eval_inputs)
    return scores


def constant_scores(train: LabeledDataset, n_examples: int) -> np.ndarray:
    """The class frequencies, or the mean number, for every example."""
    if train.names is None:
        return np.full(n_examples, train.targets.mean())
    if train.is_multilabel:
        return np.tile(train.targets.mean(0), (n_examples, 1))
    frequencies = np.bincount(train.targets, minlength=len(train.names)) / len(train)
    return np.tile(frequencies, (n_examples, 1))
