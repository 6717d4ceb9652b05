"""The examples of a table: their columns, guessed where the user names none, and their values."""

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import readers
from files.disk import UserError
from files.hub_datasets import find_dataset, is_hub_name
from files.multilabel import find_label_sets, merge_columns, to_targets
from files.readers import TABLES, Report, Row, is_text, read_table, refuse, table_format

# Usual column names, the most likely first. Without one of them the length of the values decides.
TEXT_NAMES = ("text", "sentence", "review", "content", "document", "body", "message", "title")
PAIR_NAMES = (
    *(("text", "text_pair"), ("text_a", "text_b"), ("text1", "text2")),
    *(("sentence1", "sentence2"), ("sentence_a", "sentence_b")),
    *(("question1", "question2"), ("premise", "hypothesis"), ("question", "answer")),
    ("question", "sentence"),
)
LABEL_NAMES = ("label", "class", "category", "target", "sentiment", "stars", "rating", "score", "y")
LABEL_NAMES += ("labels",)
N_GUESS_ROWS = 200  # rows of which the length of the values is compared


class Columns(NamedTuple):
    """The names of the columns; None of one that is to be guessed, or that does not exist."""

    text: str | None = None
    pair: str | None = None  # the second text
    label: str | None = None


class Item(NamedTuple):
    """A text, or a word, of a file; `source` is its file and line, `pair` its second text."""

    source: str
    text: str
    pair: str | None = None
    label: str | tuple[str, ...] | None = None  # a tuple where there may be several


def choose_columns(path: Path, rows: list[Row], columns: Columns) -> Columns:
    """Guess the columns that are not named, from the first of the rows of a file.

    The label is the most usual label name. The texts are a usual pair of names, else a usual name,
    else the column with the longest values.

    Raises:
        UserError: A column that is named does not exist, or no text column is left.
    """
    if not rows:
        raise UserError(f"{path}: no examples in it")
    names = list(rows[0][1])
    for kind, name in columns._asdict().items():
        if name is not None and name not in names:
            raise UserError(f"{path}: --{kind}-column {name}: the columns are {', '.join(names)}")

    def text_length(name: str) -> int:
        values = [row.get(name) for _, row in rows[:N_GUESS_ROWS]]
        return sum(len(text) for text in values if is_text(text) and math.isnan(to_number(text)))

    text, pair, label = columns
    usual = {name.lower(): name for name in names if name not in columns}
    label = label or next((usual.pop(name) for name in LABEL_NAMES if name in usual), None)
    if not text and not pair:
        pairs = ((usual[a], usual[b]) for a, b in PAIR_NAMES if a in usual and b in usual)
        text, pair = next(pairs, (None, None))
    text = text or next((usual[name] for name in TEXT_NAMES if name in usual), None)
    text = text or max(usual.values(), key=text_length, default=None)
    if text is None:
        raise UserError(f"{path}: no text column; name it with --text-column")
    print(f"{path}: text {text!r}{f' with {pair!r}' if pair else ''}", file=sys.stderr)
    return Columns(text, pair, label)


def read_examples(
    path: Path, columns: Columns, task: str | None = None
) -> tuple[list[Item], Columns]:
    """Read a table of labelled examples, and choose those of its columns that are not named.

    A row without a label is an error; of the hub, which the user cannot correct, it is left out.

    Raises:
        UserError: The file is no table, lacks a column, or has a row without a text or a label.
    """
    if table_format(path) is None:
        raise UserError(f"{path}: labelled examples come as {TABLES} (or .gz or .zst of one)")
    rows = list(read_table(path, column=columns.text))
    rows = merge_columns(path, rows, columns.label)
    columns = choose_columns(path, rows, columns)
    rows = find_label_sets(rows, columns.label, task)
    if columns.label is None:
        names = ", ".join(rows[0][1])
        raise UserError(f"{path}: no label column among {names}; name it with --label-column")
    errors: list[UserError] = []
    items = list(to_items(path, rows, columns, errors.append if is_hub_name(path) else refuse))
    if errors and not items:
        raise errors[0]
    if errors:
        print(f"{errors[0]}; {len(errors):,} such examples are left out")
    return items, columns


def read_tests(
    train: Path, test: Path | None, columns: Columns, task: str | None
) -> tuple[list[Item], np.ndarray | None]:
    """Read the examples of `find_tests`, and the split of each if there are several."""
    tests = find_tests(train, test, columns.label)
    items = [read_examples(path, columns, task)[0] for path in tests]
    splits = [path.name.rpartition(":")[2] for path in tests]
    parts = np.repeat(splits, list(map(len, items))) if len(tests) > 1 else None
    return list(itertools.chain(*items)), parts


def find_tests(train: Path, test: Path | None, *labels: str) -> list[Path]:
    """The file or the splits of the hub to test on: those named; without a name the test splits, or
    the validation splits where the labels of those are hidden. Beside a file there are none.
    """
    name = test or train
    if not is_hub_name(name):
        return [test] if test else []
    dataset = find_dataset(name)
    if test and dataset.split:
        return [test]
    others = [split for split in dataset.splits if split != (dataset.split or "train")]
    for kind in ("test", "validation|valid|val|dev"):
        tests = [Path(f"{dataset.name}:{s}") for s in others if re.match(f"({kind})(_|$)", s)]
        if tests := [test for test in tests if _has_labels(test, labels)]:
            print(f"the test set: {', '.join(map(str, tests))}")
            return tests
    if test:
        raise UserError(f"{test}: no split to test on; its splits are {', '.join(dataset.splits)}")
    return []


def _has_labels(path: Path, labels: tuple[str, ...]) -> bool:
    """Whether one of the columns has labels: benchmarks replace hidden ones by -1."""
    rows = [row for _, row in itertools.islice(read_table(path), N_GUESS_ROWS)]
    return any(row.get(label) not in (None, -1) for label in labels for row in rows)


def to_items(
    path: Path, rows: Iterable[Row], columns: Columns, report: Report = refuse
) -> Iterator[Item]:
    """Take the texts, and the label if it has a column, out of each row of a file.

    `report` is called for each row whose text or label is missing or blank.
    """
    for line, row in rows:
        text, pair, label = (row.get(name) for name in columns)
        label = _to_label(label)
        if not is_text(text):
            problem = f"no text in field {columns.text!r}"
        elif columns.pair and not is_text(pair):
            problem = f"no text in field {columns.pair!r}"
        elif columns.label and label is None:
            problem = f"no label in field {columns.label!r}"
        else:
            yield Item(f"{path}:{line}", text, pair, label)
            continue
        report(UserError(f"{path}:{line}: {problem}"))


def _to_label(value: Any) -> str | tuple[str, ...] | None:
    """A label, or the only one of a list, as text, 1.0 as 1; None for a value that is no label."""
    if isinstance(value, tuple):
        labels = tuple(map(_to_label, value))
        return None if None in labels else labels
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_number = isinstance(value, (int, float)) and not math.isnan(value)
    text = str(value).strip() if is_number or is_text(value) else None
    whole = re.fullmatch(r"(-?\d+)\.0+", text or "")
    return whole[1] if whole else text


def guess_task(labels: Iterable[str]) -> str:
    """Names are classes, and so are integers most of whose values occur more than once.

    A few other labels among many numbers, such as N/A, do not count.
    """
    counts = Counter(labels)
    numbers = {label: x for label in counts if not math.isnan(x := to_number(label))}
    if 2 * len(numbers) <= len(counts):
        return "classify"
    n_repeated = sum(counts[label] > 1 for label in numbers)
    is_integer = all(value.is_integer() for value in numbers.values())
    is_class = is_integer and 2 * n_repeated > len(numbers)
    task, other = ("classify", "regress") if is_class else ("regress", "classify")
    print(f"the labels are numbers; guessed: --task {task}; otherwise give --task {other}")
    return task


def to_number(text: str) -> float:
    """The number that a text is, if float32 can hold it; otherwise NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if abs(value) < 3e38 else math.nan


def choose_names(path: Path, items: list[Item], column: str, task: str | None) -> list[str] | None:
    """The names of the classes, None if the labels are numbers; UserError if there is one class."""
    labels = [item.label for item in items]
    names = None
    classes = "numbers (regression)"
    if isinstance(labels[0], tuple):
        names = sorted(set().union(*labels))
    elif (task or guess_task(labels)) == "classify":
        names = _class_names(path, labels, column)
    if names is not None:
        if len(names) < 2:
            raise UserError(f"{path}: fewer than two classes: {', '.join(map(repr, names))}")
        classes = names if len(names) <= 10 else f"{len(names)} classes"
    print(f"{path}: {len(items):,} examples; label {column!r}: {classes}")
    return names


def _class_names(path: Path, labels: list[str], column: str) -> list[str]:
    """The distinct labels: as the file orders them, or else numbers by value, then names."""
    counts = Counter(labels)
    single = [label for label in counts if counts[label] == 1]
    if single and len(counts) > 1:
        names = ", ".join(map(repr, single[:10]))
        if len(single) == len(labels):
            raise UserError(f"{path}: each label occurs once only, such as {names}")
        print(f"{path}: classes with one example only, for training: {names}")
    usual = sorted(counts, key=lambda name: (np.nan_to_num(to_number(name), nan=np.inf), name))
    order = readers.class_names(path, column)
    return sorted(usual, key=lambda name: order.index(name) if name in order else len(order))


def find_targets(items: list[Item], names: list[str] | None) -> np.ndarray:
    """The targets of a LabeledDataset. Raises UserError for a label that is none of the names, or
    no number if these are None."""
    labels = [item.label for item in items]
    is_multilabel = isinstance(labels[0], tuple)
    numbers = {name: i for i, name in enumerate(names or [])}
    for source, *_, label in items:
        if names is None and math.isnan(to_number(label)):
            raise UserError(f"{source}: label {label!r} is no number, which --task regress needs")
        if names and not numbers.keys() >= set(label if is_multilabel else [label]):
            known = ", ".join(map(repr, names[:20]))
            raise UserError(f"{source}: label {label!r} is none of the training labels {known}")
    if names is None:
        return np.array(list(map(to_number, labels)), np.float32)
    if is_multilabel:
        return to_targets(labels, names)
    return np.array([numbers[label] for label in labels])
