"""Files that are written whole or not at all, and the error that names what the user got wrong."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

CACHE = Path(
    os.environ.get("CLOZE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cloze"
).expanduser()


class UserError(Exception):
    """The user's mistake, told in one line that names the file, the line or the flag; scripts exit with 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a name may have lines of its own


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Replace a file at once. Raises UserError where it cannot be written."""
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
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(out: Path, model: Path | None = None) -> None:
    """Make the folder of a run. Raises UserError where it cannot be written, or is that of the model read."""
    if model and out.resolve() == model.resolve():
        raise UserError(f"--out {out}: this is the folder of --model, which would be overwritten")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".try").touch()
        (out / ".try").unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
