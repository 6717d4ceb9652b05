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
# The parts of the recipe: what stands for each in the figure.
STAIRCASE = {
    "majority": ("majority class", "#999999"),
    "random_weights": ("network from random weights", "#56B4E9"),
    "start": ("+ spectral initialization", "#009E73"),
    "pretrained": ("+ masked-language modelling", "#0072B2"),
    "pretrained+ngrams": ("+ n-grams", "#E69F00"),
}
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


def staircase(
    estimates: dict[str, dict[int, Estimate]], best: dict[int, str], metric: str, path: Path
) -> None:
    """For each number of labels a stair per part of the recipe: what is reached with this part.

    Args:
        estimates: {method: {number of labels: estimate}}; those of STAIRCASE are drawn.
        best: {number of labels: its best baseline}, drawn as a line.
    """
    steps = {name: estimates[name] for name in STAIRCASE if name in estimates}
    budgets = sorted({n for cells in steps.values() for n in cells})
    levels = [cells[n].mean for cells in steps.values() for n in cells]
    levels += [estimates[name][n].mean for n, name in best.items()]
    floor, top = min(levels) - 0.03, max(levels) + 0.06

    width = len(steps) + 0.8  # of a group, with the gap to the next one

    def plot(axes) -> None:
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        small = {"ha": "center", "fontsize": 8, "bbox": box}
        ticks: list[str] = []
        for group, n in enumerate(budgets):
            left = group * width
            ticks.append(f"{n:,} labels")
            below = None
            for x, (name, cells) in enumerate(steps.items()):
                if n not in cells:
                    continue
                mean, low, high = cells[n]
                below = floor if below is None else below
                label = STAIRCASE[name][0] if group == 0 else None
                middle = left + x + 0.5
                axes.bar(middle, min(mean, below) - floor, 1, floor, color="#EBEBEB")
                axes.bar(middle, mean - below, 1, below, color=STAIRCASE[name][1], label=label)
                axes.plot([middle, middle], [low, high], color="black", linewidth=0.8)
                axes.text(middle, min(high + 0.005, top - 0.015), f"{mean:.3f}", **small)
                below = mean
            if n in best:
                level = estimates[best[n]][n].mean
                ticks[-1] += f"\nbest baseline: {best[n]}, {level:.3f}"
                label = "best baseline" if group == len(budgets) - 1 else None
                line = {"color": "black", "linestyle": "--", "linewidth": 1.2}
                axes.plot([left, left + len(steps)], [level, level], label=label, **line)
        middles = [group * width + len(steps) / 2 for group in range(len(budgets))]
        axes.set_xticks(middles, ticks, fontsize=9)
        axes.tick_params(axis="x", length=0)
        axes.set(
            ylabel=f"{metric} on the test set",
            ylim=(floor, top),
            xlim=(-0.4, len(budgets) * width - 0.4),
        )
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    draw(path, plot, width=9, height=4.2)
