"""The results of an experiment on disk (results.csv and predictions/), and their scores."""

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import statistics
from analysis.baselines import goodness
from analysis.statistics import Estimate, Score
from files import disk
from files.disk import UserError


class Run(NamedTuple):
    """The key of a result: one method, fitted on one draw of the labels."""

    data: str  # "mr", "imdb", or the name of the user's file
    model: str
    method: str
    labels: int
    seed: int
    fingerprint: str  # see experiment.fingerprint


COLUMNS = (*Run._fields, "accuracy", "macro_f1", "rmse", "seconds", "choice", "validation")

Plan = dict[str, dict[int, list[Run]]]  # {name in the report: {labels: a run per draw}}


class Results:
    """The finished runs in an output folder: a table with one line per run, and their predictions.
    Raises UserError if results.csv has other columns."""

    def __init__(self, out: Path):
        self.path = out / "results.csv"
        self.folder = out / "predictions"
        self.folder.mkdir(exist_ok=True)
        self.lines: dict[tuple[str, ...], dict[str, str]] = {}
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
                table = csv.DictReader(file)
                if tuple(table.fieldnames or ()) != COLUMNS:
                    columns = ",".join(COLUMNS)
                    raise UserError(f"{self.path}:1: its columns must be {columns}; move it away")
                for line in table:
                    if None not in line.values():  # else it was cut off
                        self.lines[tuple(line[name] for name in Run._fields)] = line

    def __contains__(self, run: Run) -> bool:
        return tuple(map(str, run)) in self.lines and self.predictions_path(run).is_file()

    def add(self, run: Run, metrics: dict[str, Any], predictions: np.ndarray) -> None:
        """Save a run, its predictions before its line in the table."""
        content = io.BytesIO()
        np.savez_compressed(content, predictions=predictions)
        disk.write_file(self.predictions_path(run), content.getbuffer())

        values = dict.fromkeys(COLUMNS, "") | run._asdict() | metrics
        self.lines[tuple(map(str, run))] = {name: str(values[name]) for name in COLUMNS}
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        table.writerows(self.lines.values())
        disk.write_file(self.path, text.getvalue().encode())

    def load(self, run: Run) -> np.ndarray:
        """Probabilities (N, K) or numbers (N,) for the test examples."""
        with np.load(self.predictions_path(run)) as arrays:
            return arrays["predictions"]

    def predictions_path(self, run: Run) -> Path:
        return self.folder / ("-".join(map(str, run)).replace("/", "-") + ".npz")


class Table:
    """The scores {method: {labels: score}} of the cells whose draws have all finished. Models that
    share a cell are pretraining seeds of one method.

    Raises UserError if there is no such cell."""

    def __init__(self, results: Results, plan: Plan, targets: np.ndarray):
        self.metric = "accuracy" if targets.dtype.kind == "i" else "R squared"
        self.macro_f1: dict[str, dict[int, str]] = {}  # mean of the draws; empty of numbers
        values: dict[str, dict[int, np.ndarray]] = {}  # (S, D, N), see analysis/statistics.py
        for method, cells in plan.items():
            for labels, runs in cells.items():
                if any(run not in results for run in runs):
                    continue
                by_run = np.stack([goodness(results.load(run), targets) for run in runs])
                by_run = by_run.astype(np.int8 if self.metric == "accuracy" else np.float32)
                if self.metric == "R squared":
                    by_run = 1 + by_run / targets.var()
                n_seeds = len({run.model for run in runs})
                cell = by_run.reshape(n_seeds, -1, len(targets))
                values.setdefault(method, {})[labels] = cell
                if self.metric == "accuracy":
                    lines = [results.lines[tuple(map(str, run))] for run in runs]
                    of_draws = [float(line["macro_f1"]) for line in lines]
                    self.macro_f1.setdefault(method, {})[labels] = f"{np.mean(of_draws):.3f}"
        if not values:
            raise UserError(f"{results.path}: no method has finished: there is nothing to report")

        errors = [cell.mean((0, 1)) for cells in values.values() for cell in cells.values()]
        self.blocks = statistics.choose_blocks(errors, targets)
        self.scores: dict[str, dict[int, Score]] = {
            method: {labels: Score(cell, self.blocks) for labels, cell in cells.items()}
            for method, cells in values.items()
        }
        self.budgets = sorted({labels for cells in self.scores.values() for labels in cells})
        self.estimates: dict[str, dict[int, Estimate]] = {
            method: {labels: score.estimate(maximum=1) for labels, score in cells.items()}
            for method, cells in self.scores.items()
        }
