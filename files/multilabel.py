"""Files of examples with any number of labels each.

Such labels are a list in JSON, texts with `|` between them in a table, or several columns of 0 and
1. A file is read so with --task multilabel, or if it has a list in each row, not all of one label,
or if several columns are named; a text is cut at `|` only with --task multilabel.
"""

from pathlib import Path
from typing import Any

import numpy as np

from files.disk import UserError
from files.readers import Row

SWITCHES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def merge_columns(path: Path, rows: list[Row], label: str | None) -> list[Row]:
    """The columns of 0 and 1 that --label-column a,b,c names, as one column of tuples."""
    names = [name.strip() for name in (label or "").split(",")]
    if len(names) < 2 or not rows or label in rows[0][1]:
        return rows
    if missing := [name for name in names if name not in rows[0][1]]:
        raise UserError(f"{path}: --label-column {label}: there is no column {missing[0]!r}")

    def merge(line: int, row: dict[str, Any]) -> Row:
        labels = []
        for name in names:
            value = row.pop(name, None)
            switch = SWITCHES.get(str(value).strip().lower())
            if switch is None:
                raise UserError(f"{path}:{line}: column {name!r} has {value!r}, neither 0 nor 1")
            labels += [name] * switch
        return line, row | {label: tuple(labels)}

    return [merge(*row) for row in rows]


def find_label_sets(rows: list[Row], label: str | None, task: str | None) -> list[Row]:
    """Turn the values of the label column into tuples if the examples may have several labels."""
    values = [row.get(label) for _, row in rows]
    are_lists = all(isinstance(value, list) for value in values)
    are_several = are_lists and any(len(value) != 1 for value in values)
    if task != "multilabel" and (task or not are_several):
        return rows

    def split(value: Any) -> Any:
        if isinstance(value, str) and not are_lists:
            value = [part for part in value.split("|") if part.strip()]
        if value is None or isinstance(value, tuple):
            return value
        return tuple(value) if isinstance(value, list) else (value,)

    return [(line, row | {label: split(row.get(label))}) for line, row in rows]


def to_targets(label_sets: list[tuple[str, ...]], names: list[str]) -> np.ndarray:
    """(examples, names) float32, 1 where an example has a label."""
    return np.array([[name in labels for name in names] for labels in label_sets], np.float32)
