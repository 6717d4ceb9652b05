"""The results of an experiment on disk (results.csv and predictions/), and their scores."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import statistics
from analysis.baselines import WITH_NGRAMS, goodness
from analysis.statistics import Estimate, Score
from files import disk
from files.disk import UserError, file_name
from files.run_folder import code_digest

USE_PRETRAINING = ("pretrained", WITH_NGRAMS, "frozen")  # all other methods are baselines


class Run(NamedTuple):
    """The key of a result: one method, fitted on one draw of the labels."""

    data: str  # "mr", "imdb", or the name of the user's file
    model: str
    method: str
    labels: int
    seed: int
    fingerprint: str  # see experiment.fingerprint


COLUMNS = (*Run._fields, "accuracy", "macro_f1", "rmse", "seconds")
COLUMNS += ("choice", "on_edge", "validation", "code")
# The code that results depend on; results.csv has its hash.
CODE = ("*.py", "analysis/*.py", "files/*.py", "kernels/*.py")

Cell = tuple[str, int]  # of the report: the name of a method, and the number of labels
Plan = dict[Cell, list[Run]]  # a run per seed and draw


class Results:
    """The finished runs in an output folder: a table with one line per run, and their predictions.
    Raises UserError if results.csv has other columns."""

    def __init__(self, out: Path):
        self.path = out / "results.csv"
        self.folder = out / "predictions"
        self.folder.mkdir(exist_ok=True)
        self.code = code_digest(CODE)
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

        values = dict.fromkeys(COLUMNS, "") | run._asdict() | metrics | {"code": self.code}
        self.lines[tuple(map(str, run))] = {name: str(values[name]) for name in COLUMNS}
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        table.writerows(self.lines.values())
        disk.write_file(self.path, text.getvalue().encode())

    def n_of_other_code(self, plan: Plan) -> int:
        """How many runs of the plan were finished by an earlier version of this repository."""
        keys = {tuple(map(str, run)) for runs in plan.values() for run in runs}
        return sum(self.lines[key]["code"] != self.code for key in keys & self.lines.keys())

    def load(self, run: Run) -> np.ndarray:
        """Probabilities (N, K) or numbers (N,) for the test examples."""
        with np.load(self.predictions_path(run)) as arrays:
            return arrays["predictions"]

    def predictions_path(self, run: Run) -> Path:
        return self.folder / file_name("-".join(map(str, run)) + ".npz")


class Table:
    """What the cells scored whose runs have all finished. Models that share a cell are pretraining
    seeds of one method.

    Args:
        targets: Of the test examples.
        probes: Those of the sentences that every run predicted after the test examples.

    Raises:
        UserError: There is no such cell.
    """

    def __init__(self, results: Results, plan: Plan, targets: np.ndarray, probes: np.ndarray):
        self.metric = "accuracy" if targets.dtype.kind == "i" else "R squared"
        self.probes: dict[Cell, np.ndarray] = {}  # share of the runs that are right
        n_on_edge = Counter()
        values: dict[Cell, np.ndarray] = {}  # (S, D, N), see analysis/statistics.py
        for cell, runs in plan.items():
            if any(run not in results for run in runs):
                continue
            predictions = [results.load(run) for run in runs]
            by_run = np.stack([goodness(p[: len(targets)], targets) for p in predictions])
            by_run = by_run.astype(np.int8 if self.metric == "accuracy" else np.float32)
            if self.metric == "R squared":
                by_run = 1 + by_run / targets.var()
            n_seeds = len({run.model for run in runs})
            values[cell] = by_run.reshape(n_seeds, -1, len(targets))
            of_probes = [goodness(p[len(targets) :], probes) for p in predictions]
            self.probes[cell] = np.mean(of_probes, axis=0)
            lines = [results.lines[tuple(map(str, run))] for run in runs]
            n_on_edge[cell[0]] += sum(line["on_edge"] == "True" for line in lines)
        if not values:
            raise UserError(f"{results.path}: no method has finished: there is nothing to report")

        n_runs = Counter(name for (name, _), runs in plan.items() for _ in runs)
        # "method: runs that chose the edge of a grid of all runs"
        self.on_edge = [
            f"{name} ({n} of {n_runs[name]} runs)" for name, n in n_on_edge.items() if n
        ]
        self.blocks = statistics.choose_blocks([v.mean((0, 1)) for v in values.values()], targets)
        self.scores = {cell: Score(v, self.blocks) for cell, v in values.items()}
        self.estimates = {cell: score.estimate(maximum=1) for cell, score in self.scores.items()}
        self.budgets = sorted({n for _, n in self.scores})
        self._compare_with_baselines({name: runs[0].method for (name, _), runs in plan.items()})

    def _compare_with_baselines(self, methods: dict[str, str]) -> None:
        """Set the best baseline {labels: name} of each budget, and the differences of the others
        to it, whose intervals allow for the choice among all baselines and all models."""
        names = dict.fromkeys(name for name, _ in self.scores)
        baselines = [name for name in names if methods[name] not in USE_PRETRAINING]
        entries = [name for name in names if name not in baselines]
        n_models = max(Counter(methods[name] for name in entries).values(), default=1)
        self.n_intervals = n_models * max(1, len(baselines))
        self.best: dict[int, str] = {}
        self.leads: dict[Cell, Estimate] = {}
        for n in self.budgets:
            means = {x: self.scores[x, n].mean for x in baselines if (x, n) in self.scores}
            if means:
                self.best[n] = max(means, key=means.get)
        for name, n in self.scores:
            if name in entries and n in self.best:
                difference = self.scores[name, n] - self.scores[self.best[n], n]
                self.leads[name, n] = difference.estimate(n_intervals=self.n_intervals)

    def write(self, path: Path) -> None:
        """A line per cell: its score, and its difference to the best baseline, with intervals."""
        text = io.StringIO()
        table = csv.writer(text)
        interval = ("low", "high", "best_baseline", "lead", "lead_low", "lead_high")
        table.writerow(("method", "labels", self.metric, *interval))
        for (name, n), estimate in self.estimates.items():
            lead = self.leads.get((name, n))
            difference = (self.best[n], *lead) if lead else [""] * 4
            table.writerow((name, n, *estimate, *difference))
        disk.write_file(path, text.getvalue().encode())
