"""The texts that predict.py answers: arguments, lines, or the rows of a table, read as a stream."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from files.columns import LABEL_NAMES, choose_texts
from files.disk import UserError
from files.readers import TABLE_SUFFIXES, Report, read_lines, read_table, text_suffix

N_GUESS_ROWS = 200  # rows of a table from which its text column is guessed


class Item(NamedTuple):
    """A text, with its second text if it is a pair; `source` is its file and line."""

    source: str
    text: str
    pair: str | None = None


def read_items(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    """Read the texts in order.

    Args:
        args: The flags `texts`, `file`, `text_column` and `pair_column`.
        report: Called with an error for each text that is broken. The others are still read, also
            those before the point where a damaged file ends.

    Raises:
        UserError: The file has no texts, or a column that is named does not exist.
    """
    n_read = 0
    try:
        for item in _read_all(args, report):
            n_read += 1
            if _is_text(item.text) and (item.pair is None or _is_text(item.pair)):
                yield item
            else:
                report(UserError(f"{item.source}: no text"))
        if n_read == 0:
            raise UserError(f"{args.file}: no texts in it")
    except UserError as error:
        if n_read == 0:
            raise
        report(error)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_all(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    path = args.file
    is_table = path is not None and text_suffix(path) in TABLE_SUFFIXES
    if not is_table and (args.text_column or args.pair_column):
        suffixes = ", ".join(TABLE_SUFFIXES)
        raise UserError(f"--text-column and --pair-column belong to a --file of {suffixes}")
    if path is None:
        for i, text in enumerate(args.texts, 1):
            yield Item(f"text {i}", text)
    elif is_table:
        yield from _read_rows(path, args.text_column, args.pair_column, report)
    else:
        for line, text in read_lines(path, report=report):
            if text.strip():
                yield Item(f"{path}:{line}", text.strip())


def _read_rows(path: Path, text: str | None, pair: str | None, report: Report) -> Iterator[Item]:
    rows = read_table(path, report)
    first_rows = list(itertools.islice(rows, N_GUESS_ROWS))
    if not first_rows:
        return
    label = next((name for name in first_rows[0][1] if name.lower() in LABEL_NAMES), None)
    text, pair = choose_texts(path, first_rows, text, pair, label)
    print(f"{path}: text {text!r}{f' with {pair!r}' if pair else ''}", file=sys.stderr)
    for line, row in itertools.chain(first_rows, rows):
        yield Item(f"{path}:{line}", row.get(text), (row.get(pair) or "") if pair else None)
