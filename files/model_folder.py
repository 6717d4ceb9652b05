"""Save and load a model: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

This is the layout that `transformers` reads; hub_names.py has the names in it.

A folder is a model if it has a config.json, which `save_model` removes first and writes last. So
where it is killed, it does not leave the weights of one model with the settings of another.
"""

import contextlib
import dataclasses
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor, nn

from files import disk, hub_names
from files.disk import UserError, first_line, to_json, write_file
from files.ngrams import load_ngrams
from files.tokenizer import special_ids, special_tokens
from model import Classifier, Config, MaskedLM, Tagger

# What the libraries raise when they read a broken config or broken weights.
BROKEN = (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, RuntimeError)
BROKEN += (safetensors.SafetensorError,)
# The files that are fetched from the Hugging Face hub.
HUB_FILES = ("config.json", "*.safetensors", "pytorch_model.bin", "tokenizer*.json", "vocab.txt")


def save_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, extra: dict[str, Any] | None = None
) -> None:
    """Write a model and its tokenizer, and `extra`, such as id2label, into config.json.

    ValueError if a setting or a weight has no name in the family of the model.
    """
    config = hub_names.config_to_json(model.config, model.task, special_ids(tokenizer))
    if model.config.is_modern:  # for which the default of `transformers` is "cls"
        config["classifier_pooling"] = getattr(model, "pooling", "mean")
    tokenizer_config = {f"{role}_token": token for role, token in special_tokens(tokenizer).items()}
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config["model_max_length"] = model.config.max_len

    skip = tuple(getattr(model, "pretraining_only", ()))
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith(skip)}
    exported = hub_names.export_weights(weights, model.config, model.task)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            (folder / "config.json").unlink()
            disk.sync_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    content = safetensors.torch.save(exported, {"format": "pt"})
    write_file(folder / "model.safetensors", content)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_file(folder / "tokenizer_config.json", to_json(tokenizer_config))
    write_file(folder / "config.json", to_json(config | (extra or {})))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error in the content of a file or folder into a UserError that names it."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"{path}: cannot be used: {first_line(error)}") from None


def find_model(name: Path) -> Path:
    """The folder of a model: `name` itself, or that of the Hugging Face hub in the hub's cache."""
    if (name / "config.json").is_file():
        return name
    # train.py leaves its folders in runs/; one that does not exist is not looked up on the hub
    is_hub_name = re.fullmatch(r"(?!runs/)[\w-][\w.-]*(/[\w.-]+)?", name.as_posix())
    if name.exists() or not is_hub_name:
        raise UserError(f"{name}: no checkpoint: it has no config.json; train.py makes one")

    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name.as_posix(), allow_patterns=HUB_FILES))
    except Exception as error:  # the network, the hub and its cache each have errors of their own
        raise UserError(f"{name}: no such folder; from the hub: {first_line(error)}") from None


class SavedModel(NamedTuple):
    """The content of a model folder."""

    config: Config
    weights: dict[str, Tensor]  # in our names
    tokenizer: Tokenizer
    raw: dict[str, Any]  # the whole content of config.json


def load_model(name: Path) -> SavedModel:
    """Read a folder, or a model of the hub, written by us or by `transformers`."""
    folder = find_model(name)
    pickled = folder / "pytorch_model.bin"
    with reading(folder):
        raw = json.loads((folder / "config.json").read_bytes())
        config = hub_names.config_from_json(raw)
        if pickled.is_file() and not (folder / "model.safetensors").is_file():
            try:
                exported = torch.load(pickled, "cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise ValueError(f"{pickled.name} would run code") from None
        else:
            exported = safetensors.torch.load_file(folder / "model.safetensors")
        weights = hub_names.import_weights(exported, config, _task(raw))
        hub_names.check_shapes(config, weights)
        tokenizer = load_tokenizer(folder)
        n_pieces = tokenizer.get_vocab_size()
        if n_pieces != config.vocab_size:
            raise ValueError(f"the tokenizer has {n_pieces} tokens, the model {config.vocab_size}")
    return SavedModel(config, weights, tokenizer, raw)


def _task(raw: dict[str, Any]) -> str:
    """The task of a config.json: "MaskedLM" of BertForMaskedLM, "" of BertModel."""
    architectures = raw.get("architectures") or [""]
    return architectures[0].partition("For")[2]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json, or BERT's vocab.txt where there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    try:
        if (folder / "vocab.txt").is_file() and not path.is_file():
            path = folder / "vocab.txt"
            settings = json.loads((folder / "tokenizer_config.json").read_bytes())
            is_uncased = settings.get("do_lower_case", True)
            bert_tokenizer = BertWordPieceTokenizer(str(path), lowercase=is_uncased)
            tokenizer = Tokenizer.from_str(bert_tokenizer.to_str())
        else:
            tokenizer = Tokenizer.from_file(str(path))
        special_ids(tokenizer)  # raises an error if one is missing
        tokenizer.encode("\N{CUNEIFORM SIGN A}")  # and this if there is no token for the unknown
    except Exception as error:  # tokenizers has no errors of its own
        raise UserError(f"{path}: {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], folder: Path, allow_missing: tuple[str, ...] = ()
) -> None:
    """Copy the weights that `load_model` read from a folder into a model, strictly.

    Args:
        allow_missing: beginnings of the names of weights that the folder may lack; those of the
            model stay as they are.
    """
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: weights do not fit config.json: {reason}") from None

    allow_missing += (hub_names.TIED, *getattr(model, "pretraining_only", ()))
    for name in missing:
        if not name.startswith(allow_missing):
            raise UserError(f"{folder}/model.safetensors: no weight {name}")
    for name in unused:
        if not name.startswith(hub_names.MAY_BE_UNUSED):
            kind = type(model).__name__
            raise UserError(f"{folder}: unexpected weight {name}, which a {kind} does not use")


def choose_max_len(
    config: Config, max_len: int | None, default: int, name: Path
) -> tuple[Config, int]:
    """The number of tokens of a sequence, also written into the config of the model `name`.

    RoPE reaches beyond the windows of the pretraining. Learned positions do not: UserError.
    """
    if config.is_modern:
        config = dataclasses.replace(config, max_len=max_len or default)
    elif max_len and max_len > config.max_len:
        raise UserError(f"--max-len {max_len}: {name} has {config.max_len} positions")
    return config, min(max_len or default, config.max_len)


def open_model(folder: Path, device: torch.device) -> tuple[nn.Module, Tokenizer, list[str] | None]:
    """Load a model of a folder or of the hub, ready for use on a device.

    Returns:
        (MaskedLM, Classifier or Tagger; its tokenizer; the names of its classes or tags, None for
        a MaskedLM or a regression)
    """
    config, weights, tokenizer, raw = load_model(folder)
    problem_type = raw.get("problem_type")
    with reading(folder):
        n_labels = len(weights.get("classifier.weight", [0]))  # load_weights refuses a missing one
        id2label = raw.get("id2label") or {}
        names = [str(id2label.get(str(i), f"LABEL_{i}")) for i in range(n_labels)]
        if problem_type not in (None, "single_label_classification", "regression"):
            raise ValueError(f"problem_type {problem_type!r} is not supported")
        if _task(raw) == MaskedLM.task:
            model = MaskedLM(config)
        elif _task(raw) == Tagger.task:
            model = Tagger(config, n_labels)
        elif _task(raw) == Classifier.task:
            default = "cls" if config.is_modern else "pooler"  # as in `transformers`
            model = Classifier(config, n_labels, raw.get("classifier_pooling") or default)
            model.ngrams = load_ngrams(folder, n_labels)
        else:
            raise ValueError(f"architectures {raw.get('architectures')} is of another task")

    is_masked_lm = isinstance(model, MaskedLM)
    load_weights(model, weights, folder, allow_missing=("pooler",) if is_masked_lm else ())
    has_names = not is_masked_lm and problem_type != "regression"
    return model.to(device).eval(), tokenizer, names if has_names else None
