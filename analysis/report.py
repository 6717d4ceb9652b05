"""The report of analyze.py: what was found, in tables, pictures and sentences that intervals allow."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis import plots, statistics
from analysis.results import Results, Table
from analysis.statistics import Score
from files import model_folder
from labels import LabeledDataset

HARDEST = 20
LONGEST_SHOWN = 160  # characters of a text in the report


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["", *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), ""]


def cells_of(scores: dict[int, Score], budgets: list[int]) -> list[str]:
    return [str(scores[budget].level()) if budget in scores else "" for budget in budgets]


def write_scores(table: Table, out: Path, looks: dict, majority: float) -> list[str]:
    head = ["labels", *(f"{budget:,}" for budget in table.budgets)]
    rows = [[row, *cells_of(cells, table.budgets)] for row, cells in table.scores.items()]
    rows += [["majority", *[f"{majority:.3f}"] * len(table.budgets)]] if table.is_classes else []
    n_draws = max(len(found) for cells in table.found.values() for found in cells.values())
    lines = [f"Test {table.figure}, mean of {n_draws} draws [95% interval over draws and test examples]."]
    lines += grid(head, rows)
    plots.learning_curves(
        {row: table.points(row) for row in table.scores}, looks, table.figure, majority, out / "curves.png"
    )
    lines += ["![learning curves](curves.png)", ""]
    if table.is_classes:
        f1 = {row: {b: table.f1(row, b) for b in cells} for row, cells in table.found.items()}
        rows = [[row, *cells_of(scores, table.budgets)] for row, scores in f1.items()]
        lines += ["Macro-F1:", *grid(head, rows)]
    return lines


def write_verdicts(table: Table, ours: str, rivals: list[str]) -> list[str]:
    """Paired differences, and how many labels a rival needs for what `ours` has."""
    lines, own = [], table.scores[ours]
    for budget in own:
        pairs = [
            (row, own[budget] - table.scores[row][budget]) for row in rivals if budget in table.scores[row]
        ]
        if pairs:
            lines += [f"With {budget:,} labels, difference of {table.figure}:", ""]
            lines += [f"- {statistics.verdict(ours, row, difference)}" for row, difference in pairs]
            lines += [""]
    wanted, rows = [budget for budget in own if budget < table.budgets[-1]], []
    for row in rivals:
        means = [float(score.by_draw.mean()) for score in table.scores[row].values()]
        levels = (float(own[budget].by_draw.mean()) for budget in wanted)
        rows.append([row, *(statistics.label_equivalent([*table.scores[row]], means, x) for x in levels)])
    if rows and wanted:
        lines += [f"Labels that a rival needs for what {ours} has with", ""]
        lines += grid(["", *(f"{budget:,} labels" for budget in wanted)], rows)[1:]
    return lines


def write_calibration(table: Table, out: Path, looks: dict) -> list[str]:
    head, rows, drawn, errors = ["labels", *(f"{b:,}" for b in table.budgets)], [], {}, {}
    for row, cells in table.found.items():
        found = {budget: statistics.calibration(cell, table.targets) for budget, cell in cells.items()}
        rows.append([row, *(f"{found[b][0]:.3f}" if b in found else "" for b in table.budgets)])
        if table.budgets[-1] in found:
            errors[row], drawn[row] = found[table.budgets[-1]]
    plots.reliability(drawn, errors, looks, out / "reliability.png")
    most = f"{table.budgets[-1]:,}"
    return [
        "Expected calibration error of the likeliest class, 15 bins (Guo et al. 2017).",
        *grid(head, rows),
        f"With {most} labels; the size of a point is its share of the texts:",
        "",
        "![reliability](reliability.png)",
        "",
    ]


class Curve(NamedTuple):
    """Where the snapshots of a run stand."""

    steps: list[int]
    tokens: list[int]
    seconds: list[float]
    losses: list[float]  # of validation


def read_curve(model: Path) -> Curve | None:
    """Of the run that left this folder, or None where it kept no snapshots."""
    folders = sorted((model / "snapshots").glob("step-*"), key=lambda folder: int(folder.name[5:]))
    if len(folders) < 2:
        return None
    with model_folder.reading(model):
        flags = json.loads((model / "flags.json").read_text())
        step_tokens = flags["micro_batch_tokens"] * flags["accumulate"]
        points = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
        speeds = [(p["step"], p["tokens_per_second"]) for p in points if "tokens_per_second" in p]
        losses = {p["step"]: p["validation_loss"] for p in points if "validation_loss" in p}
        steps, clock = np.array([0, *(step for step, _ in speeds)]), [0.0]
        for before, (step, speed) in zip(steps, speeds, strict=False):
            clock.append(clock[-1] + (step - before) * step_tokens / speed)
    at = [int(folder.name[5:]) for folder in folders]
    seconds = np.interp(at, steps, clock).tolist()
    return Curve(at, [step * step_tokens for step in at], seconds, [losses.get(x, math.nan) for x in at])


def write_time(
    curve: Curve | None,
    name: str,
    results: Results,
    data: str,
    budgets: list[int],
    n_seeds: int,
    rivals: dict[str, dict[int, Score]],
    out: Path,
) -> list[str]:
    """The snapshots of a run, by their frozen vectors, beside rivals that need no pretraining."""
    if curve is None:
        return [
            "Not measured: it wants snapshots (`train.py --snapshots 8`), the row frozen, and no `--quick`.",
            "",
        ]
    names = [f"{name}@{step}" for step in curve.steps]
    table = Table(results, data, {at: (at, "frozen") for at in names}, budgets, n_seeds)
    found = {f"{budget:,} labels": [table.scores[at][budget].level() for at in names] for budget in budgets}
    levels = [
        (f"{b:,} labels", f"{rival}, {b:,}", scores[b].level().mean)
        for rival, scores in rivals.items()
        for b in budgets
    ]
    plots.over_time(*curve[1:], found, levels, table.figure, out / "time.png")
    rows = [
        [f"{step:,}", f"{t / 1e6:.1f}", f"{s:.0f}", f"{loss:.3f}", *(str(found[b][i]) for b in found)]
        for i, (step, t, s, loss) in enumerate(zip(*curve, strict=True))
    ]
    head = ["step", "million tokens", "seconds", "validation loss", *found]
    return [
        f"Frozen vectors of the snapshots of {name}, {table.figure}.",
        *grid(head, rows),
        "![over time](time.png)",
        "",
    ]


def write_layers(table: Table, found: dict[int, dict[int, np.ndarray]], name: str, out: Path) -> list[str]:
    scores = {
        layer: {b: statistics.mean_score(right, table.weights) for b, right in cells.items()}
        for layer, cells in found.items()
    }
    budgets = list(found[0])
    shown = {f"{b:,} labels": [(layer, cells[b].level()) for layer, cells in scores.items()] for b in budgets}
    plots.by_layer(shown, table.figure, out / "layers.png")
    rows = [
        [str(layer) if layer else "embedding", *(str(cells[b].level()) for b in budgets)]
        for layer, cells in scores.items()
    ]
    lines = [
        f"Logistic regression on the mean of the states of {name} after each layer, {table.figure}.",
        *grid(["layer", *shown], rows),
    ]
    for budget in budgets:
        best = max(scores, key=lambda layer, budget=budget: scores[layer][budget].by_draw.mean())
        if best != (last := max(scores)):
            gained = scores[best][budget] - scores[last][budget]
            named = f"layer {best}" if best else "the embedding"
            sentence = statistics.verdict(named, f"layer {last}", gained)
            lines += [f"- With {budget:,} labels {sentence}."]
        else:
            lines += [f"- With {budget:,} labels the last layer's mean is the highest."]
    return [*lines, "", "![by layer](layers.png)", ""]


def write_costs(table: Table, costs: dict[str, dict[str, float]], looks: dict, out: Path) -> list[str]:
    units = {
        "weights": "{:,.0f}",
        "megabytes": "{:.1f}",
        "flops_per_token": "{:,.0f}",
        "pretraining_seconds": "{:,.0f}",
        "pretraining_tokens": "{:,.0f}",
        "milliseconds": "{:.2f}",
        "texts_per_second": "{:,.0f}",
        "peak_megabytes": "{:,.0f}",
    }
    most = table.budgets[-1]
    head = ["", *(name.replace("_", " ") for name in units), table.figure]
    rows, points = [], []
    for row, cells in table.scores.items():
        if row in costs and most in cells:
            shown = [
                form.format(costs[row][unit]) if unit in costs[row] else "" for unit, form in units.items()
            ]
            rows.append([row, *shown, str(cells[most].level())])
            points.append((row, costs[row], cells[most].level()))
    axis = {"milliseconds": "milliseconds until one text is answered"}
    if any("pretraining_flops" in costs for _, costs, _ in points):
        axis["pretraining_flops"] = "operations of pretraining"
    plots.pareto(points, looks, axis, table.figure, out / "pareto.png")
    latency = {row: costs[row]["milliseconds"] for row in costs}
    advice = statistics.advise(
        table.budgets, {row: s for row, s in table.scores.items() if row in costs}, latency
    )
    return [
        f"On this machine: milliseconds of one text, texts a second in batches of {costs.BATCHES[-1]}, memory",
        f"of a whole process of predict.py; {table.figure} with {most:,} labels.",
        *grid(head, rows),
        "![Pareto](pareto.png)",
        "",
        "Which to take:",
        "",
        *(f"- {sentence}" for sentence in advice),
        "",
    ]


def write_hardest(table: Table, test: LabeledDataset) -> list[str]:
    """The texts to whose class all rows together give the least probability."""
    most = table.budgets[-1]
    there = {row: cells[most].mean(0) for row, cells in table.found.items() if most in cells}
    true = np.mean([found[np.arange(len(test)), test.targets] for found in there.values()], axis=0)
    rows = []
    for i in np.argsort(true)[:HARDEST]:
        text = " ".join(test.texts[i].split()).replace("|", "\\|")
        shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."
        answers = [f"{test.names[found[i].argmax()]} {found[i].max():.2f}" for found in there.values()]
        rows.append([shown, test.names[test.targets[i]], *answers])
    return [
        f"The {len(rows)} test texts that are hardest for all rows with {most:,} labels, and their answers.",
        *grid(["text", "true", *there], rows),
    ]


def write_transfer(results: Results, kinds: tuple[str, ...], budgets: list[int], n_seeds: int) -> list[str]:
    rows, figure = [], ""
    for data in ("mr", "imdb"):
        for row in kinds:
            shown = {source: (source, row) for source in ("imdb", "mr", "both")}
            table = Table(results, data, shown, budgets, n_seeds)
            figure = table.figure
            for source, cells in table.scores.items():
                rows.append([source, data, row, *(str(cells[b].level()) for b in budgets)])
    return [
        f"Pretrained on one collection, tested on another: {figure}. LSA sees the same texts.",
        *grid(["pretrained on", "tested on", "row", *(f"{b:,} labels" for b in budgets)], rows),
    ]
