"""Files of the user to text: lines, tables and documents.

Everything is read as a stream, so memory does not grow with the size of a file. A mistake in a
file is a UserError that names the file and the line.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from files import parquet
from files.disk import UserError
from files.hub_datasets import is_hub_name, parquet_files
from files.sequences import SEPARATOR, Report, Row, as_sequences, is_interactions

try:
    from compression import zstd  # of Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None  # which a file that needs it says

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".inter", ".parquet")
TABLES = ", ".join(TABLE_SUFFIXES)  # for messages
GZIP_START = b"\x1f\x8b"
ZSTD_START = b"\x28\xb5\x2f\xfd"
LONGEST_DOCUMENT = 2**20  # characters; a longer document is cut into several
LONGEST_LINE = 2**24  # characters; a longer line or field of a table is refused
LONGEST_PARAGRAPH = 50  # mean number of lines; above it blank lines are strays between documents
FIRST_LINES = 10_000  # lines by which the paragraphs are judged
# how JSON lines, or an array of objects or strings, begin, whatever the name of their file
STRING = r'"(?:[^"\\]|\\.)*"'
JSON_START = re.compile(rf"\s*(\[\s*)?\{{\s*{STRING}\s*:|\s*\[\s*{STRING}\s*[],]")
HIDDEN = re.compile(r"/(\.|__MACOSX/)")  # in the path of a file
NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # as "surrogateescape" decodes bytes that are not UTF-8


def refuse(error: UserError) -> None:
    """The default Report, which is called for each broken line: the first one ends the reading."""
    raise error


def read_lines(
    path: Path, report: Report = refuse, in_pieces: bool = False
) -> Iterator[tuple[int, str]]:
    """Read (line number from 1, line with its line break) of a text file.

    Args:
        path: A file, perhaps compressed (.gz, .zst); "-" is standard input.
        report: Called for each line that is not UTF-8. Such a line comes as an empty one.
        in_pieces: Give a line of more than LONGEST_LINE characters in pieces with the same number.

    Raises:
        UserError: The file cannot be read, or a line is too long.
    """
    number = 1
    with open_bytes(path) as file:
        head = file.peek(1)
        is_old_mac = b"\r" in head[:-1] and b"\n" not in head
        newline = None if is_old_mac else "\n"
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)
        while text := lines.readline(LONGEST_LINE):
            is_whole = text.endswith("\n") or len(text) < LONGEST_LINE
            if not is_whole and not in_pieces:
                raise UserError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} characters")
            if NOT_TEXT.search(text):
                report(UserError(f"{path}:{number}: not UTF-8 text, or a NUL byte; try iconv"))
                text = "\n"
            yield number, text
            number += is_whole


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Open the bytes of a file, or of standard input. Raises UserError if they cannot be read."""
    zstd_errors = (zstd.ZstdError,) if zstd else ()
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer
            if str(path) != "-":
                file = stack.enter_context(open(path, "rb", 2**16))
            head = file.peek(4)
            if path.suffix == ".gz" or head.startswith(GZIP_START):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.suffix == ".zst" or head.startswith(ZSTD_START):
                if zstd is None:
                    raise UserError(f"{path}: .zst files need backports.zstd: pip install it")
                file = stack.enter_context(zstd.ZstdFile(file))
            yield file
    except (OSError, EOFError, zlib.error, *zstd_errors) as error:  # not those of who reads it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def text_suffix(path: Path) -> str:
    """The suffix without compression: ".jsonl" of reviews.jsonl and of reviews.jsonl.gz."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def is_text(value: Any) -> bool:
    """Whether the value of a field is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def table_format(path: Path) -> str | None:
    """Which table a file holds: "json lines", "json array", "csv", "tsv", "parquet", or None for
    plain text. Its content decides where it can, and then its name.
    """
    if is_hub_name(path):
        return "parquet"
    with open_bytes(path) as file:
        content = file.peek(1)
    if content.startswith(parquet.PARQUET_START):
        return "parquet"
    head = content.decode("utf-8-sig", "replace")
    suffix = text_suffix(path)
    if not JSON_START.match(head) and (suffix == ".inter" or is_interactions(head)):
        return "csv"
    if JSON_START.match(head) or suffix in (".json", ".jsonl"):
        return "json array" if head.lstrip().startswith("[") else "json lines"
    return suffix[1:] if suffix in TABLE_SUFFIXES else None


def read_table(
    path: Path, report: Report = refuse, column: str | None = None, may_mask: bool = False
) -> Iterator[Row]:
    """Read (number, {column: value}) of the rows of a table.

    The number is that of the first line of the row, in parquet that of the row.

    The first line of a .csv or .tsv file names the columns. Those without a name, or with one of
    several of the same name, are left out. Where tabs separate the fields, each tab does, and
    quotes are ordinary characters. `report` is called for each row that is broken.
    Sequences become texts, see `as_sequences`.
    """
    kind = table_format(path)
    if kind == "parquet":
        files = parquet_files(path)
        rows = enumerate(itertools.chain.from_iterable(map(parquet.read_rows, files)), 1)
    elif kind == "json array":
        rows = _read_json_array(path)
    else:
        rows = _read_jsonl(path, report) if kind == "json lines" else _read_csv(path, report)
    return as_sequences(path, rows, column, report, may_mask)


def class_names(path: Path, column: str) -> list[str]:
    """The classes of a column in their own order, where a parquet file names them; else none."""
    is_parquet = table_format(path) == "parquet"
    return parquet.class_names(parquet_files(path)[0]).get(column, []) if is_parquet else []


def _read_jsonl(path: Path, report: Report) -> Iterator[Row]:
    for number, line in read_lines(path, report):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            _check_row(row, line)
        except (ValueError, RecursionError) as error:
            report(UserError(f"{path}:{number}: broken JSON: {error}"))
        else:
            yield number, row


def _read_json_array(path: Path) -> Iterator[Row]:
    """Decode one object after another, so that the array need not fit into memory."""
    decode = json.JSONDecoder().raw_decode
    text = ""  # what is read and not decoded yet
    line = 1  # the number of its first line
    min_length = 0  # of a text in which another object may have ended
    error = None
    before_row = re.compile(r"\s*\[\s*")  # before the first object; then it is a comma
    for piece in itertools.chain((piece for _, piece in read_lines(path, in_pieces=True)), [""]):
        text += piece
        if piece and len(text) < min_length:
            continue
        end = 0
        while match := before_row.match(text, end):
            try:
                row, row_end = decode(text, match.end())
                _check_row(row, text[match.end() : row_end])
            except (ValueError, RecursionError) as problem:  # or the rest of it is not read yet
                error = getattr(problem, "msg", problem)
                break
            line += text.count("\n", end, match.end())
            yield line, row
            line += text.count("\n", match.end(), row_end)
            end = row_end
            before_row = re.compile(r"\s*,\s*")
        text = text[end:]
        if len(text) > LONGEST_LINE:
            break
        # so that an object of many lines is not decoded again for each of them
        min_length = 2 * len(text)
    if not re.fullmatch(r"(\s*\[)?\s*\]\s*", text):
        line += re.match(r"[\s,\[]*", text)[0].count("\n")
        raise UserError(f"{path}:{line}: broken JSON: {error or 'the array does not end here'}")


def _check_row(row: Any, source: str) -> None:
    """Raises ValueError if decoded JSON is no object, or cannot be encoded as UTF-8."""
    if "\\ud" in source.lower():  # half of a surrogate pair
        json.dumps(row, ensure_ascii=False).encode()
    if not isinstance(row, dict):
        raise ValueError('each row must be a JSON object such as {"text": "..."}')


def _read_csv(path: Path, report: Report) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    lines = read_lines(path, report)
    again = deque(itertools.islice(lines, 1))  # lines to read, perhaps once more
    row_lines: list[tuple[int, str]] = []  # those of one row
    delimiters = "\t,;" if text_suffix(path) == ".tsv" else ",\t;"  # the usual one first
    first_line = again[0][1] if again else ""
    delimiter = next(filter(first_line.__contains__, delimiters), delimiters[0])
    dialect = {"strict": True, "skipinitialspace": True, "delimiter": delimiter}
    if delimiter == "\t":
        dialect = {"quoting": csv.QUOTE_NONE, "delimiter": delimiter}

    def take_lines() -> Iterator[str]:
        while line := again.popleft() if again else next(lines, None):
            row_lines.append(line)
            yield line[1]

    reader = csv.reader(take_lines(), **dialect)
    header: list[str] = []
    with contextlib.suppress(csv.Error):
        header = [name.strip() for name in next(reader, [])]
    if not (names := {name for name in header if name and header.count(name) == 1}):
        raise UserError(f"{path}:1: the first line must name the columns, each once")
    while True:
        row_lines.clear()
        try:
            row = next(reader)
            if row and (len(row) < len(header) or any(row[len(header) :])):
                raise csv.Error(f"{len(row)} fields, but the first line names {len(header)}")
        except StopIteration:
            return
        except csv.Error as error:
            # a quote that is not closed has swallowed the lines after the first: read them again
            (number, line), *rest = row_lines
            hint = "a quote is not closed: " if rest and line.count('"') % 2 else ""
            report(UserError(f"{path}:{number}: {hint}{error}"))
            again.extendleft(reversed(rest))
            reader = csv.reader(take_lines(), **dialect)
            continue
        if row:
            fields = zip(header, row, strict=False)  # behind the last, rows may have empty ones
            yield row_lines[0][0], {name: value for name, value in fields if name in names}


def read_documents(path: Path, text_column: str | None = None) -> Iterator[str]:
    """Read the documents of a file, each of at most LONGEST_DOCUMENT characters.

    In a table the documents are the column `text_column`, by default "text" in small or capital
    letters. In plain text, blank lines separate documents; in a file of lines, where blank lines
    are missing or rare, each line is a document.
    """
    is_table = table_format(path) is not None
    for document in _read_column(path, text_column) if is_table else _read_plain_text(path):
        start = 0
        while len(document) - start > LONGEST_DOCUMENT:
            longest = start + LONGEST_DOCUMENT
            end = document.rfind(SEPARATOR, start, longest) + 1 or longest  # between two items
            yield document[start:end]
            start = end
        yield document[start:]


def _read_column(path: Path, column: str | None) -> Iterator[str]:
    for number, row in read_table(path, column=column):
        names = [name for name in row if name == column or (not column and name.lower() == "text")]
        if names and row[names[0]] is None:
            continue  # as an empty field of a .csv, this is no mistake
        if not names or not isinstance(row[names[0]], str):
            problem = f"no text in field {column or 'text'!r}; --text-column names another of"
            raise UserError(f"{path}:{number}: {problem} {', '.join(row)}")
        yield row[names[0]]


def _read_plain_text(path: Path) -> Iterator[str]:
    lines = itertools.islice(read_lines(path, in_pieces=True), FIRST_LINES)
    is_blank = [line.isspace() for _, line in lines]
    n_paragraphs = sum(not blank for blank, _ in itertools.groupby(is_blank))
    mean_length = is_blank.count(False) / max(1, n_paragraphs)  # in lines
    has_paragraphs = n_paragraphs > 1 and mean_length <= LONGEST_PARAGRAPH
    document = ""
    for _, line in read_lines(path, in_pieces=True):
        is_long = len(document) + len(line) > LONGEST_DOCUMENT
        if document and (line.isspace() or is_long or not has_paragraphs):
            yield document
            document = ""
        if not line.isspace():
            document += line
    if document:
        yield document


def find_files(paths: Iterable[str]) -> list[Path]:
    """List the files among `paths`, those of the datasets of the hub, and the text files and tables
    in the folders among them.

    In a folder, hidden files and what macOS adds to archives are left out.

    Raises:
        UserError: A path does not exist, is no regular file, or is a folder without text files.
    """
    suffixes = (".txt", ".md", *TABLE_SUFFIXES)
    files: list[Path] = []
    for path in map(Path, paths):
        chosen = parquet_files(path)  # a path that is no name of the hub stands for itself
        if os.path.isdir(path):
            chosen = [file for file in sorted(path.rglob("*")) if text_suffix(file) in suffixes]
            chosen = [f for f in chosen if not HIDDEN.search(f"/{f.relative_to(path).as_posix()}")]
        chosen = list(filter(os.path.isfile, chosen))
        files += chosen
        if not chosen:
            problem = f"neither a regular file nor a folder of {', '.join(suffixes)}"
            if not os.path.exists(path):
                problem = "no such file or folder"
            raise UserError(f"{path}: {problem}")
    return files
