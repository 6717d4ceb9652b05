"""Examples with several labels each: the threshold, the metrics, and a linear layer.

Axes: S examples, L labels.
"""

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import nn

from analysis.baselines import concatenate, linear_model
from files.entities import TaggedDataset
from labels import HOLD_OUT, LabeledDataset, cross_validation_splits

Dataset = LabeledDataset | TaggedDataset


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


def fit_layer(layer: nn.Linear, features: np.ndarray, targets: np.ndarray, c: float) -> None:
    """Set a linear layer to one logistic regression per label on features (S, d_model), of inverse
    regularization strength c."""
    layer.weight.data.zero_()
    for label, is_label in enumerate(targets.T):
        layer.bias.data[label] = 10.0 if is_label.all() else -10.0
        if 0 < is_label.mean() < 1:
            fitted = linear_model(True, c).fit(features, is_label)
            layer.weight.data[label] = torch.from_numpy(fitted.coef_[0]).to(layer.weight)
            layer.bias.data[label] = float(fitted.intercept_[0])
