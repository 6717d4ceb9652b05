"""The figures of all scripts, in one style, in colours that colour-blind readers can tell apart."""

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from analysis.statistics import Estimate
from files.disk import first_line, write_file

# The parts of the recipe: what stands for each in the figure, in a colour of Okabe & Ito.
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
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:])
            write_file(path, content.getbuffer())
    except Exception as error:  # fonts, file systems and values each fail in their own way
        print(f"warning: {path} was not drawn: {first_line(error)}", file=sys.stderr)


def loss_curve(points: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss of the points of metrics.jsonl."""

    def plot(axes: Any) -> None:
        for key, label in (("loss", "training"), ("validation_loss", "validation (15% masked)")):
            measured = [point for point in points if key in point]
            steps = [point["step"] for point in measured]
            axes.plot(steps, [point[key] for point in measured], label=label)
        axes.set(xlabel="step", ylabel="loss per masked token (nats)")
        axes.legend()

    draw(path, plot, width=7)


def confusion(targets: np.ndarray, classes: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix of a classifier; numbers are shown for up to 20 classes."""

    def plot(axes: Any) -> None:
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
    estimates: dict[tuple[str, int], Estimate], best: dict[int, str], metric: str, path: Path
) -> None:
    """For each number of labels a stair per part of the recipe: what is reached with this part.

    Args:
        estimates: {(method, number of labels): estimate}; those of STAIRCASE are drawn.
        best: {number of labels: its best baseline}, drawn as a line.
    """
    steps = [name for name in STAIRCASE if any(name == method for method, _ in estimates)]
    budgets = sorted({n for name, n in estimates if name in steps})
    width = len(steps) + 0.8  # of a group, with the gap to the next one
    middles = {n: width * group for group, n in enumerate(budgets)}
    levels = {n: estimates[best[n], n].mean for n in budgets if n in best}

    def plot(axes: Any) -> None:
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
        for i, name in enumerate(steps):
            label, colour = STAIRCASE[name]
            cells = {n: estimates[name, n] for n in budgets if (name, n) in estimates}
            centers = [middles[n] + i - (len(steps) - 1) / 2 for n in cells]
            means, lows, highs = np.array(list(cells.values())).T
            errors = {"yerr": (means - lows, highs - means), "error_kw": {"elinewidth": 0.8}}
            bars = axes.bar(centers, means, 1, color=colour, label=label, **errors)
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        ends = [[middles[n] + side * len(steps) / 2 for n in levels] for side in (-1, 1)]
        line = {"color": "black", "linestyle": "--", "linewidth": 1.2, "label": "best baseline"}
        axes.hlines(list(levels.values()), *ends, **line)
        ticks = [f"{n:,} labels" for n in budgets]
        for i, n in enumerate(budgets):
            if n in best:
                ticks[i] += f"\nbest baseline: {best[n]}, {levels[n]:.3f}"
        axes.set_xticks(list(middles.values()), ticks, fontsize=9)
        axes.tick_params(axis="x", length=0)
        lowest = min(estimates[name, n].mean for name, n in estimates if name in steps)
        axes.set(ylabel=f"{metric} on the test set", ylim=(lowest - 0.03, None))
        axes.margins(y=0.1)
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    draw(path, plot, width=9, height=4.2)
