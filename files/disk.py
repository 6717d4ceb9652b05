"""Files that are written completely or not at all, and the error for a mistake of the user."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

# Tokenized corpora and the default corpus; it may be deleted at any time.
_USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
CACHE = Path(os.environ.get("CLOZE_CACHE") or _USER_CACHE / "cloze").expanduser()


class UserError(Exception):
    """A mistake of the user, in one line that names the file and line or the flag.

    `files.cli.run_script` prints it and ends the script with exit code 2.
    """

    def __init__(self, message: str):
        # A file name may contain line breaks; the message is one line all the same.
        super().__init__(" ".join(message.splitlines()))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def to_json(value: Any) -> bytes:
    """The content of a JSON file, readable for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file, or replace it, in one step: a reader sees the old content or the new one.

    The content is on the disk before it gets the name `path`, so a power failure cannot leave half
    of a file either.

    Raises:
        UserError: the file cannot be written; the old one is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder whose content is on the disk, and bring the new name there too."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; Windows, which cannot open a folder, skips this."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(out: Path, model: Path | None = None) -> None:
    """Make the output folder of a run.

    Args:
        out: the folder, the value of --out.
        model: the folder of the model that the run reads, the value of --model.

    Raises:
        UserError: the folder cannot be written, or it is the one of the model.
    """
    if model and out.resolve() == model.resolve():
        raise UserError(f"--out {out}: this is the folder of --model, which would be overwritten")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".try"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
