"""The journal of a run of many fits: what each came to, so that a run that was stopped goes on with the next.

Every fit begins at its seed: to go on is to look up those that ended, and to begin the others. OUT/journal
has a file for each, with its SHA-256 before it.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import disk, run_folder
from files.disk import UserError


def begin_journal(
    out: Path, flags: dict[str, Any], data: Iterable[np.ndarray], resume: bool, device: torch.device
) -> Path:
    """The folder of the journal, empty unless it is to `resume`. Raises UserError where that is with other
    flags, or with other `data`: all that was read of model and examples."""
    journal, found, digest = out / "journal", run_folder.environment(device, 1), hashlib.sha256()
    for array in data:
        digest.update(np.ascontiguousarray(array))
    now = {"flags": flags, "environment": found, "data": digest.hexdigest()}
    if resume and (kept := recall(journal / "begun")):
        before = kept[0]
        run_folder.compare(out, (flags, before["flags"]), (found, before["environment"]), print)
        if now["data"] != before["data"]:
            raise UserError(f"--resume: the run in {out} was begun with another model or other examples")
        return journal
    if resume:
        print(f"no journal in {out} yet: starting afresh", flush=True)
    run_folder.start_run(out, flags, found, kept=("journal",))
    keep(journal / "begun", now)
    return journal


def keep(place: Path, record: Any, array: np.ndarray | None = None) -> None:
    """Note in the journal what a fit came to: JSON, and perhaps an array."""
    np.savez(
        content := io.BytesIO(), record=json.dumps(record), **({} if array is None else {"array": array})
    )
    disk.write_file(place, hashlib.sha256(content.getbuffer()).digest() + content.getvalue())


def recall(place: Path) -> tuple[Any, np.ndarray | None] | None:
    """(record, array) that `keep` noted, or None where it is not there or not as it was written."""
    with contextlib.suppress(OSError):
        raw = place.read_bytes()
        if hashlib.sha256(raw[32:]).digest() == raw[:32]:
            found = np.load(io.BytesIO(raw[32:]))
            return json.loads(str(found["record"])), found.get("array")
        print(f"{place}: damaged: it is done again", flush=True)
    return None


def as_bytes(weights):
    """(bytes,) of each, whatever its dtype."""
    return [weight.contiguous().reshape(-1).view(torch.uint8).numpy() for weight in weights.values()]
