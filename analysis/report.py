"""The sections of report.md: tables, and sentences that the confidence intervals allow."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from analysis import statistics
from analysis.results import Table
from files.model_folder import reading
from labels import LabeledDataset

N_HARDEST = 20
MAX_CHARACTERS = 160  # of a text in the report


def markdown(header: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a table, between empty lines."""
    lines = (header, ["---"] * len(header), *rows)
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def by_budget(table: Table, cell: Callable[[str, int], Any] | None = None) -> list[str]:
    """A table of cell(method, labels), by default of the scores, with a line per method."""
    rows = []
    for method, estimates in table.estimates.items():
        cells = {n: cell(method, n) if cell else estimate for n, estimate in estimates.items()}
        rows.append([method, *(cells.get(n, "") for n in table.budgets)])
    return markdown(["", *(f"{n:,} labels" for n in table.budgets)], rows)


def accuracy(table: Table, train: LabeledDataset) -> list[str]:
    """Accuracy (or R squared) and macro-F1."""
    n_draws = max(len(drawn) for cells in table.predictions.values() for drawn in cells.values())
    lines = [
        f"Test {table.metric}, mean of {n_draws} draws [95% interval over draws and test texts].",
        *by_budget(table),
        "![learning curves](curves.png)",
        "",
    ]
    if table.is_classification:
        majority = np.mean(table.targets == np.bincount(train.targets).argmax())
        lines += [f"Predicting the most frequent class has accuracy {majority:.3f}. Macro-F1:"]
        lines += by_budget(table, table.macro_f1)
    return lines


def differences(table: Table) -> list[str]:
    """Paired differences of the first method from the others."""
    first, *others = table.scores
    lines = []
    for n, score in table.scores[first].items():
        lines += [f"Paired differences of {table.metric} with {n:,} labels:", ""]
        for other in others:
            if n in table.scores[other]:
                difference = score - table.scores[other][n]
                lines += [f"- {statistics.compare(first, other, difference)}"]
        lines += [""]
    return lines


def costs(table: Table, measured: dict[str, dict[str, float]]) -> list[str]:
    """The costs {method: {cost: value}} of the methods, and which of them to use."""
    names = list(dict.fromkeys(cost for values in measured.values() for cost in values))
    rows = []
    for method, values in measured.items():
        cells = {cost: f"{round(value, 2):,}" for cost, value in values.items()}
        rows.append([method, *(cells.get(cost, "") for cost in names)])
    latency = {method: values["milliseconds"] for method, values in measured.items()}
    advice = [s for n in table.budgets for s in statistics.advise(table.scores, latency, n)]
    return [
        "Measured on this machine: milliseconds per single text, peak memory of predict.py.",
        *markdown(["", *(name.replace("_", " ") for name in names)], rows),
        *(f"- {sentence}" for sentence in advice),
        "",
    ]


def read_losses(model: Path) -> dict[int, float]:
    """{step: validation loss} of the snapshots in a folder of train.py."""
    folders = (model / "snapshots").glob("step-*")
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in folders)
    if not steps:
        return {}
    with reading(model / "metrics.jsonl"):
        points = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
        losses = {p["step"]: p["validation_loss"] for p in points if "validation_loss" in p}
    return {step: losses.get(step, math.nan) for step in steps}


def snapshots(table: Table, losses: dict[int, float]) -> list[str]:
    """The scores of the snapshots; the methods of `table` are their steps."""
    header = ["step", "validation loss", *(f"{n:,} labels" for n in table.budgets)]
    rows = [
        [step, f"{losses[int(step)]:.3f}", *estimates.values()]
        for step, estimates in table.estimates.items()
    ]
    title = f"Test {table.metric} of `frozen` in the course of the pretraining."
    return [title, *markdown(header, rows), "![snapshots](snapshots.png)", ""]


def layers(table: Table) -> list[str]:
    """The scores of the layers, which are the methods of `table`."""
    title = f"Test {table.metric} of `frozen` on the mean state after each layer (0: embedding)."
    return [title, *by_budget(table)]


def calibration(table: Table) -> list[str]:
    """Expected calibration errors."""

    def error(method: str, n: int) -> str:
        probabilities = table.predictions[method][n]
        return f"{statistics.calibration_error(probabilities, table.targets):.3f}"

    title = "Expected calibration error of the predicted class, 15 bins (Guo et al. 2017)."
    return [title, *by_budget(table, error)]


def hardest(table: Table, test: LabeledDataset) -> list[str]:
    """The texts whose class gets the lowest mean probability from all methods."""
    n = table.budgets[-1]
    methods = {m: cells[n].mean(0) for m, cells in table.predictions.items() if n in cells}
    of_class = [p[np.arange(len(test)), test.targets] for p in methods.values()]
    rows = []
    for i in np.argsort(np.mean(of_class, axis=0))[:N_HARDEST]:
        text = " ".join(test.texts[i].split()).replace("|", "\\|")
        text = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
        predicted = [f"{test.names[p[i].argmax()]} {p[i].max():.2f}" for p in methods.values()]
        rows.append([text, test.names[test.targets[i]], *predicted])
    title = f"The test texts that are hardest for all methods together, with {n:,} labels."
    return [title, *markdown(["text", "true class", *methods], rows)]
