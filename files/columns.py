"""The columns of a table of labelled examples: their names, guessed where the user gives none, and
their values.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from files.disk import UserError
from files.readers import TABLE_SUFFIXES, read_table, text_suffix

# Usual column names, the most likely first. Without one of them the length of the values decides.
TEXT_NAMES = (
    *("text", "sentence", "review", "content", "document", "body", "message", "title"),
    *("question", "premise"),
)
PAIR_NAMES = (
    *(("text", "text_pair"), ("text_a", "text_b"), ("text1", "text2")),
    *(("sentence1", "sentence2"), ("sentence_a", "sentence_b")),
    *(("question1", "question2"), ("premise", "hypothesis"), ("question", "answer")),
)
LABEL_NAMES = (
    *("label", "labels", "class", "category", "target"),
    *("sentiment", "stars", "rating", "score", "y"),
)
MOST_INTEGER_CLASSES = 20  # integers with more distinct values are regression targets


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of a table."""
    if text_suffix(path) not in TABLE_SUFFIXES:
        suffixes = ", ".join(TABLE_SUFFIXES)
        raise UserError(f"{path}: labelled examples come as {suffixes} (or .gz of one)")
    rows = list(read_table(path))
    if not rows:
        raise UserError(f"{path}: no examples in it")
    return rows


def choose_columns(
    path: Path, rows: list, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None, str]:
    """The columns of text, second text and label: those that are named, else a guess."""
    names = list(rows[0][1])
    _check_column(path, names, "--label-column", label)
    if label is None:
        usual = _usual_names(LABEL_NAMES, names, exclude=(text, pair))
        if not usual:
            columns = ", ".join(map(repr, names))
            raise UserError(f"{path}: no label column among {columns}; name it with --label-column")
        label = usual[0]
    return *choose_texts(path, rows, text, pair, label), label


def choose_texts(
    path: Path, rows: list, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None]:
    """Choose the columns of the text and, for pairs, of the second text.

    A text column that is not named (None) is guessed among those that are not the label: a usual
    pair of names, else a usual name, else the column with the longest values in the first of
    `rows`, which are (line number, row) of the file. Raises UserError if there is no such column.
    """
    names = list(rows[0][1])
    for flag, name in (("--text-column", text), ("--pair-column", pair)):
        _check_column(path, names, flag, name)
    if text is not None:
        return text, pair
    for usual_pair in PAIR_NAMES if pair is None else ():
        columns = _usual_names(usual_pair, names, exclude=(label,))
        if len(columns) == 2:
            return columns[0], columns[1]
    usual = _usual_names(TEXT_NAMES, names, exclude=(label, pair))
    others = [name for name in names if name not in (label, pair)]
    if not others:
        raise UserError(f"{path}: no text column beside {label!r}; name it with --text-column")

    def text_length(name: str) -> int:
        return sum(len(str(row.get(name, ""))) for _, row in rows[:200])

    return usual[0] if usual else max(others, key=text_length), pair


def _usual_names(usual: tuple[str, ...], names: list[str], exclude: tuple) -> list[str]:
    """The columns with a usual name, whatever their case, the most usual first."""
    by_lower_case = {name.lower(): name for name in reversed(names)}
    columns = [by_lower_case[name] for name in usual if name in by_lower_case]
    return [column for column in columns if column not in exclude]


def _check_column(path: Path, names: list[str], flag: str, name: str | None) -> None:
    if name is not None and name not in names:
        columns = ", ".join(map(repr, names))
        raise UserError(f"{path}: {flag} {name}: no such column; there are {columns}")


def read_columns(
    path: Path, rows: list, text: str, pair: str | None, label: str
) -> tuple[list[str], list[str] | None, list[str]]:
    """The texts, second texts and labels. Raises UserError if a field is missing or empty."""
    for line, row in rows:
        for name in (text, pair) if pair else (text,):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f"{path}:{line}: no text in field {name!r}")
        value = row.get(label)
        if value is None or isinstance(value, (dict, list)) or not str(value).strip():
            raise UserError(f"{path}:{line}: no label in field {label!r}")
    texts = [row[text] for _, row in rows]
    pairs = [row[pair] for _, row in rows] if pair else None
    return texts, pairs, [str(row[label]).strip() for _, row in rows]


def guess_task(labels: list[str]) -> str:
    """Names are classes, and so are integers with few distinct values."""
    values = [to_number(label) for label in set(labels)]
    if any(map(math.isnan, values)):
        return "classify"
    are_integers = all(value == int(value) for value in values)
    return "classify" if are_integers and len(values) <= MOST_INTEGER_CLASSES else "regress"


def to_number(text: str) -> float:
    """The finite number that a text is, or NaN."""
    try:
        with np.errstate(over="ignore"):
            value = float(np.float32(text))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
