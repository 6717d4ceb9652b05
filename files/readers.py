"""Files to text: lines, tables and documents of the user's files, and the default corpus with its labels.

Everything is read as a stream, so that memory does not grow with a corpus. What the user got wrong is a
UserError that names the file and the line.
"""

import codecs
import contextlib
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from files.disk import UserError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
# Characters: a longer text is cut for pretraining, so that none has to fit into memory.
LONGEST_DOCUMENT = 2**20
LONGEST_LINE = (
    2**24
)  # bytes of a line, and characters of a field, that has to: a longer one is refused


Report = Callable[[UserError], None] | None


def read_lines(
    path: Path, piece: int | None = None, report: Report = None
) -> Iterator[tuple[int, str]]:
    """(line number, line with its end) of a file, or of standard input where path is "-"; lines longer than
    `piece` bytes, if it is given, come in pieces of the same number.

    A line that is not UTF-8 text, or longer than LONGEST_LINE without being cut, goes to `report` as a
    UserError and is left out; without `report` the error is raised, as it always is for a file that cannot be
    read.
    """
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with _open(path) as handle:
            while True:
                raw, problem, text = handle.readline(piece or LONGEST_LINE), "", ""
                try:
                    text = decoder.decode(raw, final=not raw)
                    problem = "a NUL byte; this is no text file in UTF-8" if "\0" in text else ""
                except UnicodeDecodeError:
                    problem = "not UTF-8 text; convert it, for example with iconv"
                    decoder.reset()
                if piece is None and len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                    problem = problem or f"a line of more than {LONGEST_LINE:,} bytes"
                    while raw and not raw.endswith(b"\n"):
                        raw = handle.readline(LONGEST_LINE)
                    decoder.reset()
                if problem:
                    _complain(f"{path}:{number}: {problem}", report)
                elif raw:
                    yield number, text
                if not raw:
                    return
                number += raw.endswith(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _open(path: Path) -> contextlib.AbstractContextManager:
    if str(path) == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _complain(problem: str, report: Report) -> None:
    if report is None:
        raise UserError(problem) from None
    report(UserError(problem))


def text_suffix(path: Path) -> str:
    """.jsonl for reviews.jsonl and for reviews.jsonl.gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def read_table(path: Path, report: Report = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {column: value}) of a .jsonl, .csv or .tsv file, each perhaps .gz.

    A .csv or .tsv begins with a line of column names. In a .tsv a tab always parts fields and quotes are
    text. A broken line goes to `report`, as in `read_lines`.
    """
    if text_suffix(path) == ".jsonl":
        for number, line in read_lines(path, report=report):
            if line.strip():
                try:
                    record = json.loads(line)
                    if "\\ud" in line.lower():  # half a character has no UTF-8
                        json.dumps(record, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    _complain(f"{path}:{number}: broken JSON: {error}", report)
                    continue
                if isinstance(record, dict):
                    yield number, record
                else:
                    wanted = 'each line must be a JSON object such as {"text": "..."}'
                    _complain(f"{path}:{number}: {wanted}", report)
        return
    csv.field_size_limit(LONGEST_LINE)
    dialect = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if text_suffix(path) == ".tsv"
        else {"strict": True}
    )
    at = 0  # the last line read: csv's own count misses those that were left out

    def lines() -> Iterator[str]:
        nonlocal at
        for at, line in read_lines(path, report=report):  # noqa: B007
            yield line

    reader = csv.reader(lines(), **dialect)

    def next_row(report: Report) -> list[str] | None:
        while True:
            try:
                return next(reader, None)
            except csv.Error as error:
                _complain(f"{path}:{at}: {error}", report)

    header = next_row(None)
    if not header or len(set(header)) < len(header):
        raise UserError(f"{path}:1: the first line must name the columns, each once")
    while (row := next_row(report)) is not None:
        if row and len(row) != len(header):
            _complain(
                f"{path}:{at}: {len(row)} fields, but the first line names {len(header)}", report
            )
        elif row:
            yield at, dict(zip(header, row, strict=True))


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file: field or column `text` of a table; in plain text, blank lines part
    documents, or, in a file without blank lines, each line is one."""
    if text_suffix(path) in TABLE_SUFFIXES:
        for number, record in read_table(path):
            if not isinstance(record.get("text"), str):
                have = ", ".join(map(repr, record)) or "nothing"
                raise UserError(
                    f"{path}:{number}: a field 'text' with text is needed; there is {have}"
                )
            for first in range(0, len(record["text"]) or 1, LONGEST_DOCUMENT):
                yield record["text"][first : first + LONGEST_DOCUMENT]
        return
    by_line, pieces, size, last = not _has_blank_lines(path), [], 0, 0
    for number, text in read_lines(path, LONGEST_DOCUMENT):
        blank = not text.strip() and number != last
        if pieces and (by_line or blank or size + len(text) > LONGEST_DOCUMENT):
            yield "".join(pieces)
            pieces, size = [], 0
        last = number
        if text.strip():
            pieces.append(text)
            size += len(text)
    if pieces:
        yield "".join(pieces)


def _has_blank_lines(path: Path) -> bool:
    """Whether a blank line stands between two lines of text."""
    seen_text, seen_blank, last = False, False, 0
    for number, text in read_lines(path, LONGEST_DOCUMENT):
        if text.strip() and seen_blank:
            return True
        seen_text = seen_text or bool(text.strip())
        seen_blank = seen_text and not text.strip() and number != last
        last = number
    return False


def find_files(paths: Iterable[str]) -> list[Path]:
    """The files behind paths: files, and the text files of folders, sorted."""
    files: list[Path] = []
    for path in map(Path, paths):
        inside = [path]
        try:
            path.stat()
        except (OSError, ValueError):
            raise UserError(f"{path}: no such file or folder") from None
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: no regular file, which is read twice; - is standard input")
        if path.is_dir():
            suffixes = (".txt", *TABLE_SUFFIXES)
            inside = sorted(
                p for p in path.rglob("*") if p.is_file() and text_suffix(p) in suffixes
            )
            if not inside:
                raise UserError(
                    f"{path}: no {', '.join(suffixes)} file (or .gz of one) in this folder"
                )
        files += inside
    return files
