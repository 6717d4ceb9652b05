"""Evaluation: what a network predicts for many examples, and the metrics of predictions.

Axes: S sequences (examples) of a batch, T tokens of a batch.
"""

import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn

from analysis import multilabel, plots
from analysis.baselines import constant_scores
from files import entities
from files.disk import to_json, write_file
from files.entities import OUTSIDE, TaggedDataset
from files.examples import Dataset
from labels import batches
from model import Classifier, Tagger

BATCH_SIZE = 64


@torch.no_grad()
def forward_all(
    model: nn.Module,
    rows: list[np.ndarray],
    indices: np.ndarray,
    autocast: AbstractContextManager,
    function: Callable,
) -> np.ndarray:
    """Apply a function of the model, which is left in evaluation mode, to many examples.

    Args:
        rows: (tokens, 2) of each example, as `labels.encode` returns them.
        function: (ids, cu_seqlens, max_seqlen, token_types) to (S, ...); of a Tagger to (T, ...).

    Returns:
        (examples, ...) float32 in the order of `indices`; of a Tagger (tokens of all these
        examples, ...).
    """
    model.eval()
    device = next(model.parameters()).device
    by_length = indices[np.argsort([len(rows[i]) for i in indices], kind="stable")]
    outputs = {}
    for members, inputs in batches(rows, by_length, BATCH_SIZE, device):
        with autocast:
            output = function(*inputs).float().cpu().numpy()
        ends = np.cumsum([len(rows[i]) if isinstance(model, Tagger) else 1 for i in members])
        outputs.update(zip(members.tolist(), np.split(output, ends), strict=False))
    return np.concatenate([outputs[i] for i in indices.tolist()])


@torch.no_grad()
def predict(
    model: Classifier | Tagger,
    rows: list[np.ndarray],
    first_pieces: list[np.ndarray] | None,
    names: list[str] | None,
    autocast: torch.autocast,
) -> Any:
    """What a fine-tuned network predicts.

    Args:
        rows: (tokens, 2) of each example, as `labels.encode` returns them.
        first_pieces: For a tagger, (words,) of each example: where its words begin in its row.
        names: The class names or tags; None for regression.
        autocast: The precision of the features; the last layer of a classifier is in float32.

    Returns:
        Tensors on the CPU of probabilities (examples, classes) or numbers (examples,); of a tagger
        a list of the tags of each example.
    """
    everything = np.arange(len(rows))
    if isinstance(model, Tagger):
        token_tags = forward_all(model, rows, everything, autocast, model).argmax(1)
        row_ends = np.cumsum([len(row) for row in rows])
        examples = zip(np.split(token_tags, row_ends[:-1]), first_pieces, strict=True)
        return [entities.word_tags(tags, first, names) for tags, first in examples]
    features = forward_all(model, rows, everything, autocast, model.features)
    states = torch.from_numpy(features).to(model.classifier.weight.device)
    logits = model.classifier(states).cpu()
    return logits[:, 0] if names is None else model.probabilities(logits)


def measure(targets: Any, predictions: Any, n_held_out: int = 0) -> dict[str, float]:
    """The metrics of predictions.

    Args:
        n_held_out: The first examples, of several labels, on which their threshold is chosen.

    Returns:
        "accuracy", "macro_f1", "matthews_correlation" and, of two classes, the "f1" of the second,
        of probabilities (examples, classes); of numbers (examples,) "rmse", and the correlation
        coefficients "pearson" and "spearmanr"; "f1", "precision" and "recall" of entities, if
        targets and predictions are lists of tags; of several labels see analysis/multilabel.py.
        GLUE and `evaluate` use these names.
    """
    if isinstance(predictions, list):
        return entities.entity_f1(targets, predictions)
    predictions = np.asarray(predictions)
    if targets.ndim == 2:
        threshold = multilabel.choose_threshold(targets[:n_held_out], predictions[:n_held_out])
        return multilabel.measure(targets[n_held_out:], predictions[n_held_out:], threshold)
    if predictions.ndim == 2:
        classes = predictions.argmax(1)
        varies = np.ptp(np.append(targets, classes)) > 0  # one class has no correlation
        metrics = {
            "accuracy": np.mean(targets == classes),
            "macro_f1": f1_score(targets, classes, average="macro"),
            "matthews_correlation": matthews_corrcoef(targets, classes) if varies else 0.0,
        }
        if predictions.shape[1] == 2:  # `labels`: perhaps neither has the second class
            metrics["f1"] = f1_score(targets, classes, labels=[1], average="macro", zero_division=0)
        return {name: float(value) for name, value in metrics.items()}
    rmse = float(np.sqrt(np.mean((targets.astype(float) - predictions) ** 2)))
    varies = np.ptp(predictions) > 0 and np.ptp(targets) > 0  # a constant has no correlation
    pearson = float(stats.pearsonr(targets, predictions).statistic) if varies else 0.0
    spearman = float(stats.spearmanr(targets, predictions).statistic) if varies else 0.0
    return {"rmse": rmse, "pearson": pearson, "spearmanr": spearman}


def print_summary(about: dict[str, Any], n_epochs: int, max_len: int) -> None:
    """Print what is going to be trained on."""
    sizes = f"{about['n_train']:,} training and {about['n_test']:,} test examples"
    print(f"{sizes}; {n_epochs} epochs; matrix multiplications in {about['dtype']}", flush=True)
    if about["n_cut"]:
        print(f"{about['n_cut']:,} examples were cut to {max_len} tokens", flush=True)


def report(
    method: str, test: Dataset, predictions: Any, start_time: float, n_held_out: int
) -> dict[str, Any]:
    """Measure the predictions of a method, print a line, and return the metrics and seconds.

    Each part of the test set, where it has several, is measured too, under its name.
    """
    metrics = measure(test.targets, predictions, n_held_out)
    seconds = time.time() - start_time
    print(f"{method:<17} {to_line(metrics)}  {seconds:4.0f} s", flush=True)
    parts = getattr(test, "parts", None)
    for part in [] if parts is None else np.unique(parts).tolist():
        in_part = parts == part
        metrics[part] = measure(test.targets[in_part], np.asarray(predictions)[in_part])
        print(f"  {part}: {to_line(metrics[part])}", flush=True)
    return metrics | {"seconds": seconds}


def to_line(metrics: dict[str, float]) -> str:
    """The metrics in one line; metrics.json has more of classes."""
    in_file = ("matthews_correlation", "f1") if "macro_f1" in metrics else ()
    return "  ".join(
        f"{name} {value:.3f}" for name, value in metrics.items() if name not in in_file
    )


def write_results(
    out: Path,
    train: Dataset,
    test: Dataset,
    results: dict[str, dict[str, float]],
    predictions: dict[str, Any],
    about: dict[str, Any],
    draws: bool,
    n_held_out: int = 0,
) -> dict[str, Any]:
    """Write metrics.json and predictions.npz, where tags of sentences are written end to end.

    Args:
        results: The metrics of each method.
        predictions: Its predictions.
        about: More for metrics.json.
        draws: Whether to draw confusion.png, the confusion matrix of the pretrained network.
        n_held_out: The first examples that are no test examples, see `measure`.

    Returns:
        The content of metrics.json.
    """
    test = test[np.arange(n_held_out, len(test))]
    if isinstance(train, TaggedDataset):
        constant = [[OUTSIDE] * len(words) for words in test.words]
    else:
        constant = constant_scores(train, len(test))
    majority = measure(test.targets, constant)
    print(f"{'majority' if train.names else 'mean':<17} {to_line(majority)}", flush=True)
    metrics = {"test": results, "majority": majority, "names": train.names} | about
    arrays = {"targets": test.targets}
    arrays |= {name: values[n_held_out:] for name, values in predictions.items()}
    for name, values in arrays.items():
        arrays[name] = np.concatenate(values) if isinstance(values, list) else np.asarray(values)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_file(out / "predictions.npz", content.getbuffer())
    write_file(out / "metrics.json", to_json(metrics))
    pretrained = arrays.get("pretrained", np.empty(0))
    if draws and pretrained.ndim > arrays["targets"].ndim:
        plots.confusion(test.targets, pretrained.argmax(1), test.names, out / "confusion.png")
    return metrics
