"""Files of the user to text: lines, tables and documents.

Everything is read as a stream, so memory does not grow with the size of a file. A mistake in a
file is a UserError that names the file and the line.
"""

import contextlib
import csv
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from files.disk import UserError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
LONGEST_DOCUMENT = 2**20  # characters; a longer document is cut into several
LONGEST_LINE = 2**24  # characters; a longer line or field of a table is refused
NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # as "surrogateescape" decodes bytes that are not UTF-8

Report = Callable[[UserError], None]  # called for each broken line, which is then left out


def refuse(error: UserError) -> None:
    """What the first broken line is reported to by default: it ends the reading."""
    raise error


def read_lines(
    path: Path, report: Report = refuse, in_pieces: bool = False
) -> Iterator[tuple[int, str]]:
    """Read (line number from 1, line with its line break) of a text file.

    Args:
        path: A file, perhaps compressed (.gz); "-" is standard input.
        report: Called for each line that is not UTF-8. Such a line comes as an empty one.
        in_pieces: Give a line of more than LONGEST_LINE characters in pieces with the same number.

    Raises:
        UserError: The file cannot be read, or a line is too long.
    """
    number = 1
    try:
        with _open(path) as file:
            while text := file.readline(LONGEST_LINE):
                is_whole = text.endswith("\n") or len(text) < LONGEST_LINE
                if not is_whole and not in_pieces:
                    problem = f"a line of more than {LONGEST_LINE:,} characters"
                    raise UserError(f"{path}:{number}: {problem}")
                if NOT_TEXT.search(text):
                    problem = "not UTF-8 text, or a NUL byte; convert it, for example with iconv"
                    report(UserError(f"{path}:{number}: {problem}"))
                    text = "\n"
                yield number, text
                number += is_whole
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _open(path: Path) -> TextIO:
    encoding = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": "\n"}
    if str(path) == "-":
        return open(0, closefd=False, **encoding)
    return gzip.open(path, "rt", **encoding) if path.suffix == ".gz" else open(path, **encoding)


def text_suffix(path: Path) -> str:
    """The suffix without compression: ".jsonl" of reviews.jsonl and of reviews.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def is_text(value: Any) -> bool:
    """Whether the value of a field is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def read_table(path: Path, report: Report = refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read (number of the row's last line, {column: value}) of a .jsonl, .csv or .tsv file.

    The first line of a .csv or .tsv file names the columns. In a .tsv file every tab separates two
    fields, and quotes are ordinary characters. `report` is called for each row that is broken.
    """
    if text_suffix(path) == ".jsonl":
        return _read_jsonl(path, report)
    return _read_csv(path, report)


def _read_jsonl(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path, report):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # half of a surrogate pair cannot be encoded as UTF-8
                json.dumps(row, ensure_ascii=False).encode()
            if not isinstance(row, dict):
                raise ValueError('each line must be a JSON object such as {"text": "..."}')
        except (ValueError, RecursionError) as error:
            report(UserError(f"{path}:{number}: broken JSON: {error}"))
        else:
            yield number, row


def _read_csv(path: Path, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_LINE)
    lines = (line for _, line in read_lines(path, report))
    if text_suffix(path) == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)

    header: list[str] = []
    with contextlib.suppress(csv.Error):
        header = next(reader, [])
    if not header or len(set(header)) < len(header):
        raise UserError(f"{path}:1: the first line must name the columns, each once")
    while True:
        try:
            row = next(reader)
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields, but the first line names {len(header)}")
        except StopIteration:
            return
        except csv.Error as error:
            report(UserError(f"{path}:{reader.line_num}: {error}"))
            continue
        if row:
            yield reader.line_num, dict(zip(header, row, strict=True))


def read_documents(path: Path) -> Iterator[str]:
    """Read the documents of a file, each of at most LONGEST_DOCUMENT characters.

    In a table the documents are the column or field `text`. In plain text, blank lines separate
    documents; in a file without blank lines, each line is a document.
    """
    is_table = text_suffix(path) in TABLE_SUFFIXES
    for document in _read_column(path) if is_table else _read_plain_text(path):
        for start in range(0, len(document) or 1, LONGEST_DOCUMENT):
            yield document[start : start + LONGEST_DOCUMENT]


def _read_column(path: Path) -> Iterator[str]:
    for number, row in read_table(path):
        if not isinstance(row.get("text"), str):
            fields = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{path}:{number}: no text in field 'text'; the fields are {fields}")
        yield row["text"]


def _read_plain_text(path: Path) -> Iterator[str]:
    has_blank_lines = len(list(itertools.islice(_paragraphs(path), 2))) > 1
    for lines in _paragraphs(path):
        document = ""
        for line in lines:
            is_long = len(document) + len(line) > LONGEST_DOCUMENT
            if document and (is_long or not has_blank_lines):
                yield document
                document = ""
            document += line
        yield document


def _paragraphs(path: Path) -> Iterator[Iterator[str]]:
    """The lines between blank lines."""
    lines = (line for _, line in read_lines(path, in_pieces=True))
    for is_blank, group in itertools.groupby(lines, str.isspace):
        if not is_blank:
            yield group


def find_files(paths: Iterable[str]) -> list[Path]:
    """List the files among `paths`, and the .txt files and tables in the folders among them.

    Raises:
        UserError: A path does not exist, is no regular file, or is a folder without text files.
    """
    suffixes = (".txt", *TABLE_SUFFIXES)
    files: list[Path] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        inside = [p for p in inside if p.is_file() and (p == path or text_suffix(p) in suffixes)]
        if not inside:
            names = ", ".join(suffixes)
            raise UserError(f"{path}: no regular file, and no folder of {names} (or .gz of one)")
        files += inside
    return files
