"""Settings and weights in the names of BERT, RoBERTa and ModernBERT, and in ours.

A folder is written in its family's own names and read from them, so `transformers` needs no
conversion. Our names are ModernBERT's. BERT and RoBERTa have other names, and separate matrices
for query, key and value where ours has one.

Both directions are strict: what has no name here is an error and never dropped in silence.
"""

from typing import Any

import torch
from torch import Tensor

from model import Config, Encoder

# The prefix of `architectures`; in lower case it is `model_type`.
CLASS_PREFIX = {"modern": "ModernBert", "bert": "Bert", "roberta": "Roberta"}

# Each field of Config, and its name in config.json.
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
CONFIG_NAMES = {"modern": MODERN_CONFIG, "bert": BERT_CONFIG, "roberta": BERT_CONFIG}

# Settings of `transformers` of which this program has one value. Another value is another
# arithmetic, which the names of the weights do not tell.
FIXED_SETTINGS = {
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "is_decoder": False,
    "tie_word_embeddings": True,
}

# Each module with weights, and its name in BERT and RoBERTa.
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
HEADS = {  # ours: BERT's, RoBERTa's
    "pooler.dense": ("bert.pooler.dense", "roberta.pooler.dense"),
    "head.dense": ("cls.predictions.transform.dense", "lm_head.dense"),
    "head.norm": ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    "decoder": ("cls.predictions", "lm_head"),
    "classifier": ("classifier", "classifier"),
}
# Parts of names in other files, and ours: wrappers of torch (DistributedDataParallel and compile),
# Google's norms, and the decoder as a module.
OTHER_NAMES = {
    "module.": "",
    "_orig_mod.": "",
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    "cls.predictions.decoder.": "cls.predictions.",
    "lm_head.decoder.": "lm_head.",
}
# The decoder's weight is tied: the embedding is saved, and this name is not.
TIED = "decoder.weight"
# Modules and weights that a model may leave unused. Any other unused weight is an error:
# the model that was saved computed something that the loaded one would not.
MAY_BE_UNUSED = (
    *("head", "decoder", "pooler", "classifier"),  # heads of other tasks, in our names
    *("cls.seq_relationship", "qa_outputs"),  # heads of tasks that this program does not have
    *("bert.embeddings.position_ids", "roberta.embeddings.position_ids"),  # 0, 1, 2, ...
)


def config_to_json(config: Config, task: str, special_ids: dict[str, int]) -> dict[str, Any]:
    """The content of config.json, for a task such as "MaskedLM" and the ids of special tokens.

    ValueError if a field of the config would be lost, or would be read back as another value.
    """
    prefix = CLASS_PREFIX[config.family]
    raw = {"architectures": [f"{prefix}For{task}"], "model_type": prefix.lower(), **FIXED_SETTINGS}
    raw |= {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES[config.family].items()}
    raw["max_position_embeddings"] += config.unused_positions
    raw |= {f"{name}_token_id": special_ids[name] for name in ("pad", "cls", "sep")}
    raw |= {"bos_token_id": special_ids["cls"], "eos_token_id": special_ids["sep"]}

    known = {*MODERN_CONFIG, *BERT_CONFIG, "family", "unused_positions"}
    if unknown := vars(config).keys() - known:
        raise ValueError(f"Config.{unknown.pop()} would be lost: add it to files/hub_names.py")
    if lost := dict(vars(config).items() - vars(config_from_json(raw)).items()):
        raise ValueError(f"{lost} would be lost in the config.json of a {config.family} model")
    return raw


def config_from_json(raw: dict[str, Any]) -> Config:
    """The Config of a config.json, written by us or by any version of `transformers`.

    ValueError, TypeError or KeyError if it is of none of the three families, or of a variant that
    computes something else.
    """
    model_type = raw.get("model_type")
    if model_type and raw.get("classifier_pooling"):  # "bert-mean", see `save_model`
        model_type = model_type.removesuffix(f"-{raw['classifier_pooling']}")
    families = {prefix.lower(): family for family, prefix in CLASS_PREFIX.items()}
    if model_type not in families:
        raise ValueError(f"config.json: model_type {model_type!r} is none of {', '.join(families)}")
    for name, value in FIXED_SETTINGS.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name} {raw[name]!r} is not supported, only {value!r} is")

    family = families[model_type]
    names = CONFIG_NAMES[family]
    fields = {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}
    if family == "modern":
        fields |= _read_layers(raw)
    else:
        fields.setdefault("norm_eps", 1e-12)
        fields["unused_positions"] = raw.get("pad_token_id", 1) + 1 if family == "roberta" else 0
        fields["max_len"] -= fields["unused_positions"]
    return Config(family=family, **fields)


def _read_layers(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that transformers 5 writes as the kind of each layer and the RoPE of each kind."""
    fields = {}
    names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    for attention, rope in (raw.get("rope_parameters") or {}).items():
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
        fields[names[attention]] = rope["rope_theta"]

    if layer_types := raw.get("layer_types"):
        is_global = [attention == "full_attention" for attention in layer_types]
        period = [*is_global, True].index(True, 1)
        if is_global != [layer % period == 0 for layer in range(len(layer_types))]:
            raise ValueError("layer_types without a period are not supported")
        fields["global_attn_every_n_layers"] = period
    return fields


def module_names(config: Config, task: str) -> dict[str, list[str]]:
    """BERT's or RoBERTa's name of each of our modules; three names where ours is fused."""
    base = config.family
    names = {ours: [theirs[base == "roberta"]] for ours, theirs in HEADS.items()}
    if base == "roberta" and task == "SequenceClassification":  # its pooler is in the classifier
        names |= {"pooler.dense": ["classifier.dense"], "classifier": ["classifier.out_proj"]}
    for ours, theirs in EMBEDDINGS.items():
        names[f"model.embeddings.{ours}"] = [f"{base}.embeddings.{theirs}"]
    for i in range(config.n_layers):
        for ours, parts in LAYER.items():
            names[f"model.layers.{i}.{ours}"] = [f"{base}.encoder.layer.{i}.{p}" for p in parts]
    return names


def export_weights(weights: dict[str, Tensor], config: Config, task: str) -> dict[str, Tensor]:
    """Rename weights from our names to those of the family; the tied decoder is left out.

    ValueError if a weight has no name in the tables of the family.
    """
    weights = {name: weight for name, weight in weights.items() if name != TIED}
    if config.is_modern:
        return weights
    names = module_names(config, task)
    exported = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if module not in names:
            rule = "add it to the tables of files/hub_names.py, or to MaskedLM.pretraining_only"
            raise ValueError(f"weight {name} has no name in {config.family} models; {rule}")
        for theirs, part in zip(names[module], weight.chunk(len(names[module])), strict=True):
            exported[f"{theirs}.{kind}"] = part
    return exported


def import_weights(weights: dict[str, Tensor], config: Config, task: str) -> dict[str, Tensor]:
    """Rename weights from the family's names, perhaps of a bare encoder without prefix, to ours.

    A name in no table stays as it is; `model_folder.load_weights` decides whether it is an error.
    """
    if config.n_layers > len(weights):
        raise ValueError(f"the config has {config.n_layers} layers, more than there are weights")
    for other, name in OTHER_NAMES.items():
        weights = {theirs.replace(other, name): weight for theirs, weight in weights.items()}
    prefix = "model." if config.is_modern else f"{config.family}."
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: weight for name, weight in weights.items()}

    for ours, theirs in ({} if config.is_modern else module_names(config, task)).items():
        for kind in ("weight", "bias"):
            if all(f"{name}.{kind}" in weights for name in theirs):
                parts = [weights.pop(f"{name}.{kind}") for name in theirs]
                weights[f"{ours}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    weights.pop(TIED, None)
    return weights


def check_shapes(config: Config, weights: dict[str, Tensor]) -> None:
    """ValueError if weights, in our names, lack one of the encoder, or have another shape.

    It is called before a model is made, so an absurd config cannot ask for absurd memory.
    """
    with torch.device("meta"):  # on which weights take no memory
        encoder = Encoder(config)
    for name, weight in encoder.state_dict(prefix="model.").items():
        stored = weights[name].shape if name in weights else None
        if stored != weight.shape:
            raise ValueError(f"{name}: {stored} in the file, but {weight.shape} by the config")
