"""Examples with several labels each: the threshold and the metrics.

Axes: S examples, L labels.
"""

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve

from analysis.baselines import concatenate
from files.entities import TaggedDataset
from files.examples import Dataset
from labels import HOLD_OUT, cross_validation_splits


def hold_out(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset, int]:
    """Of several labels, move the last tenth of the training examples before the test examples: the
    threshold is chosen on them. Returns both, and how many were moved."""
    if isinstance(train, TaggedDataset) or not train.is_multilabel:
        return train, test, 0
    [(train_idx, held_out_idx)] = cross_validation_splits(train, 1, HOLD_OUT)
    return train[train_idx], concatenate(train[held_out_idx], test), len(held_out_idx)


def choose_threshold(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """The probability from which on a label is predicted: that of the best micro F1."""
    if not targets.any():
        return 0.5
    precision, recall, thresholds = precision_recall_curve(targets.ravel(), probabilities.ravel())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def measure(targets: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    """F1 over all decisions and as a mean over the labels, and the mean over the labels that occur
    of the average precision, which needs no threshold. All are (S, L)."""
    decisions = probabilities >= threshold
    occurs = targets.any(axis=0)
    precision = average_precision_score(targets[:, occurs], probabilities[:, occurs])
    return {
        "micro_f1": float(f1_score(targets, decisions, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(targets, decisions, average="macro", zero_division=0)),
        "mean_average_precision": float(precision),
        "threshold": threshold,
    }
