"""The results of an experiment on disk (results.csv and predictions/), and their scores."""

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import statistics
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

    def add(
        self, run: Run, metrics: dict[str, Any], targets: np.ndarray, predictions: np.ndarray
    ) -> None:
        """Save a run, its predictions before its line in the table."""
        content = io.BytesIO()
        np.savez_compressed(content, targets=targets, predictions=predictions)
        disk.write_file(self.predictions_path(run), content.getbuffer())

        values = {name: value for name, value in metrics.items() if value is not None}
        values = dict.fromkeys(COLUMNS, "") | run._asdict() | values
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
    """Predictions {method: {labels: probabilities (D, N, K) or numbers (D, N)}} of those draws that
    all planned methods have finished, and their scores {method: {labels: score}}. Raises UserError
    if no run has finished."""

    def __init__(self, results: Results, plan: Plan, targets: np.ndarray):
        self.targets = targets
        self.is_classification = targets.dtype.kind == "i"
        self.metric = "accuracy" if self.is_classification else "R squared"
        self.counts = statistics.bootstrap_counts(len(targets))

        self.predictions: dict[str, dict[int, np.ndarray]] = {}
        for labels in next(iter(plan.values())):  # all methods have the same budgets
            finished = {
                method: {run.seed: run for run in cells[labels] if run in results}
                for method, cells in plan.items()
            }
            seeds = [set(runs) for runs in finished.values() if runs]
            for method, runs in finished.items():
                if runs and set.intersection(*seeds):
                    drawn = [results.load(runs[seed]) for seed in set.intersection(*seeds)]
                    self.predictions.setdefault(method, {})[labels] = np.stack(drawn)
        if not self.predictions:
            raise UserError(f"{results.path}: no run has finished, so there is nothing to report")

        self.budgets = sorted({labels for cells in self.predictions.values() for labels in cells})
        self.scores = {
            method: {labels: self._score(drawn) for labels, drawn in cells.items()}
            for method, cells in self.predictions.items()
        }
        self.estimates = {
            method: {labels: score.estimate(maximum=1) for labels, score in cells.items()}
            for method, cells in self.scores.items()
        }

    def _score(self, predictions: np.ndarray) -> Score:
        """Accuracy, or R squared: the mean over the examples of 1 - squared error / variance."""
        if self.is_classification:
            values = (predictions.argmax(-1) == self.targets).astype(np.float32)
        else:
            values = 1 - (predictions - self.targets) ** 2 / self.targets.var()
        return statistics.mean_score(values, self.counts)

    def macro_f1(self, method: str, labels: int) -> Estimate:
        drawn = self.predictions[method][labels]
        score = statistics.macro_f1(drawn.argmax(-1), self.targets, drawn.shape[-1], self.counts)
        return score.estimate(maximum=1)
