"""The sections of report.md: tables, and sentences that the confidence intervals allow."""

from typing import Any

import numpy as np

from analysis import statistics
from analysis.results import Table
from labels import LabeledDataset


def markdown(header: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a table, between empty lines."""
    lines = (header, ["---"] * len(header), *rows)
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def by_budget(table: Table, values: dict[str, dict[int, Any]]) -> list[str]:
    """A table of the values {method: {labels: value}}, with a line per method."""
    rows = [[name, *(cells.get(n, "") for n in table.budgets)] for name, cells in values.items()]
    return markdown(["", *(f"{n:,} labels" for n in table.budgets)], rows)


def accuracy(table: Table, train: LabeledDataset, test: LabeledDataset, n_draws: int) -> list[str]:
    """Accuracy (or R squared) and macro-F1."""
    n_seeds = max(len(score.values) for cells in table.scores.values() for score in cells.values())
    seeds = f"{n_seeds} pretraining seeds and " if n_seeds > 1 else ""
    lines = [
        f"Test {table.metric}, mean of {seeds}{n_draws} draws [95% interval]. The intervals cover",
        "seeds and draws, where there are several, and test texts in blocks of",
        f"{table.blocks.length} neighbours.",
        *by_budget(table, table.estimates),
        "![learning curves](curves.png)",
        "",
    ]
    if train.names:
        majority = np.mean(test.targets == np.bincount(train.targets).argmax())
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


def costs(table: Table, milliseconds: dict[str, float]) -> list[str]:
    """The times {method: milliseconds per text} of the methods, and which of them to use."""
    rows = [[method, f"{time:.2f}"] for method, time in milliseconds.items()]
    advice = [s for n in table.budgets for s in statistics.advise(table.scores, milliseconds, n)]
    lines = markdown(["", "milliseconds per text"], rows)
    lines = ["Measured on this machine, one text at a time.", *lines]
    lines += [
        "The intervals are corrected for choosing among all pairs of methods (Bonferroni).",
        "",
    ]
    return [*lines, *(f"- {s}" for s in advice)]
