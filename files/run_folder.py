"""The folder of a run: its lock, its flags, its metrics, and its checkpoints.

OUT/checkpoints/step-N is a model folder with training.pt (optimizers, flags, progress) and
manifest.json (the SHA-256 of every file) beside it. It is written under another name and renamed
once it is on the disk. A resumed run takes the newest one whose files are as its manifest says.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from files import disk, model_folder
from files.cli import flags_to_json
from files.disk import UserError, reading, to_json, write_file, writing
from files.machine import Ranks, cpu_name
from files.model_card import CARD, is_foreign
from model import is_part_of

MANIFEST = "manifest.json"
# What a run leaves in its folder; config.json comes first, without which a folder is no model.
LEFT_BEHIND = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("metrics.json", "metrics.jsonl", "predictions.npz", "curve.png", "confusion.png"),
    *("ngrams.safetensors", "snapshots", "checkpoints", "modules.json", "1_Pooling", CARD),
    "tensorboard",
)
# Flags that a resumed run need not share with its first part: of files the content counts.
MAY_CHANGE = {"resume", "device", "out", "keep", "keep_best", "tensorboard"}
MAY_CHANGE |= {"model", "corpus", "train", "test", "tokenizer"}

# The code whose change changes results, although no flag and no Config says so.
ARITHMETIC = ("model.py", "data.py", "labels.py", "optim.py", "train.py", "finetune.py")
ARITHMETIC += ("kernels/*.py",)
# What every training.pt holds.
STATE = {"step", "flags", "environment", "data", "parts", "pretraining_only"}


# ---------------------------------------------------------------------------------- before a run


@contextlib.contextmanager
def lock(out: Path, model: Path | None = None) -> Iterator[None]:
    """Create the folder of a run and hold its lock, which ends with the process at the latest.

    Raises:
        UserError: the folder cannot be written, is that of the model, or is locked.
    """
    disk.make_folder(out, model)
    try:
        held = filelock.FileLock(out / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"--out {out}: another run is writing into it") from None
    except OSError:  # some file systems of clusters have no locks
        held = contextlib.nullcontext()
    with held:
        yield


def describe(
    args: argparse.Namespace, data: str, device: torch.device, n_ranks: int
) -> dict[str, Any]:
    """The record of a run; `data` is a name or a hash of everything that it reads."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    environment = {
        "arithmetic": code_digest(ARITHMETIC),
        "torch": str(torch.__version__),
        "device": f"{device.type}, {hardware}",
        "threads": torch.get_num_threads(),
        "ranks": n_ranks,
    }
    return {"flags": flags_to_json(args), "data": data, "environment": environment}


def code_digest(names: Iterable[str]) -> str:
    """A hash of files of this repository, by their names or patterns."""
    root = Path(__file__).parents[1]
    code = [path.read_bytes() for name in names for path in sorted(root.glob(name))]
    return hashlib.sha256(b"".join(code)).hexdigest()[:12]


def digest(arrays: Iterable[np.ndarray | torch.Tensor]) -> str:
    """A hash of everything that a run reads."""
    sha256 = hashlib.sha256()
    for array in arrays:
        if isinstance(array, torch.Tensor):  # numpy has no bfloat16
            array = array.cpu().contiguous().flatten().view(torch.uint8).numpy()
        sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that half of it is never taken for the whole."""
    old = folder.with_name(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        shutil.rmtree(old)


def start_run(out: Path, record: dict[str, Any]) -> None:
    """Remove what an earlier run left in the folder, and write flags.json and environment.json."""
    with writing(f"--out {out}"):
        for name in LEFT_BEHIND:
            path = out / name
            if path.is_dir():
                remove_folder(path)
            elif name != CARD or not is_foreign(path):
                path.unlink(missing_ok=True)
    for name in ("flags", "environment"):
        write_file(out / f"{name}.json", to_json(record[name]))


def append_metrics(out: Path, points: list[dict[str, Any]], mode: str = "a") -> None:
    """Add a line to metrics.jsonl for each point; mode "w" replaces the lines before."""
    lines = "".join(json.dumps(point) + "\n" for point in points)
    path = out / "metrics.jsonl"
    with writing(path), open(path, mode, encoding="utf-8") as file:
        file.write(lines)


# ------------------------------------------------------------------------------- save a checkpoint


def checkpoint_folders(out: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints, the earliest first."""
    named = {path.name.removeprefix("step-"): path for path in out.glob("checkpoints/step-*")}
    folders = {int(step): path for step, path in named.items() if step.isdecimal()}
    return dict(sorted(folders.items()))


def manifest(folder: Path, step: int) -> bytes:
    """The step of a checkpoint, and the SHA-256 of each file but the manifest and hidden ones."""
    content = {"step": step}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and not path.name.startswith("."):
            with open(path, "rb") as file:
                content[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return to_json(content)


def save_checkpoint(
    out: Path, training: tuple, tokenizer: Tokenizer, state: dict[str, Any], keep: int
) -> None:
    """Write OUT/checkpoints/step-N, then remove all but the last `keep` and the best.

    Args:
        training: the model, then optimizers and whatever else has a state_dict.
        state: "step" (N), "flags", "environment", "data", perhaps the "points" of the curve, whose
            validation loss decides which is the best, and whatever else the run continues from.

    Raises:
        UserError: it cannot be written; the checkpoints before stay whole.
    """
    step = state["step"]
    folder = out / "checkpoints" / f"step-{step}"
    work = folder.with_name(".new")
    model, *parts = training
    unsaved = getattr(model, "pretraining_only", ())  # in the model folder
    content = {
        **state,
        "parts": [part.state_dict() for part in parts],
        "pretraining_only": {n: w for n, w in model.state_dict().items() if is_part_of(n, unsaved)},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with writing(folder):
        shutil.rmtree(work, ignore_errors=True)
        model_folder.save_model(work, model, tokenizer)
        write_file(work / "training.pt", buffer.getbuffer())
        write_file(work / MANIFEST, manifest(work, step))
        remove_folder(folder)  # a damaged one, which this run was not resumed from
        disk.rename(work, folder)

        # later ones are damaged, or this run would have continued from them
        saved = [s for s in checkpoint_folders(out) if s <= step]
        best = best_point(out, state.get("points", []))
        for old_step in saved[:-keep]:
            if best is None or old_step != best["step"]:
                remove_folder(folder.with_name(f"step-{old_step}"))


def best_point(out: Path, points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The point with the lowest validation loss of those with a checkpoint, if there is one."""
    saved = checkpoint_folders(out)
    validated = [p for p in points if p["step"] in saved and "validation_loss" in p]
    finite = [p for p in validated if math.isfinite(p["validation_loss"])]
    return min(finite, key=lambda point: point["validation_loss"], default=None)


def load_best(out: Path, model: nn.Module, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Load the weights of the best checkpoint, if there is one; returns its point of the curve."""
    best = best_point(out, points)
    if best is None:
        return {}
    folder = checkpoint_folders(out)[best["step"]]
    model_folder.load_weights(model, model_folder.load_model(folder).weights, folder)
    return best | {"best_step": best["step"]}


# ------------------------------------------------------------------------------------------ resume


def verify(folder: Path, step: int) -> str:
    """Compare a checkpoint with its manifest; returns what is wrong, or an empty string."""
    try:
        stored = (folder / MANIFEST).read_bytes()
        actual = manifest(folder, step)
        if stored == actual:
            return ""
        stored, actual = json.loads(stored), json.loads(actual)
        changed = [name for name in stored | actual if stored.get(name) != actual.get(name)]
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST}: {disk.first_line(error)}"
    return f"changed: {', '.join(changed) or MANIFEST}"


def latest_checkpoint(out: Path, log: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, None if there is none yet; UserError if all are damaged."""
    folders = checkpoint_folders(out)
    for step, folder in reversed(folders.items()):
        problem = verify(folder, step)
        if not problem:
            return folder
        log(f"{folder}: damaged ({problem}), skipped")
    if folders:
        raise UserError(f"{out}: all checkpoints are damaged; without --resume a new run starts")
    log(f"{out}: no checkpoint yet; the run starts from the beginning")
    return None


def start_or_resume(
    args: argparse.Namespace, record: dict[str, Any], defaults: dict[str, Any], ranks: Ranks
) -> dict[str, Any]:
    """Read the checkpoint that --resume continues from, or clear the folder for a new run.

    Args:
        record: what `describe` returned.
        defaults: the values of flags that the older run did not have. None, for a flag whose
            default is chosen later, counts as the value of this run.

    Returns:
        The state of the run: the record, "step" (0 of a new run), "seconds" that it has taken, and
        what else its checkpoint holds.

    Raises:
        UserError: no checkpoint can be read, or the run was started with other flags or data.
    """
    new_run = record | {"step": 0, "seconds": 0.0}
    log = ranks.log
    folder = ranks.from_first(lambda: latest_checkpoint(args.out, log) if args.resume else None)
    if folder is None:
        if ranks.is_first:
            start_run(args.out, record)
        return new_run
    with reading(folder):
        state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        if missing := STATE - state.keys():
            raise ValueError(f"written by another version, it has no {', '.join(sorted(missing))}")

    for name, value in record["flags"].items():
        default = value if defaults.get(name) is None else defaults[name]
        old_value = state["flags"].get(name, default)
        if name not in MAY_CHANGE and value != old_value:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"--resume with {flag}, but the run in {args.out} has {old_value}")
    if state["data"] != record["data"]:
        raise UserError(f"--resume: {args.out} was started with another model or other data")
    old, new = state["environment"].items(), record["environment"].items()
    if old != new:
        change = f"{dict(old - new)}, now {dict(new - old)}"
        log(f"resuming in another environment, results may differ: {change}")
    if ranks.is_first and "points" in state:  # without the lines after the checkpoint
        append_metrics(args.out, state["points"], mode="w")
    return new_run | state | record


def restore(out: Path, state: dict[str, Any], training: tuple) -> None:
    """Move what the state holds into the model, the optimizers and the rest of the training.

    UserError if they do not fit.
    """
    folder = checkpoint_folders(out)[state["step"]]
    model, *parts = training
    with reading(folder):
        weights = model_folder.load_model(folder).weights | state.pop("pretraining_only")
        model_folder.load_weights(model, weights, folder)
        for part, part_state in zip(parts, state.pop("parts"), strict=True):
            part.load_state_dict(part_state)
