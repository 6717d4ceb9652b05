"""Files that are written completely or not at all, and what the user is told of mistakes."""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Downloads and tokenized corpora; it may be deleted at any time. Without a home folder it starts
# with ~ as it is written here.
USERS_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cloze"
CACHE = Path(os.path.expanduser(os.environ.get("CLOZE_CACHE") or USERS_CACHE))


class UserError(Exception):
    """A mistake of the user, in one line that names the file and line or the flag."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # file names may contain line breaks


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain(error: OSError) -> str:
    """What an error of the operating system says, with the file where it names one."""
    reason = error.strerror or first_line(error)
    return f"{error.filename}: {reason}" if error.filename else reason


@functools.cache
def print_once(message: str) -> None:
    """Print to stderr what would be repeated whenever a file is read or a baseline fitted again."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """Where the cache cannot be used, say so in a UserError; also a decorator of functions.

    What they read elsewhere has errors of its own.
    """
    try:
        if str(CACHE).startswith("~"):
            raise FileNotFoundError("there is no home folder")
        yield
    except OSError as error:
        advice = "CLOZE_CACHE=FOLDER names another folder"
        raise UserError(f"the cache {CACHE} cannot be used: {explain(error)}; {advice}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, or nothing where there is none."""
    return json.loads(path.read_bytes()) if path.is_file() else {}


def to_json(value: Any) -> bytes:
    """The content of a JSON file, readable for people."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error in the content of a file or folder into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Turn what the operating system refuses into a UserError that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror}") from None


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write or replace a file in one step: readers, and a power failure, see the old or the new.

    Raises:
        UserError: the file cannot be written; the old one is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def file_name(text: str) -> str:
    """The text without the characters that a file name cannot have, on Windows or elsewhere."""
    return re.sub(r'[/\\:*?"<>|]', "-", text)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder whose content is on the disk, and bring the new name to the disk."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder
        return
    os.fsync(descriptor)
    os.close(descriptor)


def make_folder(out: Path, model: Path | None = None) -> None:
    """Make `out`, the output folder of a run that reads the model in the folder `model`.

    Raises:
        UserError: `out` cannot be written, or is the folder of the model.
    """
    if model and out.resolve() == model.resolve():
        raise UserError(f"--out {out}: this is the folder of --model, which would be overwritten")
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        (out / ".try").touch()
        (out / ".try").unlink()
