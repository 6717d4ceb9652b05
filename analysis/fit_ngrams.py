"""Fit the n-gram model that stands beside a fine-tuned network (files/ngrams.py).

The sum of the log-odds of both is a product of experts (Hinton 2002, section 2) without weights to
choose: with few labels the regularization that the labels choose keeps the n-gram model silent.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from analysis.baselines import fit_and_score, nb_svm
from files.ngrams import N_BUCKETS, NgramModel, find_ngrams
from labels import LabeledDataset, batches, validation_splits

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularization C
LEAST_PROBABILITY = 1e-4  # what a class that a split has no example of costs
BATCH_SIZE = 256


def add_ngrams(
    out: Path,
    rows: list[np.ndarray],
    train: LabeledDataset,
    eval_rows: list[np.ndarray],
    probabilities: Tensor,
    seed: int,
) -> Tensor:
    """Fit an n-gram model on the training examples, save it in `out`, and add it to a network.

    Args:
        rows, eval_rows: (tokens, 2) of each example, as `labels.encode` returns them.
        probabilities: (examples, classes) of the network for the examples of `eval_rows`.

    Returns:
        The probabilities of both together.
    """
    model = fit_ngrams(rows, train, seed)
    model.save(out)
    everything = np.arange(len(eval_rows))
    parts = []
    for indices, (ids, cu_seqlens, *_) in batches(eval_rows, everything, BATCH_SIZE):
        parts.append(model(ids, cu_seqlens)[: len(indices)])
    return (probabilities.log() + torch.cat(parts)).softmax(1)


def fit_ngrams(rows: list[np.ndarray], train: LabeledDataset, seed: int) -> NgramModel:
    """NB-SVM with the C of the least log loss on the splits.

    The log loss, and not the accuracy, because the log-odds are added to those of another model.
    With C it falls and then rises. The search ends where it rises, because with many classes a fit
    takes a minute, and longer for larger C.
    """
    n_classes = len(train.names)
    if len(np.unique(train.targets)) == 1:  # nothing to tell apart: the network decides alone
        bucket, weight = torch.zeros(1, dtype=torch.int64), torch.zeros(1, n_classes)
        return NgramModel(bucket, weight, bias=torch.zeros(n_classes))
    features = ngram_features(rows)
    splits = validation_splits(train)
    losses: dict[float, float] = {}
    for c in STRENGTHS:
        losses[c] = 0.0
        for train_idx, eval_idx in splits:
            scores = fit_and_score(nb_svm(c, seed), features, train, train_idx, eval_idx)
            of_targets = scores[np.arange(len(eval_idx)), train.targets[eval_idx]]
            losses[c] -= float(np.log(of_targets.clip(LEAST_PROBABILITY)).mean())
        if losses[c] > min(losses.values()):
            break
    best = min(losses, key=losses.get)

    buckets = np.flatnonzero(features.getnnz(axis=0))
    fitted = nb_svm(best, seed).fit(features[:, buckets], train.targets)
    weight = np.zeros((len(buckets), n_classes), dtype=np.float32)
    bias = np.full(n_classes, -10.0, dtype=np.float32)  # of a class without examples
    # of two classes scikit-learn fits the second one
    classes = fitted.classes_[1:] if len(fitted.classes_) == 2 else fitted.classes_
    for k, (ratio, logistic) in zip(classes, fitted.estimators_, strict=True):
        weight[:, k] = logistic.coef_[0] * np.asarray(ratio.ratio).ravel()
        bias[k] = logistic.intercept_[0]
    if len(classes) == 1:
        weight[:, fitted.classes_[0]] = -weight[:, classes[0]]
        bias[fitted.classes_[0]] = -bias[classes[0]]
    return NgramModel(*map(torch.from_numpy, (buckets, weight, bias)))


def ngram_features(rows: list[np.ndarray]) -> csr_matrix:
    """Which n-grams each example contains, (examples, N_BUCKETS)."""
    examples = []
    buckets = []
    for indices, (ids, cu_seqlens, *_) in batches(rows, np.arange(len(rows)), BATCH_SIZE):
        ngrams = find_ngrams(ids, cu_seqlens)
        keys = ngrams.key.unique()
        keys = keys[keys < len(indices) * N_BUCKETS].numpy()  # without the filler sequences
        examples.append(indices[keys // N_BUCKETS])
        buckets.append(keys % N_BUCKETS)
    positions = (np.concatenate(examples), np.concatenate(buckets))
    ones = np.ones(len(positions[0]))
    return csr_matrix((ones, positions), shape=(len(rows), N_BUCKETS))
