"""The folder of a run: who may write into it, what it was begun with, and its checkpoints.

OUT/checkpoints/step-N is a model's folder with training.pt beside (optimizers, curve, flags), and
manifest.json (size and SHA-256 of each file). It is made under another name, the manifest last, and renamed
once it is on the disk. Who goes on takes the newest that is as its manifest says.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import nn

from files import disk, model_folder
from files.disk import UserError
from model import Config, MaskedLM, ShapesOnly

MANIFEST = "manifest.json"
# flags that a resumed run need not share with its beginning
MAY_CHANGE = {"resume", "device", "out", "keep", "rows"}


# -------------------------------------------------------------------------------------- the folder of a run


@contextlib.contextmanager
def lock_folder(out: Path, model: Path | None = None) -> Iterator[None]:
    """Make the folder of a run, and hold its lock, which ends with this process however that ends. Raises
    UserError where it cannot be written, is that of the model read, or another run writes into it."""
    disk.make_folder(out, model)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing into it") from None
        except OSError as error:  # some file systems of clusters have no locks
            print(f"{out}: cannot be locked ({error.strerror}): let no other run write into it", flush=True)
        yield


lock = lock_folder


def check_memory(config: Config, device: torch.device) -> None:
    """Raises UserError where weights, gradients and two moments of such a model are more than there is."""
    with torch.device("meta"), ShapesOnly():
        n_weights = sum(weight.numel() for weight in MaskedLM(config).parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    if (needed := 16 * n_weights) > there:
        sizes = f"{needed / 1e9:,.0f} GB to train, and there are {there / 1e9:,.0f}"
        raise UserError(f"{n_weights:,} weights take {sizes}: fewer --layers, or a smaller --d-model")


def check_space(out: Path, n_bytes: int, keep: int, n_saves: int, n_snapshots: int) -> None:
    """Raises UserError where a run of `n_bytes` of weights would not fit onto the disk: the last checkpoints,
    the best and the one being written, each with at most two moments of each weight; snapshots; the model."""
    needed = n_bytes * (3 * (min(keep, n_saves + 1) + 2) + n_snapshots + 1)
    # what is there is of this run, or makes way for it
    held = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
    if (free := shutil.disk_usage(out).free + held) < needed:
        sizes = f"the run needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise UserError(f"--out {out}: {sizes}; a smaller --keep, or fewer --snapshots, needs less")


def environment(device: torch.device, n_ranks: int) -> dict[str, Any]:
    """What, beside flags and text, the last bits of a result hang on."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout
    except OSError:  # no git
        said = ""
    found = {library.__name__: str(library.__version__) for library in (torch, np, tokenizers)}
    found |= {"python": platform.python_version(), "commit": said.strip() or None}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found |= {"device": f"{device.type}, {hardware}", "threads": torch.get_num_threads(), "ranks": n_ranks}
    return found


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first: what a kill leaves of it then is never taken for the whole."""
    shutil.rmtree(old := folder.with_name(".old"), ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        shutil.rmtree(old)


def start_run(
    out: Path,
    flags: dict[str, Any],
    found: dict[str, Any],
    kept: tuple[str, ...] = ("checkpoints", "snapshots"),
) -> None:
    """Write the flags and the environment, and clear what an earlier run kept, which this one must not resume
    from; the first of the folders is made anew."""
    try:
        for folder in kept:
            remove_folder(out / folder)
        (out / kept[0]).mkdir()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be cleared: {error.strerror}") from None
    disk.write_file(out / "flags.json", disk.to_json(flags))
    disk.write_file(out / "environment.json", disk.to_json(found))


def start_or_resume(
    out: Path,
    resume: bool,
    flags: dict[str, Any],
    device: torch.device,
    inputs: Iterable[np.ndarray | torch.Tensor],
) -> tuple[dict[str, Any], Path | None]:
    """Begin a run, or find the last checkpoint of the one to resume.

    Args:
        out: The folder of the run.
        resume: Whether to resume the run in it.
        flags: The flags, in JSON's types.
        device: Where it runs.
        inputs: The content of all that the run reads.

    Returns:
        state: "flags", "environment" and "inputs", a digest; of a checkpoint, all that it holds.
        checkpoint: Its folder; None if the run begins.

    Raises:
        UserError: The run to resume had other flags or other inputs.
    """
    digest = hashlib.sha256()
    for array in inputs:
        if isinstance(array, torch.Tensor):  # numpy has no bfloat16
            array = array.contiguous().flatten().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(array))
    here = environment(device, 1)
    checkpoint = latest_checkpoint(out, print) if resume else None
    if checkpoint is None:
        start_run(out, flags, here)
        return {"flags": flags, "environment": here, "inputs": digest.hexdigest()}, None
    state = load_state(checkpoint, flags, here, print)
    if state.get("inputs") != digest.hexdigest():
        raise UserError(f"--resume: the run in {out} had another model or other examples")
    return state, checkpoint


# --------------------------------------------------------------------------------------------- checkpoints


def checkpoint_folders(out: Path) -> dict[int, Path]:
    """{step: folder}, the earliest first."""
    found = (out / "checkpoints").glob("step-*")
    return dict(sorted((int(f.name[5:]), f) for f in found if re.fullmatch(r"step-\d+", f.name)))


def manifest(folder: Path, step: int) -> bytes:
    """Size and SHA-256 of every file of a checkpoint but the manifest itself and hidden ones."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and not path.name.startswith("."):
            with open(path, "rb") as file:
                files[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return disk.to_json({"step": step, "files": files})


def verify(folder: Path, step: int) -> str:
    """What is wrong with a checkpoint, and nothing where it is as it was written."""
    try:
        wanted, found = (folder / MANIFEST).read_bytes(), manifest(folder, step)
        if wanted == found:
            return ""
        said, files = json.loads(wanted), json.loads(found)["files"]
        if said["step"] != step:
            return f"it is of step {said['step']!r}"
        changed = (
            name for name in sorted(said["files"] | files) if said["files"].get(name) != files.get(name)
        )
        return f"{next(changed, MANIFEST)} is not as it was written"
    except OSError as error:
        return f"{error.strerror}: {Path(error.filename or MANIFEST).name}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is not as it was written"


def save_checkpoint(
    out: Path, model: nn.Module, optimizers: list, scaler: Any, tokenizer: Tokenizer, state: dict, keep: int
) -> None:
    """A whole checkpoint in OUT/checkpoints/step-N. Once it is in its place, all go but the last `keep` and
    the best by validation loss. Raises UserError where it cannot be written; those before stay whole."""
    step, folders = state["step"], out / "checkpoints"
    folder, work = folders / f"step-{step}", folders / ".new"
    try:
        shutil.rmtree(work, ignore_errors=True)
        model_folder.save_model(work, model, tokenizer)
        state = state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state |= {"scaler": scaler.state_dict(), "bag_bias": getattr(model, "bag_bias", torch.zeros(1)).detach().cpu()}
        torch.save(state, buffer := io.BytesIO())
        disk.write_file(work / "training.pt", buffer.getbuffer())
        disk.write_file(work / MANIFEST, manifest(work, step))
        remove_folder(folder)  # one is there only where it was damaged, and was stepped over
        disk.rename(work, folder)
        losses = {p["step"]: p["validation_loss"] for p in state.get("points", ()) if "validation_loss" in p}
        there = {s: f for s, f in checkpoint_folders(out).items() if s <= step}
        measured = [s for s in there if math.isfinite(losses.get(s, math.nan))]
        best = min(measured, key=losses.get, default=None)
        for old in list(there)[:-keep]:
            if old != best:
                remove_folder(there[old])
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def latest_checkpoint(out: Path, say: Callable[[str], None]) -> Path | None:
    """The folder of the newest whole checkpoint, or None where none was written yet. Those that are damaged
    are stepped over, and named. Raises UserError where all are."""
    folders = checkpoint_folders(out)
    for step, folder in reversed(folders.items()):
        if not (problem := verify(folder, step)):
            return folder
        say(f"{folder}: damaged, {problem}: stepping over it")
    if folders:
        raise UserError(f"{out}: none of its checkpoints is whole; without --resume it begins anew")
    say(f"no checkpoint in {out} yet: starting afresh")
    return None


def load_state(
    folder: Path, flags: dict[str, Any], found: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The training state of a checkpoint; what is different in the environment is said. Raises UserError
    where the run was begun with other flags."""
    try:
        state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        before, there = state["flags"], state["environment"]
    except Exception as error:  # pickle and zip each raise their own
        raise UserError(f"{folder}: cannot be resumed: {disk.first_line(error)}") from None
    compare(folder.parents[1], (flags, before), (found, there), say)
    return state


def compare(
    out: Path, flags: tuple[dict, dict], found: tuple[dict, dict], say: Callable[[str], None]
) -> None:
    """(now, before) of the flags and of the environment of a run: what is different in the environment is
    said. Raises UserError where a flag is."""
    for name in flags[0].keys() - MAY_CHANGE:
        if flags[0][name] != flags[1].get(name):
            flag = f"--{name.replace('_', '-')} {flags[0][name]}"
            raise UserError(f"--resume with {flag}, but the run in {out} has {flags[1].get(name)}")
    names = (name for name in found[0] if found[0][name] != found[1].get(name))
    if changed := [f"{name} {found[1].get(name)}, now {found[0][name]}" for name in names]:
        say(f"resuming in another environment, the last bits may differ: {'; '.join(changed)}")


def restore(folder: Path, state: dict[str, Any], model: nn.Module, optimizers: list, scaler: Any) -> None:
    """Bring all back to where the checkpoint was written. Raises UserError where it does not fit."""
    model_folder.load_weights(model, model_folder.load_model(folder)[1], folder)
    try:
        if hasattr(model, "bag_bias"):
            model.bag_bias.data.copy_(state["bag_bias"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
    except model_folder.BROKEN as error:
        raise UserError(f"{folder}: cannot be resumed: {disk.first_line(error)}") from None


def advise(out: Path) -> str:
    """What is left of a run that went wrong, and how to go on."""
    if not (folders := checkpoint_folders(out)):
        return "there is no checkpoint yet: begin anew, with a lower --lr-adamw, --lr-embedding or --lr-muon"
    kept = f"the last good state is in {list(folders.values())[-1]}"
    return f"{kept}: --resume goes on behind them, --model begins from it, perhaps with lower rates"
