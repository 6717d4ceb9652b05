"""The ten-minute track (docs/track.md): the score of a pretraining recipe, as a line to submit."""

import json
from datetime import date
from pathlib import Path
from typing import Any

from analysis.baselines import WITH_NGRAMS
from analysis.results import USE_PRETRAINING
from files.disk import UserError, reading

DATA = ("mr", "imdb")
FLAGS = ["--labels", "100,1000,all", "--methods"]
FLAGS += [
    f"{WITH_NGRAMS},pretrained,start,start+ngrams,random_weights,ngrams,lsa,spectral,majority"
]


def leads(scores: dict[str, dict[int, list[float]]]) -> list[float]:
    """By how much a network with its n-grams is ahead of the best baseline, for each number of
    labels; `scores` is what `analyze.main` returns."""
    baselines = [cells for method, cells in scores.items() if method not in USE_PRETRAINING]
    cells = scores[WITH_NGRAMS]
    return [cells[n][0] - max(baseline[n][0] for baseline in baselines) for n in sorted(cells)]


def line_to_submit(scores: dict[str, Any], runs: str, pretraining_time: tuple[float, str]) -> str:
    """A line of the table of records: the mean lead, that of each cell, and how it was measured.

    Args:
        scores: {data: what `analyze.main` returned}.
        runs: Pretraining seeds x draws.
        pretraining_time: See `duration`.
    """
    of_cells = [lead for of_data in scores.values() for lead in leads(of_data)]
    figures = [f"{lead:+.3f}" for lead in (sum(of_cells) / len(of_cells), *of_cells)]
    seconds, device = pretraining_time
    time = f"{seconds:.0f} s on {device}"
    return f"| {' | '.join(('NAME', *figures, runs, time, str(date.today()), 'COMMANDS'))} |"


def duration(model: Path) -> tuple[float, str]:
    """The seconds of a run of train.py, and the hardware that it used."""
    paths = (model / "metrics.json", model / "environment.json")
    if not all(path.is_file() for path in paths):
        raise UserError(f"--track: {model} is not a finished run of train.py")
    with reading(paths[0]):
        metrics, environment = (json.loads(path.read_bytes()) for path in paths)
        threads = f"{environment['threads']} threads"
        return metrics["seconds"], f"{environment['device']}, {threads}"
