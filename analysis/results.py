"""What analyze.py ran: the table of the runs, what each row said of each test text, and their scores."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from analysis import statistics
from analysis.statistics import Estimate, Score
from files import disk
from files.disk import UserError

KEY = ("data", "model", "row", "labels", "seed")
COLUMNS = (*KEY, "fingerprint", "accuracy", "macro_f1", "rmse", "seconds", "choice", "validation")


class Results:
    """The table results.csv, and predictions/, in OUT."""

    def __init__(self, out: Path):
        self.out, self.path, self.rows = out, out / "results.csv", {}
        (out / "predictions").mkdir(exist_ok=True)
        if not self.path.exists():
            disk.write_file(self.path, (",".join(COLUMNS) + "\n").encode())
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != COLUMNS:
                raise UserError(f"{self.path}:1: its columns are to be {','.join(COLUMNS)}; move it away")
            for row in table:  # a line that was cut off, or whose predictions are gone, is run again
                key = tuple(row[name] or "" for name in KEY)
                if None not in row.values() and self.predictions(key).is_file():
                    self.rows[key] = row

    def predictions(self, key: tuple[str, ...]) -> Path:
        return self.out / "predictions" / ("-".join(key).replace("/", "-") + ".npz")

    def forget_others(self, prints: dict[str, str]) -> None:
        """The runs of models that have other weights by now: {name: fingerprint}."""
        self.rows = {
            key: row
            for key, row in self.rows.items()
            if row["fingerprint"] == prints.get(row["model"], row["fingerprint"])
        }

    def add(self, key: tuple[str, ...], row: dict[str, Any], targets: np.ndarray, found: np.ndarray) -> None:
        """The predictions first: a line in the table says that they are there."""
        np.savez_compressed(content := io.BytesIO(), targets=targets, found=found)
        disk.write_file(self.predictions(key), content.getbuffer())
        self.rows[key] = {name: str(row.get(name, "")) for name in COLUMNS}
        table = csv.DictWriter(text := io.StringIO(), COLUMNS)
        table.writeheader()
        table.writerows(self.rows.values())
        disk.write_file(self.path, text.getvalue().encode())

    def load(self, key: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.predictions(key)) as kept:
            return kept["targets"], kept["found"]


class Table:
    """What was found on one set of labels, {row: {budget: (draws, examples, ...)}}, of the draws that all
    rows have, and its scores."""

    def __init__(
        self, results: Results, data: str, shown: dict[str, tuple[str, str]], budgets: list[int], n_seeds: int
    ):
        self.found: dict[str, dict[int, np.ndarray]] = {row: {} for row in shown}
        self.targets = np.empty(0)
        for budget in budgets:
            keys = {row: (data, model, kind, str(budget)) for row, (model, kind) in shown.items()}
            there = {
                row: [s for s in range(n_seeds) if (*key, str(s)) in results.rows]
                for row, key in keys.items()
            }
            rows = [row for row, seeds in there.items() if seeds]
            for row in rows:
                seeds = [seed for seed in there[row] if all(seed in there[other] for other in rows)]
                loaded = [results.load((*keys[row], str(seed))) for seed in seeds]
                if loaded:
                    self.targets = loaded[0][0]
                    self.found[row][budget] = np.stack([found for _, found in loaded])
        self.found = {row: cells for row, cells in self.found.items() if cells}
        if not self.found:
            raise UserError(f"{results.path}: no run in it yet, so there is nothing to report")
        self.is_classes = self.targets.dtype.kind == "i"
        self.figure = "accuracy" if self.is_classes else "R squared"
        self.weights = statistics.resamples(len(self.targets))
        self.scores = {
            row: {
                budget: statistics.mean_score(self.values(found), self.weights)
                for budget, found in cells.items()
            }
            for row, cells in self.found.items()
        }
        self.budgets = sorted({budget for cells in self.found.values() for budget in cells})

    def values(self, found: np.ndarray) -> np.ndarray:
        """What an example adds to the score, (draws, examples)."""
        if self.is_classes:
            return (found.argmax(-1) == self.targets).astype(np.float32)
        return 1 - (found - self.targets) ** 2 / self.targets.var()

    def f1(self, row: str, budget: int) -> Score:
        found = self.found[row][budget]
        return statistics.macro_f1(found.argmax(-1), self.targets, found.shape[-1], self.weights)

    def points(self, row: str) -> list[tuple[float, Estimate]]:
        return [(budget, score.level()) for budget, score in self.scores[row].items()]
