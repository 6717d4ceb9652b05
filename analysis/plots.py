"""The figures of all scripts, in one style: the colours of Okabe & Ito, which colour-blind readers
can tell apart, and a different marker for each line."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.statistics import Estimate
from files.disk import first_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
MARKERS = "osD^vP*X"


@contextlib.contextmanager
def new_figure(
    path: Path, n_panels: int = 1, width: float = 6.0, height: float = 4.0
) -> Iterator[np.ndarray]:
    """The axes of a figure's panels, which is saved when the block ends.

    Figures come after the results: one that cannot be drawn costs a warning, not the run.

    Args:
        width, height: of one panel, in inches.
    """
    figure = Figure(figsize=(width * n_panels, height), dpi=120, layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    try:
        yield panels
        figure.savefig(path)
    except Exception as error:  # fonts, file systems and values each fail in their own way
        print(f"warning: {path} was not drawn: {first_line(error)}", file=sys.stderr)


# ------------------------------------------------------------ train.py, finetune.py and bench.py


def loss_curve(points: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss of the points of metrics.jsonl."""
    with new_figure(path, width=7) as (axes,):
        for key, label in (("loss", "training"), ("validation_loss", "validation (15% masked)")):
            measured = [point for point in points if key in point]
            steps = [point["step"] for point in measured]
            axes.plot(steps, [point[key] for point in measured], label=label)
        axes.set(xlabel="step", ylabel="loss per masked token (nats)")
        axes.legend()


def confusion(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix of a classifier; numbers are shown for up to 20 classes."""
    # this import takes a second, which train.py can do without
    from sklearn.metrics import ConfusionMatrixDisplay

    size = max(4.0, 0.5 * len(names) + 2)
    with new_figure(path, width=size, height=size) as (axes,):
        axes.grid(False)
        options = {"xticks_rotation": "vertical", "colorbar": False}
        options["include_values"] = len(names) <= 20
        ConfusionMatrixDisplay(matrix, display_labels=names).plot(ax=axes, **options)


def speeds(result: dict[str, Any], path: Path) -> None:
    """Tokens per second of each implementation, one panel per shape."""
    shapes = result["steps"]
    with new_figure(path, len(shapes), width=7) as panels:
        for axes, (shape, measured) in zip(panels, shapes.items(), strict=True):
            names = list(measured["tokens_per_second"])
            low, median, high = np.array(list(measured["tokens_per_second"].values())).T
            axes.barh(names, median, xerr=(median - low, high - median))
            axes.set(title=f"{shape}, {result['dtype']}", xlabel="tokens per second")
            axes.invert_yaxis()


# ------------------------------------------------------------------------------------ analyze.py


def plot_estimates(axes: Axes, curves: dict[str, dict[int, Estimate]]) -> None:
    """Lines of means {label: {x: estimate}} inside bands of their intervals."""
    styles = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
    for (label, points), (colour, marker) in zip(curves.items(), styles, strict=False):
        x = list(points)
        mean, low, high = np.array([dataclasses.astuple(e) for e in points.values()]).T
        axes.plot(x, mean, label=label, color=colour, marker=marker, markersize=5)
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.legend(frameon=False)


def learning_curves(curves: dict[str, dict[int, Estimate]], metric: str, out: Path) -> None:
    """OUT/curves.png: a metric on the test set against the number of labels."""
    with new_figure(out / "curves.png") as (axes,):
        plot_estimates(axes, curves)
        budgets = sorted({budget for points in curves.values() for budget in points})
        axes.set(xscale="log", xlabel="labels", ylabel=f"{metric} on the test set")
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.minorticks_off()


def snapshots(
    losses: dict[int, float], estimates: dict[str, dict[int, Estimate]], metric: str, out: Path
) -> None:
    """OUT/snapshots.png: the validation loss {step: loss} of a pretraining run, and the scores
    {step: {number of labels: estimate}} of its snapshots."""
    with new_figure(out / "snapshots.png", n_panels=2) as (left, right):
        left.plot(list(losses), list(losses.values()), color="black", marker="o")
        left.set(xlabel="step of pretraining", ylabel="validation loss (nats)")
        curves: dict[str, dict[int, Estimate]] = {}
        for step, cells in estimates.items():
            for n, estimate in cells.items():
                curves.setdefault(f"{n:,} labels", {})[int(step)] = estimate
        plot_estimates(right, curves)
        right.set(xlabel="step of pretraining", ylabel=f"{metric} of frozen")
