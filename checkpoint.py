"""Save and load: the folder of a model, the checkpoints of a run, its flags and its hardware.

A model's folder is the layout that `transformers` reads: config.json, model.safetensors, tokenizer.json,
tokenizer_config.json. A checkpoint of a run is such a folder with training.pt beside (optimizers, step).
Every file is written under another name and renamed into place, so that a reader never sees half of one.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

import kernels
from data import SPECIAL_TOKENS
from model import Config
from text import UserError

# Our name of each field of Config, and ModernBERT's in config.json.
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_len": "max_position_embeddings",
    "local_attention": "local_attention",
    "global_attn_every_n_layers": "global_attn_every_n_layers",
    "global_rope_theta": "global_rope_theta",
    "local_rope_theta": "local_rope_theta",
    "norm_eps": "norm_eps",
    "init_std": "initializer_range",
}
# Not exported: the decoder's weight is the embedding's, the bias of the pooled loss serves pretraining alone.
NOT_EXPORTED = ("decoder.weight", "bag_bias")


class Flags(argparse.ArgumentParser):
    """Plain argparse: defaults shown in the help, no abbreviations, errors in one line."""

    def __init__(self, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """The type of a flag that takes an int or float from low to high."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: it must be at least {low:g}{limit}")
        return value

    # argparse names it where kind(text) fails
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def to_record(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as the run's folder carries them, in JSON's types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def choose_hardware(device_name: str | None, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of its matrix products; None and "auto" look for the fastest that is there.

    bfloat16 is chosen only where the hardware multiplies it natively: elsewhere it is the slower of the two.
    Raises UserError where the one or the other, or what CLOZE_KERNELS asks for, is not to be had.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = device_name or next(name for name, is_there in found.items() if is_there)
    there = ", ".join(name for name, is_there in found.items() if is_there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; there is {there}") from None
    if not found.get(device.type) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(f"--device {name}: not on this machine; there is {there}")
    try:
        kernels.check_forced(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if dtype_name != "auto":
        return device, getattr(torch, dtype_name)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, torch.bfloat16 if native else torch.float32


# -------------------------------------------------------------------------------------------------- models


def save_model(folder: Path, model: nn.Module, tokenizer: Tokenizer, extra: dict[str, Any]) -> None:
    """Write the four files; config.json, with `extra` in it, comes last: a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
    config = {
        "model_type": "modernbert",
        **{theirs: getattr(model.config, ours) for ours, theirs in CONFIG_NAMES.items()},
        "pad_token_id": ids["pad"],
        "cls_token_id": ids["cls"],
        "sep_token_id": ids["sep"],
        "bos_token_id": ids["cls"],
        "eos_token_id": ids["sep"],
        "classifier_pooling": "mean",
        "tie_word_embeddings": True,
        **extra,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_len,
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
    }
    exported = {name: weight for name, weight in model.state_dict().items() if name not in NOT_EXPORTED}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in exported.items()}
    write(folder / "model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"}))
    write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write(folder / "tokenizer_config.json", to_json(tokenizer_config))
    write(folder / "config.json", to_json(config))


def load_model(folder: Path) -> tuple[Config, dict[str, torch.Tensor], Tokenizer, dict[str, Any]]:
    """(config, weights, tokenizer, the whole of config.json). Raises UserError where it is no such folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint: it has no config.json; train.py leaves one in its --out")
    try:
        raw = json.loads((folder / "config.json").read_text())
        config = read_config(raw)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no checkpoint of this program: {error}") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{folder}/tokenizer.json: {error}") from None
    if missing := [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is None]:
        raise UserError(f"{folder}/tokenizer.json: no token {missing[0]}")
    if tokenizer.get_vocab_size() != config.vocab_size:
        sizes = f"{tokenizer.get_vocab_size()} word pieces, the model {config.vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {sizes}")
    return config, weights, tokenizer, raw


def read_config(raw: dict[str, Any]) -> Config:
    """The Config of a config.json, ours or as transformers 5 writes it, with the kind of each layer and its
    rotation by name. Raises ValueError or KeyError where it is no ModernBERT's."""
    ours = {name: raw[theirs] for name, theirs in CONFIG_NAMES.items() if theirs in raw}
    ropes = raw.get("rope_parameters") or {}
    for name, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        if kind in ropes:
            ours[name] = ropes[kind]["rope_theta"]
    if layers := raw.get("layer_types"):
        every = ours["global_attn_every_n_layers"] = (*layers, "full_attention").index("full_attention", 1)
        if any((kind == "full_attention") != (layer % every == 0) for layer, kind in enumerate(layers)):
            raise ValueError("layer_types without a period are not supported")
    return Config(**ours)


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], folder: Path, fresh: tuple[str, ...] = ()
) -> None:
    """Fill a model; where others than those named `fresh...` are missing, or misfit, UserError is raised."""
    try:
        missing, _ = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: weights do not fit config.json: {reason}") from None
    if missing := [name for name in missing if name not in NOT_EXPORTED and not name.startswith(fresh)]:
        raise UserError(f"{folder}/model.safetensors: no weight {missing[0]}")


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write(path: Path, content: bytes) -> None:
    """Replace a file at once. Raises UserError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------- runs


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


def begin_run(out: Path, flags: dict[str, Any]) -> None:
    """Write the flags, and clear the checkpoints of an earlier run, which this one must not resume from."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    write(out / "flags.json", to_json(flags))


def save_step(out: Path, model: nn.Module, tokenizer: Tokenizer, extra: dict, state: dict[str, Any]) -> None:
    """A whole checkpoint in OUT/checkpoints/step-N; the ones before it go once it is in its place."""
    folder, work = out / "checkpoints" / f"step-{state['step']}", out / "checkpoints" / ".new"
    shutil.rmtree(work, ignore_errors=True)
    save_model(work, model, tokenizer, extra)
    try:
        torch.save(state, buffer := io.BytesIO())
        (work / "training.pt").write_bytes(buffer.getbuffer())
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other)


def load_run(out: Path, flags: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a run and its training state, or None where there is none yet.

    Raises UserError where the run was begun with other flags.
    """
    folders = sorted((out / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if not folders:
        return None
    try:
        before = json.loads((out / "flags.json").read_text())
        state = torch.load(folders[-1] / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # json, pickle and zip each raise their own
        raise UserError(f"{out}: cannot be resumed: {str(error).splitlines()[0]}") from None
    for name in flags.keys() - {"resume", "device", "out"}:
        if flags[name] != before.get(name):
            flag = f"--{name.replace('_', '-')} {flags[name]}"
            raise UserError(f"--resume with {flag}, but the run in {out} has {before.get(name)}")
    return folders[-1], state
