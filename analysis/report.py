"""The sections of report.md: tables of scores and of paired differences."""

import itertools
from pathlib import Path
from typing import Any

from analysis import plots
from analysis.behaviour import N_PAIRS, TEMPLATES, by_category
from analysis.results import Table
from analysis.statistics import Estimate
from files import disk


def write(table: Table, about: list[str], folder: Path) -> None:
    """Write report.md, cells.csv and staircase.png; `about` says on what, in sentences."""
    sections = {"Test scores": accuracy, "Lead over the best baseline": leads}
    has_steps = not table.scores.keys().isdisjoint(plots.STAIRCASE)
    if has_steps:
        sections["What each step is worth"] = steps
    if len(table.probe_targets):
        sections["What is understood"] = understanding
    lines = ["# What the pretraining was worth", "", *about]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section(table)]
    disk.write_file(folder / "report.md", "\n".join(lines).encode())
    table.write(folder / "cells.csv")
    if has_steps:
        plots.staircase(table.estimates, table.best, table.metric, folder / "staircase.png")


def markdown(header: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a table, between empty lines."""
    lines = (header, ["---"] * len(header), *rows)
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def by_budget(table: Table, values: dict[str, dict[int, Any]]) -> list[str]:
    """A table of the values {method: {labels: value}}, with a line per method."""
    rows = [[name, *(cells.get(n, "") for n in table.budgets)] for name, cells in values.items()]
    return markdown(["", *(f"{n:,} labels" for n in table.budgets)], rows)


def accuracy(table: Table) -> list[str]:
    """Accuracy (or R squared) and macro-F1, and what the intervals cover."""
    shapes = [score.values.shape for cells in table.scores.values() for score in cells.values()]
    n_seeds, n_draws, n_texts = map(max, zip(*shapes, strict=True))
    length = table.blocks.length
    lines = [
        f"Test {table.metric} [95% interval], mean of up to {n_seeds} pretraining seeds and",
        f"{n_draws} draws of the labels. The intervals cover seeds and draws, where a method has",
        f"several, and the {n_texts:,} test texts in blocks of {length} neighbours: four times the",
        f"distance, {length // 4}, up to which the errors of neighbours are correlated.",
        *by_budget(table, table.estimates),
    ]
    if table.macro_f1:
        lines += ["Macro-F1:", *by_budget(table, table.macro_f1)]
    if table.on_edge:
        lines += [f"On the edge of their grids are choices of: {', '.join(table.on_edge)}.", ""]
    return lines


def leads(table: Table) -> list[str]:
    """Which baseline is the best, and the paired differences of the pretrained methods to it."""
    best = {n: f"{name} {table.scores[name][n].mean:.3f}" for n, name in table.best.items()}
    return [
        "Paired differences to the best baseline of each label budget. The intervals allow for the",
        f"selection: all {table.n_intervals} of one budget hold at once (Bonferroni).",
        *by_budget(table, {"best baseline": best} | table.leads),
    ]


def steps(table: Table) -> list[str]:
    """The paired differences between neighbouring steps of the staircase."""
    names = [name for name in plots.STAIRCASE if name in table.scores]
    differences: dict[str, dict[int, Estimate]] = {}
    for lower, upper in itertools.pairwise(names):
        below, above = table.scores[lower], table.scores[upper]
        common = [n for n in table.budgets if n in below and n in above]
        estimates = {n: (above[n] - below[n]).estimate() for n in common}
        differences[f"{upper} against {lower}"] = estimates
    return [
        "![accuracy of each step](staircase.png)",
        "",
        "Paired differences of each step from the one before:",
        *by_budget(table, differences),
    ]


def understanding(table: Table) -> list[str]:
    """The accuracy of each method on the categories of the behavioural test set."""
    n = table.budgets[-1]
    rows = []
    for method, cells in table.probes.items():
        if n in cells:
            accuracies = by_category(cells[n])
            rows.append([method, *(f"{accuracy:.2f}" for accuracy in accuracies.values())])
    size = 2 * N_PAIRS
    return [
        f"Accuracy with {n:,} labels on sentences of our own (analysis/behaviour.py), {size} in",
        f"each category: chance is .5, with a standard error of {(0.25 / size) ** 0.5:.2f}.",
        *markdown(["", *TEMPLATES], rows),
    ]
