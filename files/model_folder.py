"""Save and load a model: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, the layout
that `transformers` reads; hub_names.py has the names in them.

Every file of this program's runs is written by `write`: under another name, flushed to the disk, then renamed
into place, so that no reader sees half of one, and no loss of power leaves half of one.
"""

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import nn

from data import special_ids, special_tokens
from files import hub_names
from files.disk import UserError, first_line, to_json, write_file
from model import Classifier, Config, MaskedLM, ShapesOnly, Tagger

# What the libraries raise that read a config or weights which are broken.
BROKEN = (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError)
MODEL_FILES = ("config.json", "*.safetensors", "pytorch_model.bin", "tokenizer*.json", "vocab.txt")


def save_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, extra: dict[str, Any] | None = None
) -> None:
    """Write the four files; config.json, with `extra` in it, comes last: a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hub_names.write_config(model.config, model.task, special_ids(tokenizer)) | (extra or {})
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config["model_max_length"] = model.config.max_len
    tokenizer_config |= {f"{name}_token": token for name, token in special_tokens(tokenizer).items()}
    exported = hub_names.export_weights(model.state_dict(), model.config, model.task)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in exported.items()}
    write_file(folder / "model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"}))
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_file(folder / "tokenizer_config.json", to_json(tokenizer_config))
    write_file(folder / "config.json", to_json(config))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with what a run left there is a UserError that names it."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"{path}: not as it was written: {first_line(error)}") from None


def find_model(name: Path) -> Path:
    """The folder of a model: the one of that name, or where there is none, the Hugging Face hub's, fetched
    into its cache. Raises UserError where there is neither."""
    here = UserError(f"{name}: no checkpoint: it has no config.json; train.py leaves one in its --out")
    if (name / "config.json").is_file():
        return name
    # what looks like a folder of a run that is not there yet is not asked for elsewhere
    is_folder = name.exists() or name.parts[0] == "runs" or (len(name.parts) > 1 and name.parent.exists())
    if is_folder or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise here
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=MODEL_FILES))
    except Exception as error:  # of the network, of the hub, of its cache: each library has its own
        raise UserError(f"{name}: no such folder; from the hub: {first_line(error)}") from None


def load_model(name: Path) -> tuple[Config, dict[str, torch.Tensor], Tokenizer, dict[str, Any]]:
    """(config, weights in our names, tokenizer, the whole of config.json) of a folder, or of a model of the
    hub. Raises UserError where it is none of the three families."""
    folder = find_model(name)
    try:
        raw = json.loads((folder / "config.json").read_text())
        config = hub_names.read_config(raw)
        if (folder / "model.safetensors").is_file() or not (folder / "pytorch_model.bin").is_file():
            weights = safetensors.torch.load_file(folder / "model.safetensors")
        else:
            weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        task = next(iter(raw.get("architectures") or [""])).partition("For")[2]
        weights = hub_names.import_weights(weights, config, task)
        hub_names.check_shapes(config, weights)
    except pickle.UnpicklingError:
        raise UserError(f"{folder}/pytorch_model.bin: not weights alone: it would run code") from None
    except BROKEN as error:
        raise UserError(f"{folder}: no checkpoint of this program: {first_line(error)}") from None
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() != config.vocab_size:
        sizes = f"{tokenizer.get_vocab_size()} word pieces, the model {config.vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {sizes}")
    return config, weights, tokenizer, raw


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or BERT's from vocab.txt. Raises UserError where it cannot be used."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file() or not (folder / "vocab.txt").is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            path, about = folder / "vocab.txt", folder / "tokenizer_config.json"
            lower = not about.is_file() or json.loads(about.read_text()).get("do_lower_case", True)
            tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(str(path), lowercase=lower).to_str())
        special_ids(tokenizer)
        tokenizer.encode("\N{CUNEIFORM SIGN A}")  # fails where there is no token for what is unknown
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path}: {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def empty(device: torch.device, kind: type, *given: Any) -> nn.Module:
    """A model to load: drawing weights that the file's replace would take longer than reading those."""
    with torch.device("meta"), ShapesOnly():
        return kind(*given).to_empty(device=device).eval()


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], folder: Path, allow_missing=(), fresh: tuple[str, ...] = ()
) -> list[str]:
    """Fill a model; returns the names of those weights that stay as they are, which may be those named
    `fresh...`. Raises UserError where others are missing, or any misfits."""
    fresh = tuple(fresh) + tuple(allow_missing)
    try:
        missing, _ = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: weights do not fit config.json: {reason}") from None
    missing = [name for name in missing if name not in hub_names.NOT_EXPORTED]
    if wanted := [name for name in missing if not name.startswith(fresh)]:
        raise UserError(f"{folder}/model.safetensors: no weight {wanted[0]}")
    return missing


def open_model(folder: Path, device: torch.device) -> tuple[nn.Module, Tokenizer, list[str] | None]:
    """To be used: (MaskedLM, Classifier or Tagger; its tokenizer; the names of its classes or tags, or None).
    Raises UserError where the folder holds another kind of model."""
    config, weights, tokenizer, raw = load_model(folder)
    kinds = {f"For{kind.task}": kind for kind in (MaskedLM, Classifier, Tagger)}
    architecture, problem = next(iter(raw.get("architectures") or [""])), raw.get("problem_type")
    kind = next((kind for name, kind in kinds.items() if architecture.endswith(name)), None)
    pooling, given = raw.get("classifier_pooling"), raw.get("id2label")
    if kind is None:
        raise UserError(f"{folder}: architecture {architecture!r} is none of those {', '.join(kinds)}")
    if kind is MaskedLM:  # which in BERT's families has no use for the pooler
        model = empty(device, kind, config)
        model.decoder.weight = model.model.embeddings.tok_embeddings.weight  # emptied, they were parted
        load_weights(model, weights, folder, fresh=("pooler",))
        return model, tokenizer, None
    if kind is Classifier and config.is_modern and pooling != "mean":
        raise UserError(f"{folder}: classifier_pooling {pooling!r} is not supported, only 'mean' is")
    if problem not in (None, "single_label_classification", "regression"):
        raise UserError(f"{folder}: problem_type {problem!r} is not supported")
    if "classifier.weight" not in weights:
        raise UserError(f"{folder}/model.safetensors: no weight classifier.weight")
    model = empty(device, kind, config, len(weights["classifier.weight"]))
    given = given if isinstance(given, dict) else {}
    names = [str(given.get(str(i), f"LABEL_{i}")) for i in range(model.classifier.out_features)]
    load_weights(model, weights, folder)
    return model, tokenizer, None if problem == "regression" else names


def as_bytes(weights: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """(bytes,) of each, whatever its dtype."""
    return [weight.contiguous().reshape(-1).view(torch.uint8).numpy() for weight in weights.values()]
