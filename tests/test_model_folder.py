"""What model_folder.py promises: mistakes told in one line, files replaced whole, hardware chosen."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch

from data import train_tokenizer
from files import disk, model_folder
from files.cli import choose_hardware
from files.disk import UserError
from model import Config, MaskedLM

TOKENIZER = train_tokenizer(["ab abc abcd"] * 3, 40)
CONFIG = Config(TOKENIZER.get_vocab_size(), d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=16)


def save(folder, seed=0):
    torch.manual_seed(seed)
    model = MaskedLM(CONFIG)
    model_folder.save_model(folder, model, TOKENIZER)
    return model


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_told_in_one_line(error, *words):
    assert "\n" not in str(error.value)
    assert all(str(word) in str(error.value) for word in words)


def fail(*_):
    raise OSError(28, "No space left on device")


# --------------------------------------------------------------------------------------------------- models


def test_a_saved_model_is_what_load_model_returns(tmp_path):
    model = save(tmp_path / "new" / "folder")
    config, weights, tokenizer, raw = model_folder.load_model(tmp_path / "new" / "folder")
    assert config == CONFIG and raw["model_type"] == "modernbert"
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    other = MaskedLM(config)
    model_folder.load_weights(other, weights, tmp_path)
    mine = model.state_dict()
    assert all(torch.equal(mine[name], weight) for name, weight in other.state_dict().items())
    assert set(content(tmp_path / "new" / "folder")) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_folder(tmp_path):
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path / "nothing")
    assert_told_in_one_line(error, tmp_path / "nothing")


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
@pytest.mark.parametrize("share", (None, 0.0, 0.001, 0.3, 0.999))
def test_a_file_is_missing_or_cut_short(tmp_path, name, share):
    save(tmp_path)
    raw = (tmp_path / name).read_bytes().rstrip()
    (tmp_path / name).unlink()
    if share is not None:
        (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_told_in_one_line(error, tmp_path)


@pytest.mark.parametrize("text", ("{}", "[]", "null", "3", '"x"', "{", "\0", "[" * 9, '{"vocab_size": 40}'))
def test_a_broken_config(tmp_path, text):
    save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_told_in_one_line(error, tmp_path)


@pytest.mark.parametrize(
    "change",
    (
        {"hidden_size": 9},
        {"hidden_size": "8"},
        {"hidden_size": None},
        {"hidden_size": 8.5},
        {"num_attention_heads": 0},
    ),
    ids=str,
)
def test_a_config_of_impossible_sizes(tmp_path, change):
    save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_told_in_one_line(error, tmp_path)


def test_the_tokenizer_of_another_model(tmp_path):
    save(tmp_path)
    train_tokenizer(["xyz"] * 3, 40).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_told_in_one_line(error, tmp_path, "tokenizer", CONFIG.vocab_size)


def test_a_weight_is_missing(tmp_path):
    save(tmp_path)
    _, weights, _, _ = model_folder.load_model(tmp_path)
    for name in weights:
        rest = {other: weight for other, weight in weights.items() if other != name}
        with pytest.raises(UserError) as error:
            model_folder.load_weights(MaskedLM(CONFIG), rest, tmp_path)
        assert_told_in_one_line(error, tmp_path, name)
    model_folder.load_weights(MaskedLM(CONFIG), rest, tmp_path, allow_missing=(name,))


def test_weights_of_another_size(tmp_path):
    save(tmp_path)
    _, weights, _, _ = model_folder.load_model(tmp_path)
    with pytest.raises(UserError) as error:
        model_folder.load_weights(MaskedLM(dataclasses.replace(CONFIG, d_ff=14)), weights, tmp_path)
    assert_told_in_one_line(error, tmp_path, "mlp.Wi.weight")


def test_weights_do_not_fit_the_tokenizer(tmp_path):
    """config.json and tokenizer agree, but the embedding has fewer rows."""
    save(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "model.embeddings.tok_embeddings.weight"
    safetensors.torch.save_file(weights | {name: weights[name][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_told_in_one_line(error, tmp_path, name)


# -------------------------------------------------------------------------------------------------- writing


def test_write_replaces_a_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write_file(path, b"old")
    disk.write_file(path, b"new")
    assert content(tmp_path) == {"file": b"new"}
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError) as error:
        disk.write_file(path, b"newer")
    assert_told_in_one_line(error, path, "No space left")
    assert path.read_bytes() == b"new"


def test_write_where_there_is_no_folder(tmp_path):
    with pytest.raises(UserError) as error:
        disk.write_file(tmp_path / "nothing" / "file", b"")
    assert_told_in_one_line(error, tmp_path / "nothing" / "file")


def test_config_comes_last(tmp_path, monkeypatch):
    """So that a folder with a config.json is whole."""
    order = []
    monkeypatch.setattr(model_folder, "write_file", lambda path, content: order.append(path.name))
    save(tmp_path)
    assert len(order) == 4 and order[-1] == "config.json"


# ------------------------------------------------------------------------------------------------- hardware


@pytest.fixture
def machine(monkeypatch):
    """Sets what torch says of the machine: CUDA cards (or None), and the abilities of its CPU."""

    def set_machine(capability=None, **cpu):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)

    return set_machine


@pytest.mark.parametrize("name", ("cuda", "cuda:0", "mps", "meta", "nonsense", "cuda:x"))
def test_a_device_that_is_not_there(machine, name):
    machine()
    with pytest.raises(UserError) as error:
        choose_hardware(name, "auto")
    assert_told_in_one_line(error, f"--device {name}", "available: cpu")


def test_a_card_that_is_not_there(machine):
    machine((9, 0))
    assert choose_hardware("cuda:0", "auto")[0] == torch.device("cuda:0")
    with pytest.raises(UserError) as error:
        choose_hardware("cuda:1", "auto")
    assert_told_in_one_line(error, "--device cuda:1")


@pytest.mark.parametrize(
    ("abilities", "dtype"),
    (
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ),
)
def test_bfloat16_only_where_the_cpu_multiplies_it(machine, abilities, dtype):
    machine(**abilities)
    assert choose_hardware(None, "auto") == (torch.device("cpu"), dtype)
    assert choose_hardware("cpu", "float16")[1] == torch.float16


@pytest.mark.parametrize(("capability", "dtype"), (((7, 5), torch.float32), ((8, 0), torch.bfloat16)))
def test_bfloat16_only_where_the_card_multiplies_it(machine, capability, dtype):
    """Whatever the CPU beside it can do; a card is chosen before the CPU."""
    machine(capability, avx512_bf16=True)
    assert choose_hardware(None, "auto") == (torch.device("cuda"), dtype)
