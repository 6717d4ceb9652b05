"""What predict.py answers, a stream of arguments, lines or rows of a table; and what it writes."""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from files import disk
from files.columns import N_GUESS_ROWS, Columns, Item, choose_columns, to_items
from files.disk import UserError
from files.readers import TABLES, Report, read_lines, read_table, table_format
from files.sequences import is_sequence, split_items

Answer = dict[str, Any]  # one field of the JSON output: "answers", "value", "entities" or "masks"


def read_items(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    """Read the texts in order.

    Args:
        args: The flags `texts`, `file`, `text_column` and `pair_column`.
        report: Called with an error for each text that is broken, and for what ends the reading,
            such as a damaged file: the texts before it are answered all the same.
    """
    n_items = 0
    try:
        for item in _read_all(args, report):
            n_items += 1
            yield item
        if n_items == 0:
            raise UserError(f"{args.file}: no texts in it")
    except UserError as error:
        report(error)


def _read_all(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    path = args.file
    is_table = path is not None and table_format(path) is not None
    if not is_table and (args.text_column or args.pair_column):
        raise UserError(f"--text-column and --pair-column belong to a --file of {TABLES}")
    if path is None:
        yield from (Item(f"text {i}", text) for i, text in enumerate(args.texts, 1))
    elif is_table:
        rows = read_table(path, report, args.text_column, may_mask=True)
        first_rows = list(itertools.islice(rows, N_GUESS_ROWS))
        columns = Columns(args.text_column, args.pair_column)
        columns = choose_columns(path, first_rows, columns)._replace(label=None)
        yield from to_items(path, itertools.chain(first_rows, rows), columns, report)
    else:
        for number, line in read_lines(path, report):
            if not line.isspace():
                yield Item(f"{path}:{number}", line.strip())


def to_json(item: Item, answer: Answer) -> str:
    pair = {} if item.pair is None else {"pair": item.pair}
    text = {"items": split_items(item.text)} if is_sequence(item.text) else {"text": item.text}
    record = {"place": item.source, **text, **pair, **answer}
    return json.dumps(record, ensure_ascii=False)


def to_line(item: Item, answer: Answer) -> str:
    """The answer and the text in one line, separated by tabs, which cut and awk understand."""
    [(kind, value)] = answer.items()
    if kind == "value":
        columns = [f"{value:.4g}"]
    elif kind == "entities":
        columns = [f"{entity['type']} {entity['text']}" for entity in value] or ["-"]
    else:
        columns = []
        for choices in value if kind == "masks" else [value]:
            columns += ["/"] if columns else []  # between two masks
            columns += [f"{name} {p:.3f}" for name, p in map(dict.values, choices)] or ["-"]
    columns += [" ".join(text.split()) for text in (item.text, item.pair) if text is not None]
    return "\t".join(columns)


@contextlib.contextmanager
def npy_rows(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a row to a .npy file of float32 rows (n, width), which replaces an
    older file once all rows, at least one, are in it."""
    if path.is_dir():
        raise UserError(f"--embeddings {path}: this is a folder; name a file such as texts.npy")
    n_rows = 0

    def append(row: np.ndarray) -> None:
        nonlocal n_rows
        n_rows += 1
        file.write(np.ascontiguousarray(row, "<f4"))

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (0, width)}
            np.lib.format.write_array_header_1_0(file, header)
            yield append
            file.seek(0)  # the header has room for any number of rows
            np.lib.format.write_array_header_1_0(file, header | {"shape": (n_rows, width)})
        if n_rows:
            disk.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
