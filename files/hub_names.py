"""The names of BERT's, RoBERTa's and ModernBERT's settings and weights, and ours, both ways, as tables.

A folder is written in its family's own names and read back from them, so that `transformers` needs no
conversion. Our names are ModernBERT's; BERT's and RoBERTa's differ, and part query, key and value.
"""

from typing import Any

import torch
from torch import Tensor

from model import Config, Encoder, ShapesOnly

CLASS_PREFIX = {"modern": "ModernBert", "bert": "Bert", "roberta": "Roberta"}  # of `architectures`

# Our name of each field of Config, and theirs in config.json.
SHARED_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_len": "max_position_embeddings",
    "init_std": "initializer_range",
}
MODERN_CONFIG = SHARED_CONFIG | {
    "local_attention": "local_attention",
    "global_attn_every_n_layers": "global_attn_every_n_layers",
    "global_rope_theta": "global_rope_theta",
    "local_rope_theta": "local_rope_theta",
    "norm_eps": "norm_eps",
}
BERT_CONFIG = SHARED_CONFIG | {"n_types": "type_vocab_size", "norm_eps": "layer_norm_eps"}
# Settings that exist in one kind here: another value is another arithmetic, and refused.
ONLY = {
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "position_embedding_type": "absolute",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "is_decoder": False,
    "tie_word_embeddings": True,
}

EMBEDDINGS = {
    "tok_embeddings": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "token_type_embeddings": "token_type_embeddings",
    "norm": "LayerNorm",
}
LAYER = {
    "attn.Wqkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn.Wo": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "mlp.Wi": ("intermediate.dense",),
    "mlp.Wo": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
HEADS = {
    "bert": {
        "pooler.dense": "bert.pooler.dense",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "decoder": "cls.predictions",
        "classifier": "classifier",
    },
    "roberta": {
        "pooler.dense": "roberta.pooler.dense",
        "head.dense": "lm_head.dense",
        "head.norm": "lm_head.layer_norm",
        "decoder": "lm_head",
        "classifier": "classifier.out_proj",
    },
}
# The dense layer of RoBERTa's classifier does what a pooler does, and stands in its place.
ROBERTA_HEADS = {
    "SequenceClassification": {"pooler.dense": "classifier.dense"},
    "TokenClassification": {"classifier": "classifier"},
}
# Names in files of other programs, and of other times: Google's norms, and a bias stored under its layer.
OLD_NAMES = (
    (".gamma", ".weight"),
    (".beta", ".bias"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
# Not exported: the decoder's weight is the embedding's, the bias of the pooled loss serves pretraining alone.
NOT_EXPORTED = ("decoder.weight", "bag_bias")


def config_to_json(config: Config, task: str, special: dict[str, int]) -> dict[str, Any]:
    """What config.json says of a model; `special` holds the ids of its special tokens."""
    written = {"architectures": [f"{CLASS_PREFIX[config.family]}For{task}"]}
    written["model_type"] = CLASS_PREFIX[config.family].lower()
    names = MODERN_CONFIG if config.is_modern else BERT_CONFIG
    written |= {theirs: getattr(config, ours) for ours, theirs in names.items()}
    written["max_position_embeddings"] += config.unused_positions
    written |= {f"{name}_token_id": special[name] for name in ("pad", "cls", "sep")}
    written |= {"bos_token_id": special["cls"], "eos_token_id": special["sep"], "tie_word_embeddings": True}
    return written | ({"classifier_pooling": "mean"} if config.is_modern else {"hidden_act": "gelu"})


def config_from_json(raw: dict[str, Any]) -> Config:
    """The Config of a config.json, ours or as transformers 5 writes it, with the kind of each layer and its
    rotation by name. Raises ValueError, TypeError or KeyError where it is of none of the three families."""
    families = {prefix.lower(): family for family, prefix in CLASS_PREFIX.items()}
    if (kind := raw.get("model_type", "modernbert")) not in families:
        raise ValueError(f"model_type {kind!r} is none of {', '.join(families)}")
    for name, value in ONLY.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name} {raw[name]!r} is not supported, only {value!r} is")
    if (family := families[kind]) != "modern":
        ours = {name: raw[theirs] for name, theirs in BERT_CONFIG.items() if theirs in raw}
        ours["norm_eps"] = ours.get("norm_eps", 1e-12)
        ours["unused_positions"] = raw.get("pad_token_id", 1) + 1 if family == "roberta" else 0
        ours["max_len"] -= ours["unused_positions"]
        return Config(family=family, **ours)
    ours = {name: raw[theirs] for name, theirs in MODERN_CONFIG.items() if theirs in raw}
    ropes = raw.get("rope_parameters") or {}
    for name, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        if kind in ropes:
            ours[name] = ropes[kind]["rope_theta"]
    if layers := raw.get("layer_types"):
        every = ours["global_attn_every_n_layers"] = (*layers, "full_attention").index("full_attention", 1)
        if any((kind == "full_attention") != (layer % every == 0) for layer, kind in enumerate(layers)):
            raise ValueError("layer_types without a period are not supported")
    return Config(**ours)


def table(config: Config, task: str) -> dict[str, tuple[str, ...]]:
    """Our name of each module with weights, and theirs: three where ours is fused."""
    of_task = ROBERTA_HEADS.get(task, {}) if config.family == "roberta" else {}
    names = {ours: (theirs,) for ours, theirs in (HEADS[config.family] | of_task).items()}
    base = config.family
    names |= {f"model.embeddings.{a}": (f"{base}.embeddings.{b}",) for a, b in EMBEDDINGS.items()}
    for i in range(config.n_layers):
        for ours, theirs in LAYER.items():
            names[f"model.layers.{i}.{ours}"] = tuple(f"{base}.encoder.layer.{i}.{name}" for name in theirs)
    return names


def export_weights(weights: dict[str, Tensor], config: Config, task: str) -> dict[str, Tensor]:
    """Weights in the names of their family."""
    weights = {name: w for name, w in weights.items() if name not in NOT_EXPORTED}
    if config.is_modern:
        return weights
    names, exported = table(config, task), {}
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)
        parts = weight.chunk(len(names[module]))
        exported |= {f"{theirs}.{kind}": part for theirs, part in zip(names[module], parts, strict=True)}
    return exported


def import_weights(weights: dict[str, Tensor], config: Config, task: str) -> dict[str, Tensor]:
    """Weights in our names; those that we have no use for are left out. A file of the bare encoder, without
    the prefix of a model with a head, is read as well. Raises ValueError where the layers cannot be in it."""
    if config.n_layers > len(weights):
        raise ValueError(f"the config has {config.n_layers} layers, more than there are weights")
    for old, new in OLD_NAMES:
        weights = {name.removesuffix(old) + new * name.endswith(old): w for name, w in weights.items()}
    prefix = "model." if config.is_modern else f"{config.family}."
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: weight for name, weight in weights.items()}
    if config.is_modern:
        return {name: weight for name, weight in weights.items() if name not in NOT_EXPORTED}
    found = {}
    for ours, theirs in table(config, task).items():
        for kind in ("weight", "bias"):
            parts = [weights[f"{name}.{kind}"] for name in theirs if f"{name}.{kind}" in weights]
            if len(parts) == len(theirs):
                found[f"{ours}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found


def check_shapes(config: Config, weights: dict[str, Tensor]) -> None:
    """Raises ValueError where an encoder of that config has other weights than these: before a model takes
    the memory that an absurd config asks for."""
    with torch.device("meta"), ShapesOnly():
        expected = Encoder(config).state_dict(prefix="model.")
    for name, weight in expected.items():
        if name not in weights:
            raise ValueError(f"no weight {name}")
        if weights[name].shape != weight.shape:
            found, shape = tuple(weights[name].shape), tuple(weight.shape)
            raise ValueError(f"{name} is {found}, but by the config {shape}")
