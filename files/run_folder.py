"""The folder of a run: its lock, its flags, its metrics, and its checkpoints.

OUT/checkpoints/step-N is a model folder with training.pt (optimizers, flags, progress) and
manifest.json (size and SHA-256 of every file) beside it. It is written under another name, the
manifest last, and renamed once it is on the disk. A resumed run takes the newest one whose files
are as its manifest says.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import nn

from files import disk, model_folder
from files.disk import UserError, to_json, write_file
from files.step_monitor import StepMonitor
from model import Config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
# What a run leaves in its folder; config.json comes first, without which a folder is no model.
LEFT_BEHIND = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("metrics.json", "metrics.jsonl", "predictions.npz", "curve.png", "confusion.png"),
    *("snapshots", "checkpoints"),
)
# Flags that a resumed run need not share with its first part.
MAY_CHANGE = {"resume", "device", "out", "keep", "keep_best"}

Log = Callable[[str], None]
# What changes at every step, and is saved in every checkpoint.
Training = tuple[nn.Module, list[torch.optim.Optimizer], torch.amp.GradScaler, StepMonitor]


# ---------------------------------------------------------------------------------- before a run


@contextlib.contextmanager
def lock(out: Path, model: Path | None = None) -> Iterator[None]:
    """Create the folder of a run and hold its lock; the lock ends with the process at the latest.

    Args:
        out: the folder.
        model: a folder that the run reads, which must be another one.

    Raises:
        UserError: the folder cannot be written, is that of the model, or is locked.
    """
    disk.make_folder(out, model)
    path = out / ".lock"
    busy = UserError(f"--out {out}: another run is writing into it")
    if fcntl is None:  # exclusive creation; a killed run leaves the file behind
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise UserError(f"{busy}, or was killed: then delete {path}") from None
        try:
            yield
        finally:
            path.unlink()
        return

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:  # some file systems of clusters have no locks
            problem = f"cannot be locked ({error.strerror})"
            print(f"{out}: {problem}: let no other run write into it", flush=True)
        yield


def check_memory(config: Config, device: torch.device) -> None:
    """Raise UserError if weights, gradients and two optimizer states exceed the memory."""
    in_block = 4 * config.d_model**2 + (3 if config.is_modern else 2) * config.d_model * config.d_ff
    n_weights = config.vocab_size * config.d_model + config.n_layers * in_block
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Windows
        return
    needed = 16 * n_weights
    if needed > available:
        sizes = f"{needed / 1e9:,.0f} GB to train, and there are {available / 1e9:,.0f}"
        advice = "fewer --layers, or a smaller --d-model"
        raise UserError(f"{n_weights:,} weights take {sizes}: {advice}")


def check_space(out: Path, n_bytes: int, keep: int, n_saves: int, n_snapshots: int) -> None:
    """Raise UserError if the disk cannot hold the checkpoints of a run with `n_bytes` of weights.

    Each checkpoint has up to two optimizer states per weight. Beside the last `keep` there are the
    best one and the one being written, the snapshots, and the final model.
    """
    n_checkpoints = min(keep, n_saves + 1) + 2
    needed = n_bytes * (3 * n_checkpoints + n_snapshots + 1)
    # existing checkpoints belong to this run, or are removed by it
    held = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free + held
    if free < needed:
        sizes = f"the run needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise UserError(f"--out {out}: {sizes}; a smaller --keep, or fewer --snapshots, needs less")


def environment(device: torch.device, n_ranks: int) -> dict[str, Any]:
    """What the last bits of a result depend on, besides flags and data."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    root = Path(__file__).parents[1]
    try:
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    is_cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if is_cuda else platform.machine()
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "device": f"{device.type}, {hardware}",
        "threads": torch.get_num_threads(),
        "ranks": n_ranks,
    }


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that half of it is never taken for the whole."""
    old = folder.with_name(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        shutil.rmtree(old)


def start_run(out: Path, record: dict[str, Any]) -> None:
    """Remove what an earlier run left in the folder, and write flags.json and environment.json.

    Args:
        out: the folder.
        record: "flags" and "environment" of the new run.
    """
    try:
        for name in LEFT_BEHIND:
            path = out / name
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)
        (out / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be cleared: {error.strerror}") from None
    write_file(out / "flags.json", to_json(record["flags"]))
    write_file(out / "environment.json", to_json(record["environment"]))


# ---------------------------------------------------------------------------------------- metrics


def append_metrics(out: Path, points: list[dict[str, Any]]) -> None:
    """Add a line to metrics.jsonl for each point."""
    lines = "".join(json.dumps(point) + "\n" for point in points)
    try:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{out}/metrics.jsonl: cannot be written: {error.strerror}") from None


def cut_metrics(out: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove from metrics.jsonl what lies beyond a step, and return the rest.

    Lines that a kill or a full disk left incomplete are removed too.
    """
    path = out / "metrics.jsonl"
    points = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            point = json.loads(line)
            if point["step"] <= last_step:
                points.append(point)
    write_file(path, "".join(json.dumps(point) + "\n" for point in points).encode())
    return points


# ------------------------------------------------------------------------------------ checkpoints


def checkpoint_folders(out: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints, the earliest first."""
    folders = {}
    for folder in (out / "checkpoints").glob("step-*"):
        if re.fullmatch(r"step-\d+", folder.name):
            folders[int(folder.name.removeprefix("step-"))] = folder
    return dict(sorted(folders.items()))


def manifest(folder: Path, step: int) -> bytes:
    """Size and SHA-256 of every file of a checkpoint but the manifest and hidden ones."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and not path.name.startswith("."):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = [path.stat().st_size, digest]
    return to_json({"step": step, "files": files})


def verify(folder: Path, step: int) -> str:
    """Compare a checkpoint with its manifest; returns what is wrong, or an empty string."""
    try:
        stored = (folder / MANIFEST).read_bytes()
        actual = manifest(folder, step)
        if stored == actual:
            return ""
        stored, actual = json.loads(stored), json.loads(actual)
        if stored["step"] != step:
            return f"it is of step {stored['step']!r}"
        for name in sorted(stored["files"] | actual["files"]):
            if stored["files"].get(name) != actual["files"].get(name):
                return f"{name} is not as it was written"
        return f"{MANIFEST} is not as it was written"
    except OSError as error:
        return f"{error.strerror}: {Path(error.filename or MANIFEST).name}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is not as it was written"


def save_checkpoint(
    out: Path,
    training: Training,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int,
    points: Sequence[dict[str, Any]] = (),
) -> None:
    """Write OUT/checkpoints/step-N, then remove all but the last `keep` and the best.

    Args:
        out: the folder of the run.
        training: what changes at every step.
        tokenizer: of the model.
        state: what the run continues from: "step" (N), "flags", "environment", "data", its own.
        keep: checkpoints to keep.
        points: of the curve; the checkpoint with the best validation loss is kept as well.

    Raises:
        UserError: it cannot be written; the checkpoints before stay whole.
    """
    step = state["step"]
    folder = out / "checkpoints" / f"step-{step}"
    work = folder.with_name(".new")
    model, optimizers, scaler, monitor = training
    content = {
        **state,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        "monitor": monitor.state_dict(),
        "pretraining_only": pretraining_only_weights(model),
    }
    try:
        metrics = out / "metrics.jsonl"
        if metrics.exists():  # on the disk before a checkpoint that counts on them
            with open(metrics, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(work, ignore_errors=True)
        model_folder.save_model(work, model, tokenizer)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(work / "training.pt", buffer.getbuffer())
        write_file(work / MANIFEST, manifest(work, step))
        remove_folder(folder)  # a damaged one, which this run was not resumed from
        disk.rename(work, folder)

        saved = {s: f for s, f in checkpoint_folders(out).items() if s <= step}
        best = best_step(out, points)
        for old_step, old_folder in list(saved.items())[:-keep]:
            if old_step != best:
                remove_folder(old_folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def pretraining_only_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a model folder does not hold."""
    names = getattr(model, "pretraining_only", ())
    weights = model.state_dict()
    return {name: weight for name, weight in weights.items() if name.split(".")[0] in names}


def best_step(out: Path, points: list[dict[str, Any]]) -> int | None:
    """The saved step with the lowest validation loss, None if none was measured."""
    losses = {p["step"]: p["validation_loss"] for p in points if "validation_loss" in p}
    measured = [s for s in checkpoint_folders(out) if math.isfinite(losses.get(s, math.nan))]
    return min(measured, key=losses.__getitem__, default=None)


def load_best(out: Path, model: nn.Module, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Load the weights of the best checkpoint; returns its point of the curve as "best"."""
    step = best_step(out, points)
    if step is None:
        raise UserError(
            f"--keep-best: no checkpoint in {out} was validated: save where you validate"
        )
    folder = checkpoint_folders(out)[step]
    _, weights, _, _ = model_folder.load_model(folder)
    missing = getattr(model, "pretraining_only", ())
    model_folder.load_weights(model, weights, folder, allow_missing=missing)
    [best] = [p for p in points if p["step"] == step and "validation_loss" in p]
    return best | {"best_step": step}


def latest_checkpoint(out: Path, log: Log) -> Path | None:
    """The newest undamaged checkpoint, None if the run wrote none yet.

    Raises:
        UserError: all of them are damaged.
    """
    folders = checkpoint_folders(out)
    for step, folder in reversed(folders.items()):
        problem = verify(folder, step)
        if not problem:
            return folder
        log(f"{folder}: damaged, {problem}: stepping over it")
    if folders:
        raise UserError(f"{out}: none of its checkpoints is whole; without --resume it begins anew")
    log(f"no checkpoint in {out} yet: starting afresh")
    return None


def digest(arrays: Iterable[np.ndarray | torch.Tensor]) -> str:
    """A hash of everything that a run reads."""
    sha256 = hashlib.sha256()
    for array in arrays:
        if isinstance(array, torch.Tensor):  # numpy has no bfloat16
            array = array.contiguous().flatten().view(torch.uint8).numpy()
        sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def find_checkpoint(
    args, record: dict[str, Any], defaults: dict[str, Any], ranks
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that --resume continues and its training state; (None, {}) for a new run.

    Args:
        args: "out" and "resume" of them.
        record: "flags" and "environment" of this run.
        defaults: of all flags, for those that an older run may not have had yet.
        ranks: the processes; the first one decides for all.
    """
    folder = None
    if args.resume and ranks.is_first:
        folder = latest_checkpoint(args.out, ranks.log)
    folder = ranks.from_first(folder)
    if folder is None:
        return None, {}
    return folder, load_state(folder, record, defaults, ranks.log)


def load_state(
    folder: Path, record: dict[str, Any], defaults: dict[str, Any], log: Log
) -> dict[str, Any]:
    """Load training.pt, and compare the run it is from with the one that continues it.

    Args:
        folder: a checkpoint.
        record: "flags" and "environment" of this run; a changed environment is logged.
        defaults: of flags that the older run may not have had yet.

    Raises:
        UserError: it cannot be read, or the run was started with other flags.
    """
    try:
        state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        old_flags, old_environment = state["flags"], state["environment"]
        if missing := {"step", "data", "optimizers", "scaler", "pretraining_only"} - state.keys():
            raise ValueError(f"written by another version, it has no {', '.join(sorted(missing))}")
    except Exception as error:  # pickle and zip raise their own
        problem = disk.first_line(error)
        raise UserError(f"{folder}: cannot be resumed: {problem}") from None

    out = folder.parents[1]
    flags = record["flags"]
    for name in flags.keys() - MAY_CHANGE:
        old = old_flags.get(name, defaults.get(name))
        if flags[name] != old:
            flag = f"--{name.replace('_', '-')} {flags[name]}"
            raise UserError(f"--resume with {flag}, but the run in {out} has {old}")
    changes = [
        f"{name} {old_environment.get(name)}, now {value}"
        for name, value in record["environment"].items()
        if value != old_environment.get(name)
    ]
    if changes:
        log(f"resuming in another environment, the last bits may differ: {'; '.join(changes)}")
    return state


def start_or_resume(
    args,
    checkpoint: Path | None,
    state: dict[str, Any],
    record: dict[str, Any],
    training: Training,
    ranks,
) -> tuple[int, list[dict[str, Any]]]:
    """Restore a checkpoint, or clear the folder for a new run.

    Returns:
        (the first step, the points of the curve so far).
    """
    if checkpoint:
        restore(checkpoint, state, record, training)
        ranks.log(f"resuming after step {state['step']}")
        points = cut_metrics(args.out, state["step"]) if ranks.is_first else None
        return state["step"], ranks.from_first(points)
    if ranks.is_first:
        n_bytes = 4 * sum(p.numel() for p in training[0].parameters())
        n_saves = args.steps // args.save_every
        check_space(args.out, n_bytes, args.keep, n_saves, args.snapshots)
        start_run(args.out, record)
    return 0, []


def restore(
    folder: Path, state: dict[str, Any], record: dict[str, Any], training: Training
) -> None:
    """Load weights, optimizers, scaler and monitor of a checkpoint.

    Raises:
        UserError: they do not fit, or the run was started with other data than `record["data"]`.
    """
    if state["data"] != record["data"]:
        out = folder.parents[1]
        raise UserError(f"--resume: the run in {out} was started with another model or other data")
    model, optimizers, scaler, monitor = training
    _, weights, _, _ = model_folder.load_model(folder)
    try:
        model_folder.load_weights(model, weights | state["pretraining_only"], folder)
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        scaler.load_state_dict(state["scaler"])
        monitor.load_state_dict(state["monitor"])
    except model_folder.BROKEN as error:
        raise UserError(f"{folder}: cannot be resumed: {disk.first_line(error)}") from None


def how_to_continue(out: Path) -> str:
    """What is left of a run that went wrong, and what to do with it."""
    folders = list(checkpoint_folders(out).values())
    if not folders:
        rates = "--lr-adamw, --lr-embedding or --lr-muon"
        return f"there is no checkpoint yet: begin anew, with a lower {rates}"
    advice = "--resume goes on behind the skipped steps, --model begins from it with other rates"
    return f"the last good state is in {folders[-1]}: {advice}"
