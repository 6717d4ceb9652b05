"""Files of the user to text: lines, tables and documents.

Everything is read as a stream, so memory does not grow with the size of a file. A mistake in a
file is a UserError that names the file and the line.
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
LONGEST_DOCUMENT = 2**20  # characters; a longer document is cut into several
LONGEST_LINE = 2**24  # bytes, and characters of a field; a longer line or field is refused

# What is called with the error of each broken line, which is then left out.
Report = Callable[[UserError], None] | None


def read_lines(
    path: Path, piece: int | None = None, report: Report = None
) -> Iterator[tuple[int, str]]:
    """Read a text file line by line.

    Args:
        path: the file, perhaps compressed (.gz); "-" is standard input.
        piece: where given, a line of more bytes comes in pieces of this size with the same number;
            otherwise a line of more than LONGEST_LINE bytes is broken.
        report: called for each line that is broken, that is, too long or not text in UTF-8.

    Yields:
        (line number from 1, line with its line break)

    Raises:
        UserError: the file cannot be read, or a line is broken and there is no `report`.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    limit = piece or LONGEST_LINE
    number = 1
    try:
        with _open(path) as file:
            raw = None
            while raw != b"":  # the end of the file
                raw = file.readline(limit)
                text, problem = _decode(decoder, raw)
                if piece is None and len(raw) == limit and not raw.endswith(b"\n"):
                    problem = problem or f"a line of more than {LONGEST_LINE:,} bytes"
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(limit)
                    decoder.reset()
                if problem:
                    _report_or_raise(f"{path}:{number}: {problem}", report)
                elif raw:
                    yield number, text
                number += raw.endswith(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _open(path: Path) -> contextlib.AbstractContextManager:
    if str(path) == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _decode(decoder: codecs.IncrementalDecoder, raw: bytes) -> tuple[str, str]:
    """(text, "") of some bytes, or ("", what is wrong with them); no bytes mean the end."""
    try:
        text = decoder.decode(raw, final=not raw)
    except UnicodeDecodeError:
        decoder.reset()
        return "", "not UTF-8 text; convert it, for example with iconv"
    return text, "a NUL byte; this is no text file in UTF-8" if "\0" in text else ""


def _report_or_raise(message: str, report: Report) -> None:
    if report is None:
        raise UserError(message) from None
    report(UserError(message))


def text_suffix(path: Path) -> str:
    """The suffix without compression: ".jsonl" of reviews.jsonl and of reviews.jsonl.gz."""
    uncompressed = path.with_suffix("") if path.suffix == ".gz" else path
    return uncompressed.suffix.lower()


def read_table(path: Path, report: Report = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a .jsonl, .csv or .tsv file, perhaps compressed (.gz), row by row.

    The first line of a .csv or .tsv file names the columns. In a .tsv file every tab separates two
    fields, and quotes are ordinary characters. For `report` see `read_lines`.

    Yields:
        (number of the row's last line, {column: value})

    Raises:
        UserError: the file cannot be read, or a row is broken and there is no `report`.
    """
    return (_read_jsonl if text_suffix(path) == ".jsonl" else _read_csv)(path, report)


def _read_jsonl(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path, report=report):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "\\ud" in line.lower():  # half of a surrogate pair cannot be encoded as UTF-8
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            _report_or_raise(f"{path}:{number}: broken JSON: {error}", report)
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            problem = 'each line must be a JSON object such as {"text": "..."}'
            _report_or_raise(f"{path}:{number}: {problem}", report)


def _read_csv(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    line_number = 0  # csv's own count misses the lines that read_lines left out

    def lines() -> Iterator[str]:
        nonlocal line_number
        for number, line in read_lines(path, report=report):
            line_number = number
            yield line

    csv.field_size_limit(LONGEST_LINE)
    if text_suffix(path) == ".tsv":
        reader = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines(), strict=True)

    header = None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            _report_or_raise(f"{path}:{line_number}: {error}", report if header else None)
            continue
        if header is None:
            if not row or len(set(row)) < len(row):
                raise UserError(f"{path}:1: the first line must name the columns, each once")
            header = row
        elif row is None:
            return
        elif row and len(row) != len(header):
            problem = f"{len(row)} fields, but the first line names {len(header)}"
            _report_or_raise(f"{path}:{line_number}: {problem}", report)
        elif row:
            yield line_number, dict(zip(header, row, strict=True))


def read_documents(path: Path) -> Iterator[str]:
    """Read the documents of a file, each of at most LONGEST_DOCUMENT characters.

    In a table the documents are the column or field `text`. In plain text, blank lines separate
    documents; in a file without blank lines, each line is a document.

    Raises:
        UserError: the file cannot be read or is broken, or a row of a table has no `text`.
    """
    if text_suffix(path) not in TABLE_SUFFIXES:
        yield from _read_plain_text(path)
        return
    for number, record in read_table(path):
        text = record.get("text")
        if not isinstance(text, str):
            fields = ", ".join(map(repr, record)) or "nothing"
            problem = f"a field 'text' with text is needed; there is {fields}"
            raise UserError(f"{path}:{number}: {problem}")
        for start in range(0, len(text) or 1, LONGEST_DOCUMENT):
            yield text[start : start + LONGEST_DOCUMENT]


def _read_plain_text(path: Path) -> Iterator[str]:
    line_is_document = not _has_blank_lines(path)
    pieces: list[str] = []  # of the current document
    size = 0
    last_number = 0
    for number, text in read_lines(path, LONGEST_DOCUMENT):
        is_blank = not text.strip() and number != last_number  # else it continues the last line
        if pieces and (line_is_document or is_blank or size + len(text) > LONGEST_DOCUMENT):
            yield "".join(pieces)
            pieces = []
            size = 0
        if text.strip():
            pieces.append(text)
            size += len(text)
        last_number = number
    if pieces:
        yield "".join(pieces)


def _has_blank_lines(path: Path) -> bool:
    """Whether a blank line stands between two lines of text."""
    seen_text = False
    seen_blank = False
    last_number = 0
    for number, text in read_lines(path, LONGEST_DOCUMENT):
        if text.strip():
            if seen_blank:
                return True
            seen_text = True
        elif seen_text and number != last_number:
            seen_blank = True
        last_number = number
    return False


def find_files(paths: Iterable[str]) -> list[Path]:
    """List the files among `paths`, and the .txt files and tables in the folders among them.

    Raises:
        UserError: a path does not exist, is no regular file, or is a folder without text files.
    """
    suffixes = (".txt", *TABLE_SUFFIXES)
    files: list[Path] = []
    for path in map(Path, paths):
        try:
            path.stat()
        except (OSError, ValueError):
            raise UserError(f"{path}: no such file or folder") from None
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and text_suffix(p) in suffixes]
            if not inside:
                names = ", ".join(suffixes)
                raise UserError(f"{path}: no {names} file (or .gz of one) in this folder")
            files += sorted(inside)
        else:
            raise UserError(f"{path}: no regular file; use - for standard input")
    return files
