"""The last layer of a classifier: fitted before fine-tuning, and rescaled after it for numbers.

Axes: S examples.
"""

import numpy as np
import torch
from torch import nn

from analysis.baselines import linear_model
from analysis.evaluation import forward_all
from labels import LabeledDataset
from model import Classifier


def standardize(
    targets: list[np.ndarray], train: LabeledDataset
) -> tuple[list[np.ndarray], float, float]:
    """Numbers with mean 0 and deviation 1, and what both were; targets of classes do not change."""
    if train.names:
        return targets, 0.0, 1.0
    mean = float(train.targets.mean(dtype=float))
    scale = float(train.targets.std(dtype=float)) or 1.0  # equal numbers have none
    return [(target - mean) / scale for target in targets], mean, scale


def restore_unit(model: Classifier, mean: float, scale: float) -> None:
    """Let a model that learned standardized numbers predict them in their own unit."""
    model.classifier.weight.data *= scale
    model.classifier.bias.data = model.classifier.bias.data * scale + mean


def fit_last_layer(
    model: Classifier,
    rows: list[np.ndarray],
    targets: list[np.ndarray],
    c: float,
    autocast: torch.autocast,
) -> None:
    """Fit the last layer, with inverse regularization strength c: a random one would distort good
    features (Kumar et al. 2022). Rows and targets are those of `files.examples.encode_examples`."""
    features = forward_all(model, rows, np.arange(len(rows)), autocast, model.features)
    fit = fit_classes_or_numbers if model.threshold is None else fit_labels
    fit(model.classifier, features, np.concatenate(targets), c)


def fit_classes_or_numbers(
    layer: nn.Linear, features: np.ndarray, targets: np.ndarray, c: float
) -> None:
    """Set the layer to logistic regression, or for numbers to ridge regression."""
    is_classification = np.issubdtype(targets.dtype, np.integer)
    layer.weight.data.zero_()
    layer.bias.data.fill_(-10.0)  # of a class without examples
    present = np.unique(targets) if is_classification else [0]
    if is_classification and len(present) == 1:
        layer.bias.data[present] = 0.0
        return
    fitted = linear_model(is_classification, c).fit(features, targets)
    weight = np.atleast_2d(fitted.coef_)
    bias = np.atleast_1d(fitted.intercept_)
    if is_classification and len(weight) == 1:  # of the second of two classes
        weight = np.concatenate((-weight / 2, weight / 2))
        bias = np.concatenate((-bias / 2, bias / 2))
    layer.weight.data[present] = torch.from_numpy(weight).to(layer.weight)
    layer.bias.data[present] = torch.from_numpy(bias).to(layer.bias)


def fit_labels(layer: nn.Linear, features: np.ndarray, targets: np.ndarray, c: float) -> None:
    """Set the layer to one logistic regression per label; targets (S, labels)."""
    layer.weight.data.zero_()
    for label, is_label in enumerate(targets.T):
        layer.bias.data[label] = 10.0 if is_label.all() else -10.0
        if 0 < is_label.mean() < 1:
            fitted = linear_model(True, c).fit(features, is_label)
            layer.weight.data[label] = torch.from_numpy(fitted.coef_[0]).to(layer.weight)
            layer.bias.data[label] = float(fitted.intercept_[0])
