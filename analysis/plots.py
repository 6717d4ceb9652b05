"""The figures of all scripts, in one style: the colours of Okabe & Ito, which colour-blind readers
can tell apart, and a different marker for each line."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from analysis.statistics import Estimate
from files.disk import first_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
MARKERS = list("osD^vP*X")
MOST_CLASSES = 50  # of a confusion matrix, which is 27 inches wide then


def draw(path: Path, plot: Callable[[Any], None], width: float = 6.0, height: float = 4.0) -> None:
    """Save a figure of this size in inches, whose axes `plot` draws on.

    Figures come after the results: one that cannot be drawn costs a warning, not the run.
    """
    try:
        # the import takes a second, and fails where a setting of matplotlib is broken
        import matplotlib
        from matplotlib.figure import Figure

        with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
            warnings.simplefilter("ignore")  # characters that the font lacks become boxes
            figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
            plot(axes)
            figure.savefig(path)
    except Exception as error:  # fonts, file systems and values each fail in their own way
        print(f"warning: {path} was not drawn: {first_line(error)}", file=sys.stderr)


def loss_curve(points: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss of the points of metrics.jsonl."""

    def plot(axes) -> None:
        for key, label in (("loss", "training"), ("validation_loss", "validation (15% masked)")):
            measured = [point for point in points if key in point]
            steps = [point["step"] for point in measured]
            axes.plot(steps, [point[key] for point in measured], label=label)
        axes.set(xlabel="step", ylabel="loss per masked token (nats)")
        axes.legend()

    draw(path, plot, width=7)


def confusion(targets: np.ndarray, classes: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix of a classifier; numbers are shown for up to 20 classes."""

    def plot(axes) -> None:
        if len(names) > MOST_CLASSES:
            raise ValueError(f"{len(names):,} classes are more than {MOST_CLASSES}")
        from sklearn.metrics import ConfusionMatrixDisplay

        axes.grid(False)
        ticks = [" ".join(name[:30].split()) for name in names]
        options = {"labels": range(len(names)), "display_labels": ticks, "colorbar": False}
        options |= {"xticks_rotation": "vertical", "include_values": len(names) <= 20}
        ConfusionMatrixDisplay.from_predictions(targets, classes, ax=axes, **options)

    size = max(4.0, 0.5 * len(names) + 2)
    draw(path, plot, size, size)


def learning_curves(curves: dict[str, dict[int, Estimate]], metric: str, path: Path) -> None:
    """Lines of a metric on the test set against the number of labels, in bands of their intervals.

    Args:
        curves: {method: {number of labels: estimate}}.
    """

    def plot(axes) -> None:
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS)
        for method, points in curves.items():
            budgets = list(points)
            mean, low, high = np.array(list(points.values())).T
            (line,) = axes.plot(budgets, mean, label=method, markersize=5)
            axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.13, linewidth=0)
        axes.legend(frameon=False)
        budgets = sorted({n for points in curves.values() for n in points})
        axes.set(xscale="log", xlabel="labels", ylabel=f"{metric} on the test set")
        axes.set_xticks(budgets, [f"{n:,}" for n in budgets])
        axes.minorticks_off()

    draw(path, plot)
