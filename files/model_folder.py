"""Save and load a model: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

This is the layout that `transformers` reads; hub_names.py has the names in it.

A folder is a model if it has a config.json, which `save_model` removes first and writes last. So
where it is killed, it does not leave the weights of one model with the settings of another.
"""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from files import disk, hub_names
from files.disk import UserError, first_line, read_json, reading, to_json, write_file
from files.ngrams import load_ngrams
from files.tokenizer import read_vocabulary, special_ids, special_tokens
from model import Classifier, Config, Encoder, MaskedLM, Tagger, is_part_of

# The files that are fetched from the Hugging Face hub.
HUB_FILES = ("config.json", "1_Pooling/config.json", "*.safetensors", "pytorch_model*.bin")
HUB_FILES += ("*.index.json", "tokenizer*.json", "vocab.txt", "vocab.json", "merges.txt")

# The files of weights, one of which a folder has; an index names the files of the shards.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Those of a tokenizer; the last two, of BERT and RoBERTa, are older.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
MOST_PADDING = 128  # rows that others add to the embedding, up to a multiple of 8, 64 or 128


def save_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, extra: dict[str, Any] | None = None
) -> None:
    """Write a model and its tokenizer, and `extra`, such as id2label, into config.json.

    ValueError if a setting or a weight has no name in the family of the model.
    """
    config = hub_names.config_to_json(model.config, model.task, special_ids(tokenizer))
    pooling = getattr(model, "pooling", None)
    # the default of `transformers` for a ModernBERT is "cls"
    config["classifier_pooling"] = pooling or model.config.poolings[0]
    is_classifier = model.task == Classifier.task
    if is_classifier and not model.config.is_modern and pooling != "pooler":
        # `transformers`, which lacks it, must refuse this model and not add a random pooler
        config["model_type"] += f"-{pooling}"
    tokenizer_config = {f"{role}_token": token for role, token in special_tokens(tokenizer).items()}
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config["model_max_length"] = model.config.max_len

    skip = getattr(model, "pretraining_only", ())
    weights = {name: w for name, w in model.state_dict().items() if not is_part_of(name, skip)}
    exported = hub_names.export_weights(weights, model.config, model.task)

    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        disk.sync_folder(folder)
    content = safetensors.torch.save(exported, {"format": "pt"})
    write_file(folder / "model.safetensors", content)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_file(folder / "tokenizer_config.json", to_json(tokenizer_config))
    write_file(folder / "config.json", to_json(config | (extra or {})))


def save_fine_tuned(
    folder: Path, model: Classifier | Tagger, tokenizer: Tokenizer, names: list[str] | None
) -> None:
    """Save a model for predict.py and `transformers`, with the names of its classes or tags."""
    extra = {"id2label": dict(enumerate(names or ["value"]))}
    extra["label2id"] = {name: i for i, name in extra["id2label"].items()}
    if isinstance(model, Classifier):
        extra["problem_type"] = "single_label_classification" if names else "regression"
        if model.threshold is not None:
            extra["problem_type"] = "multi_label_classification"
            extra["threshold"] = model.threshold
    save_model(folder, model, tokenizer, extra)


def find_model(name: Path) -> Path:
    """The folder of a model: `name` itself, or that of the Hugging Face hub in the hub's cache."""
    if (name / "config.json").is_file():
        return name
    # train.py leaves its folders in runs/; one that does not exist is not looked up on the hub
    is_hub_name = re.fullmatch(r"(?!runs/)[\w-][\w.-]*(/[\w.-]+)?", name.as_posix())
    if name.exists() or not is_hub_name:
        raise UserError(f"{name}: no checkpoint: it has no config.json; train.py makes one")
    return download(name, HUB_FILES)


def download(name: Path, patterns: tuple[str, ...]) -> Path:
    """The folder of the hub's cache that has these files of a model of the hub."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name.as_posix(), allow_patterns=patterns))
    except Exception as error:  # the network, the hub and its cache each have errors of their own
        raise UserError(f"{name}: no such folder; from the hub: {first_line(error)}") from None


class SavedModel(NamedTuple):
    """The content of a model folder."""

    config: Config
    weights: dict[str, Tensor]  # in our names
    tokenizer: Tokenizer
    raw: dict[str, Any]  # the content of config.json, with the pooling of sentence-transformers


def load_model(name: Path) -> SavedModel:
    """Read a folder, or a model of the hub, written by us or by `transformers`."""
    folder = find_model(name)
    with reading(folder):
        raw = json.loads((folder / "config.json").read_bytes())
        pooling_path = folder / "1_Pooling" / "config.json"  # of sentence-transformers
        with reading(pooling_path):
            if modes := read_json(pooling_path):  # another than cls counts as mean
                is_cls = modes.get("pooling_mode_cls_token") or modes.get("pooling_mode") == "cls"
                raw.setdefault("classifier_pooling", "cls" if is_cls else "mean")
        config = hub_names.config_from_json(raw)
        path = first_file(folder, WEIGHT_FILES)
        weights = hub_names.import_weights(read_weights(path), config, _task(raw))
        hub_names.check_shapes(config, weights)
        tokenizer = read_tokenizer(folder)
        special_ids(tokenizer)  # raises an error if one is missing
        n_pieces = tokenizer.get_vocab_size()
        n_rows = config.vocab_size
        is_padded = n_rows % 8 == 0 and n_rows - n_pieces in range(MOST_PADDING)
        if n_rows != n_pieces and not is_padded:
            raise ValueError(f"the tokenizer has {n_pieces} tokens, the model {n_rows}")
        for table in {"model.embeddings.tok_embeddings.weight", "decoder.bias"} & weights.keys():
            weights[table] = weights[table][:n_pieces]
        config = dataclasses.replace(config, vocab_size=n_pieces)
    return SavedModel(config, weights, tokenizer, raw)


def first_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that the folder has; the first of all if it has none."""
    paths = [folder / name for name in names]
    return next(filter(Path.is_file, paths), paths[0])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a file in its own names, or of the files that an index names."""
    with reading(path):
        if path.suffix == ".json":
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
            parts = [read_weights(path.with_name(shard)) for shard in sorted(shards)]
            return {name: weight for part in parts for name, weight in part.items()}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        try:
            return torch.load(path, "cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it would run code") from None


def _task(raw: dict[str, Any]) -> str:
    """The task of a config.json: "MaskedLM" of BertForMaskedLM, "" of BertModel."""
    architectures = raw.get("architectures") or [""]
    return architectures[0].partition("For")[2]


def read_tokenizer(place: Path) -> Tokenizer:
    """Read one of TOKENIZER_FILES, or that of a folder."""
    path = first_file(place, TOKENIZER_FILES) if place.is_dir() else place
    with reading(path):
        is_old = path.suffix == ".txt" or path.name == "vocab.json"
        tokenizer = (read_vocabulary if is_old else Tokenizer.from_file)(str(path))
        tokenizer.encode("\N{CUNEIFORM SIGN A}")  # an error if there is no token for the unknown
        if max(tokenizer.get_vocab().values()) >= tokenizer.get_vocab_size():
            raise ValueError("its token ids have gaps")
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], folder: Path, allow_missing: tuple[str, ...] = ()
) -> None:
    """Copy the weights that `load_model` read from a folder into a model, strictly.

    Args:
        allow_missing: names of modules or weights that the folder may lack; those of the model
            stay as they are.
    """
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: weights do not fit config.json: {reason}") from None

    allow_missing += (hub_names.TIED, *getattr(model, "pretraining_only", ()))
    for name in missing:
        if not is_part_of(name, allow_missing):
            raise UserError(f"{folder}/model.safetensors: no weight {name}")
    for name in unused:
        if not is_part_of(name, hub_names.MAY_BE_UNUSED):
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


def choose_pooling(
    config: Config, raw: dict[str, Any], pooling: str | None, name: Path
) -> str | None:
    """The pooling of a new classifier on the model `name`: --pooling, or that of a BERT's training.

    None is the default of the family.
    """
    if pooling not in (None, *config.poolings):
        raise UserError(f"--pooling {pooling}: {name} is a {config.family} model")
    return pooling or (None if config.is_modern else raw.get("classifier_pooling"))


def open_model(folder: Path, device: torch.device) -> tuple[nn.Module, Tokenizer, list[str] | None]:
    """Load a model of a folder or of the hub, ready for use on a device.

    Returns:
        (MaskedLM, Classifier or Tagger; its tokenizer; the names of its classes or tags, None for
        a MaskedLM or a model of one number)
    """
    config, weights, tokenizer, raw = load_model(folder)
    with reading(folder):
        n_labels = len(weights.get("classifier.weight", [0]))  # load_weights refuses a missing one
        id2label = raw.get("id2label") or {}
        names = [str(id2label.get(str(i), f"LABEL_{i}")) for i in range(n_labels)]
        # one output is a number, whatever its problem_type: its softmax would always be 1
        problem_type = raw.get("problem_type")
        is_multilabel = problem_type == "multi_label_classification" and n_labels > 1
        is_known = is_multilabel or problem_type in (None, "single_label_classification")
        if n_labels > 1 and not is_known:
            raise ValueError(f"problem_type {problem_type!r} with {n_labels} outputs is unknown")
        if _task(raw) == Tagger.task:
            model = Tagger(config, n_labels)
        elif _task(raw) == Classifier.task:
            default = "cls" if config.is_modern else "pooler"  # as in `transformers`
            model = Classifier(config, n_labels, raw.get("classifier_pooling") or default)
            model.ngrams = load_ngrams(folder, n_labels)
            if is_multilabel:
                model.threshold = float(raw.get("threshold", 0.5))
        elif _task(raw) == MaskedLM.task or "decoder.bias" in weights:
            model = MaskedLM(config)
        else:
            raise ValueError(f"architectures {raw.get('architectures')} is of another task")

    is_masked_lm = isinstance(model, MaskedLM)
    load_weights(model, weights, folder, allow_missing=("pooler",) if is_masked_lm else ())
    has_names = not is_masked_lm and (n_labels > 1 or isinstance(model, Tagger))
    return model.to(device).eval(), tokenizer, names if has_names else None


def open_encoder(folder: Path, device: torch.device) -> tuple[Encoder, Tokenizer, None]:
    """As `open_model`: the encoder alone of any model of a folder or of the hub."""
    config, weights, tokenizer, _ = load_model(folder)
    encoder = Encoder(config)
    of_encoder = [name for name in weights if name.startswith("model.")]
    load_weights(encoder, {n.removeprefix("model."): weights[n] for n in of_encoder}, folder)
    return encoder.to(device).eval(), tokenizer, None
