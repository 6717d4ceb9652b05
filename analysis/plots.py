"""The plots. Those of analyze.py have their labels at the ends of lines, intervals as bands, and the
colours of Okabe & Ito, which the colour-blind tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import patheffects, pyplot
from matplotlib.axes import Axes

from analysis.statistics import Estimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
MARKERS = "osD^vP*X"
LINE_HEIGHT = 12  # points between two labels, so that they do not overlap
DPI = 120


# --------------------------------------------------------- of train.py, finetune.py and bench.py


def loss_curve(points: list[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("validation_loss", "validation (15% masked)")):
        chosen = [point for point in points if key in point]
        axes.plot([point["step"] for point in chosen], [point[key] for point in chosen], label=label)
    axes.set(xlabel="step", ylabel="loss of a masked token, nats")
    axes.legend()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def confusion(matrix: np.ndarray, names: list[str], path: Path) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay  # a second too, and of no use to train.py

    size = max(4.0, 0.5 * len(names) + 2)
    figure, axes = pyplot.subplots(figsize=(size, size), layout="constrained")
    shown = ConfusionMatrixDisplay(matrix, display_labels=names)
    shown.plot(ax=axes, xticks_rotation="vertical", colorbar=False, include_values=len(names) <= 20)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def speeds(result: dict[str, Any], path: Path) -> None:
    """A bar chart of tokens a second, a group a shape."""
    shapes = result["steps"]
    size = (7 * len(shapes), 4)
    figure, axes = pyplot.subplots(1, len(shapes), figsize=size, layout="constrained", squeeze=False)
    for axis, (shape, found) in zip(axes[0], shapes.items(), strict=True):
        low, middle, high = np.array(list(found["tokens_per_second"].values())).T
        axis.barh(list(found["tokens_per_second"]), middle, xerr=(middle - low, high - middle))
        axis.set(title=f"{shape}, {result['dtype']}", xlabel="tokens a second")
        axis.invert_yaxis()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- of analyze.py


def look_of(rows: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each row, the same in every picture."""
    return {
        row: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, row in enumerate(rows)
    }


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of each point, moved apart where they would overlap, in a white
    rim that keeps the bars of other points off the letters."""
    axes.figure.canvas.draw()  # fixes the scales
    to_points = 72 / axes.figure.dpi
    previous = -np.inf
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1] * to_points
        moved = max(height, previous + LINE_HEIGHT)
        previous = moved
        axes.annotate(
            text,
            (x, y),
            xytext=(8, moved - height),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )


def save(figure: pyplot.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)


def lines(
    axes: Axes,
    found: dict[str, list[tuple[float, Estimate]]],
    looks: dict[str, dict[str, str]],
    levels: Sequence[tuple[str, str, float]] = (),
) -> None:
    """A line of means in a band of intervals for each row, its name at its right end; of each level,
    (row, name, height), a flat one in the row's colour."""
    for row, points in found.items():
        x = [at for at, _ in points]
        mean, low, high = ([getattr(e, part) for _, e in points] for part in ("mean", "low", "high"))
        axes.plot(x, mean, markersize=4, **looks[row])
        axes.fill_between(x, low, high, color=looks[row]["color"], alpha=0.13, linewidth=0)
    ends = [(*(points[-1][0], points[-1][1].mean), row, looks[row]["color"]) for row, points in found.items()]
    for row, name, height in levels:
        axes.axhline(height, color=looks[row]["color"], linewidth=1, linestyle=":")
        ends.append((found[row][-1][0], height, name, looks[row]["color"]))
    label_ends(axes, ends)


def label_ticks(axes: Axes, budgets: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{n:,}" for n in budgets])
    axes.minorticks_off()


def learning_curves(
    found: dict[str, list[tuple[float, Estimate]]], looks: dict, figure_name: str, majority: float, path: Path
) -> None:
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    label_ticks(axes, sorted({int(x) for points in found.values() for x, _ in points}))
    axes.axhline(majority, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(
        "majority",
        (0, majority),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color="#777777",
    )
    axes.set(xlabel="labels", ylabel=f"{figure_name} on the test set")
    lines(axes, found, looks)
    save(figure, path)


def reliability(bins: dict[str, np.ndarray], errors: dict[str, float], looks: dict, path: Path) -> None:
    """One panel a row, so that lines which nearly coincide are told apart."""
    figure, panels = pyplot.subplots(
        1, len(bins), figsize=(2.4 * len(bins), 2.6), sharey=True, layout="constrained", squeeze=False
    )
    for axes, (row, (confident, accurate, share)) in zip(
        panels[0], ((row, found.T) for row, found in bins.items()), strict=True
    ):
        axes.plot((0, 1), (0, 1), color="#888888", linewidth=1, linestyle=":")
        axes.plot(confident, accurate, color=looks[row]["color"], linewidth=1)
        axes.scatter(confident, accurate, s=200 * share, color=looks[row]["color"])
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="confidence", aspect="equal")
        axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(f"{row}\nerror {errors[row]:.3f}", fontsize=9, color=looks[row]["color"])
    panels[0][0].set_ylabel("accuracy")
    save(figure, path)


def over_time(
    tokens: Sequence[float],
    seconds: Sequence[float],
    losses: Sequence[float],
    found: dict[str, list[Estimate]],
    levels: Sequence[tuple[str, str, float]],
    figure_name: str,
    path: Path,
) -> None:
    """Validation loss above, what the snapshots' frozen vectors are worth below, beside the levels of rivals;
    by tokens and by minutes."""
    figure, panels = pyplot.subplots(2, 2, figsize=(10.5, 5.6), sharex="col", sharey="row")
    figure.subplots_adjust(wspace=0.5, hspace=0.1)
    looks = look_of(list(found))
    axis = (("million tokens", np.array(tokens) / 1e6), ("minutes of pretraining", np.array(seconds) / 60))
    for (above, below), (name, x) in zip(panels.T, axis, strict=True):
        above.plot(x, losses, color="#000000", marker="o", markersize=4)
        below.set_xlabel(name)
        lines(below, {row: list(zip(x, points, strict=True)) for row, points in found.items()}, looks, levels)
    panels[0][0].set_ylabel("validation loss, nats")
    panels[1][0].set_ylabel(figure_name)
    save(figure, path)


def by_layer(found: dict[str, list[tuple[float, Estimate]]], figure_name: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(5.6, 3.8))
    n_layers = max(int(x) for points in found.values() for x, _ in points)
    step = max(1, n_layers // 8)
    places = list(range(0, n_layers + 1, step))
    axes.set_xticks(places, ["embedding", *(str(i) for i in places[1:])])
    axes.set(xlabel="layer", ylabel=f"{figure_name} of its mean state")
    lines(axes, found, look_of(list(found)))
    save(figure, path)


def pareto(
    points: list[tuple[str, dict[str, float], Estimate]],
    looks: dict,
    axis: dict[str, str],
    figure_name: str,
    path: Path,
) -> None:
    """Accuracy against each cost; a line joins the points that no other one is both cheaper and better than.
    `axis` names the costs; a row that has none of one is a level across that panel."""
    figure, panels = pyplot.subplots(1, len(axis), figsize=(5.2 * len(axis), 3.8), sharey=True, squeeze=False)
    figure.subplots_adjust(wspace=0.45)
    for axes, (cost, name) in zip(panels[0], axis.items(), strict=True):
        there = [(costs[cost], e, row) for row, costs, e in points if cost in costs]
        there.sort(key=lambda point: (point[0], -point[1].mean))
        axes.set(xlabel=name, xscale="log")
        axes.set_xlim(there[0][0] / 2, there[-1][0] * 2)  # margins fail where there is a single point
        front, best = [], -np.inf
        for x, e, row in there:
            around = [[e.mean - e.low], [e.high - e.mean]]
            axes.errorbar(x, e.mean, yerr=around, markersize=6, capsize=2, **looks[row])
            if e.mean > best:
                front.append((x, best := e.mean))
        axes.plot(*zip(*front, strict=True), color="#888888", linewidth=1, linestyle="--", zorder=0)
        low, high = axes.get_xlim()
        ticks = [m * 10.0**k for k in range(-4, 30) for m in (1, 2, 5)]
        ticks = [x for x in ticks if low <= x <= high]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        ends = [(x, e.mean, row, looks[row]["color"]) for x, e, row in there]
        for row, _, e in [point for point in points if cost not in point[1]]:
            axes.axhline(e.mean, color=looks[row]["color"], linewidth=1, linestyle=":")
            ends.append((high, e.mean, f"{row} (none)", looks[row]["color"]))
        label_ends(axes, ends)
    panels[0][0].set_ylabel(figure_name)
    save(figure, path)
