"""What files/model_folder.py, disk.py and cli.py promise.

Models are saved and loaded whole and strictly, mistakes are one line, and hardware is chosen.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from files import cli, disk, model_folder
from files.cli import Parser, choose_hardware
from files.disk import UserError
from files.tokenizer import train_tokenizer
from model import Classifier, Config, MaskedLM, Tagger

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOKENIZER = train_tokenizer(["ab abc abcd"] * 3, 40)
CONFIG = Config(TOKENIZER.get_vocab_size(), d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=16)


def save(folder, seed=0, config=CONFIG, tokenizer=TOKENIZER, kind=MaskedLM, extra=None):
    torch.manual_seed(seed)
    model = kind(config) if kind is MaskedLM else kind(config, 3)
    model_folder.save_model(folder, model, tokenizer, extra)
    return model


def content(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def change_weights(folder, **changes):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(weights | changes, folder / "model.safetensors")


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def no_space(*_):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------------------------------- loading


def test_a_saved_model_is_what_load_model_returns(tmp_path):
    folder = tmp_path / "new" / "folder"
    model = save(folder)
    config, weights, tokenizer, raw = model_folder.load_model(folder)
    assert config == CONFIG
    assert raw["model_type"] == "modernbert"
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(content(folder)) == names

    other = MaskedLM(config)
    model_folder.load_weights(other, weights, folder)
    for name, weight in model.state_dict().items():
        if not name.startswith(MaskedLM.pretraining_only):
            assert torch.equal(other.state_dict()[name], weight)


@pytest.mark.parametrize("kind", (MaskedLM, Classifier, Tagger))
def test_open_model_computes_what_was_saved(tmp_path, kind):
    model = save(tmp_path, kind=kind, extra={"id2label": {0: "a", 1: "b"}}).eval()
    again, _, names = model_folder.open_model(tmp_path, CPU)
    assert type(again) is kind
    assert names == (None if kind is MaskedLM else ["a", "b", "LABEL_2"])
    inputs = torch.tensor([2, 9, 8, 3]), torch.tensor([0, 4], dtype=torch.int32), 4
    compute = type(model).logits if kind is MaskedLM else type(model).__call__
    assert torch.equal(compute(again, *inputs), compute(model, *inputs))


@pytest.mark.parametrize("name", ("nothing", ".", "runs/nothing", "a/b/c", "folder", "file"))
def test_what_is_neither_a_model_nor_a_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / name if name == "nothing" else Path(name)
    with pytest.raises(UserError) as error:
        model_folder.load_model(path)
    assert_one_line(error, f"{path}: no checkpoint")


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
    assert_one_line(error, tmp_path)


BROKEN_CONFIGS = ("{}", "[]", "null", "3", '"x"', "{", "\0", "[" * 9, '{"vocab_size": 40}')


@pytest.mark.parametrize("text", BROKEN_CONFIGS)
def test_a_broken_config(tmp_path, text):
    save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize(
    "change",
    (
        {"hidden_size": 9},
        {"hidden_size": "8"},
        {"hidden_size": None},
        {"hidden_size": 8.5},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"intermediate_size": 10**9},
    ),
    ids=str,
)
def test_a_config_of_impossible_sizes(tmp_path, change):
    save(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path)


def test_the_tokenizer_of_another_model(tmp_path):
    save(tmp_path)
    train_tokenizer(["xyz"] * 3, 40).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path, "tokenizer", CONFIG.vocab_size)


@pytest.mark.parametrize("kind", [MaskedLM, Classifier, Tagger])
def test_rows_that_pad_the_embedding_are_left_out(tmp_path, kind):
    """Up to a multiple of 64, for tensor cores; the tokenizer knows nothing of them."""
    model = save(tmp_path, kind=kind)
    n_rows = 64 * math.ceil((CONFIG.vocab_size + 1) / 64)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    padded = [name for name in weights if len(weights[name]) == CONFIG.vocab_size]
    for name in padded:
        more = torch.ones(n_rows - CONFIG.vocab_size, *weights[name].shape[1:])
        weights[name] = torch.cat((weights[name], more))
    assert len(padded) == 1 + (kind is MaskedLM)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    change_config(tmp_path, vocab_size=n_rows)
    opened, _, _ = model_folder.open_model(tmp_path, CPU)
    assert opened.config == CONFIG
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight)
    change_config(tmp_path, vocab_size=n_rows + 64)
    with pytest.raises(UserError, match=f"{n_rows + 64}"):
        model_folder.load_model(tmp_path)


def test_a_weight_is_missing(tmp_path):
    save(tmp_path)
    _, weights, _, _ = model_folder.load_model(tmp_path)
    for name in weights:
        rest = {other: weight for other, weight in weights.items() if other != name}
        with pytest.raises(UserError) as error:
            model_folder.load_weights(MaskedLM(CONFIG), rest, tmp_path)
        assert_one_line(error, tmp_path, name)
    model_folder.load_weights(MaskedLM(CONFIG), rest, tmp_path, (name,))


@pytest.mark.parametrize(
    "name",
    ("extra.weight", "model.layers.2.attn.Wo.weight", "model.layers.0.mlp.Wi.bias", "header.bias"),
)
@pytest.mark.parametrize("kind", (MaskedLM, Classifier, Tagger))
def test_a_weight_without_a_use_is_an_error(tmp_path, name, kind):
    save(tmp_path, kind=kind)
    change_weights(tmp_path, **{name: torch.ones(8)})
    with pytest.raises(UserError) as error:
        model_folder.open_model(tmp_path, CPU)
    assert_one_line(error, tmp_path, f"unexpected weight {name}")


def test_the_head_of_another_task_is_left_out(tmp_path):
    save(tmp_path, kind=Classifier)
    _, weights, _, _ = model_folder.load_model(tmp_path)
    model_folder.load_weights(MaskedLM(CONFIG), weights, tmp_path, ("decoder.bias",))


def split_weights(folder, name):
    """Replace model.safetensors by two shards and their index, beside a shard of another save."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    weight_map = {}
    for i in range(3):
        shard = f"{stem}-0000{i + 1}-of-00002.{suffix}"
        part = {key: weights[key] for key in sorted(weights)[i::2]}
        if i == 2:
            part = {"of another save": torch.ones(2)}
        else:
            weight_map |= dict.fromkeys(part, shard)
        write = torch.save if suffix == "bin" else safetensors.torch.save_file
        write(part, folder / shard)
    index = {"metadata": {"total_size": 9}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return [folder / shard for shard in sorted(set(weight_map.values()))]


each_format = pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))


@each_format
@pytest.mark.parametrize("kind", (MaskedLM, Classifier))
def test_weights_in_shards(tmp_path, name, kind):
    model = save(tmp_path, kind=kind)
    split_weights(tmp_path, name)
    again, _, _ = model_folder.open_model(tmp_path, CPU)
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)


@each_format
@pytest.mark.parametrize("change", ("missing", "cut short"))
def test_a_broken_shard_is_named(tmp_path, name, change):
    save(tmp_path)
    _, shard = split_weights(tmp_path, name)
    content = shard.read_bytes()
    shard.unlink()
    if change == "cut short":
        shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, shard)


@pytest.mark.parametrize(
    "content",
    (
        "{}",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.bin"}}',
    ),
)
def test_a_broken_index_is_named(tmp_path, content):
    save(tmp_path)
    split_weights(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path)


def test_a_folder_without_weights(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod."))
@pytest.mark.parametrize("kind", (MaskedLM, Tagger))
def test_weights_of_a_wrapped_model(tmp_path, prefix, kind):
    """As DistributedDataParallel and torch.compile name them."""
    model = save(tmp_path, kind=kind)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({prefix + name: w for name, w in weights.items()}, tmp_path / "pytorch_model.bin")
    again, _, _ = model_folder.open_model(tmp_path, CPU)
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)


class WithSecondObjective(MaskedLM):
    """What a fork may do: a module and a parameter for pretraining alone."""

    pretraining_only = (*MaskedLM.pretraining_only, "order", "scale")

    def __init__(self, config):
        super().__init__(config)
        self.order = torch.nn.Linear(config.d_model, 2)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.ordering = torch.nn.Parameter(torch.ones(1))  # is not on the list


def test_what_is_for_pretraining_only_is_not_saved(tmp_path):
    model_folder.save_model(tmp_path, WithSecondObjective(CONFIG), TOKENIZER)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    plain = MaskedLM(CONFIG).state_dict().keys() - {"decoder.weight"}
    assert weights.keys() == plain | {"ordering"}
    model_folder.load_weights(WithSecondObjective(CONFIG), weights, tmp_path)
    with pytest.raises(UserError, match="unexpected weight ordering"):
        model_folder.open_model(tmp_path, CPU)
    del weights["ordering"]
    with pytest.raises(UserError, match="no weight ordering"):
        model_folder.load_weights(WithSecondObjective(CONFIG), weights, tmp_path)
    model_folder.load_weights(MaskedLM(CONFIG), weights, tmp_path)


def test_weights_of_another_size(tmp_path):
    save(tmp_path)
    _, weights, _, _ = model_folder.load_model(tmp_path)
    with pytest.raises(UserError) as error:
        other = MaskedLM(dataclasses.replace(CONFIG, d_ff=14))
        model_folder.load_weights(other, weights, tmp_path)
    assert_one_line(error, tmp_path, "mlp.Wi.weight")


def test_weights_do_not_fit_the_tokenizer(tmp_path):
    """config.json and the tokenizer agree, but the embedding has a row less."""
    save(tmp_path)
    name = "model.embeddings.tok_embeddings.weight"
    rows = safetensors.torch.load_file(tmp_path / "model.safetensors")[name]
    change_weights(tmp_path, **{name: rows[:-1]})
    with pytest.raises(UserError) as error:
        model_folder.load_model(tmp_path)
    assert_one_line(error, tmp_path, name)


@pytest.mark.parametrize("pooling", ("max", "pooler", 3, ["cls"]), ids=str)
def test_an_unknown_pooling_is_refused(tmp_path, pooling):
    save(tmp_path, kind=Classifier)
    change_config(tmp_path, classifier_pooling=pooling)
    with pytest.raises(UserError) as error:
        model_folder.open_model(tmp_path, CPU)
    assert_one_line(error, tmp_path, f"pooling {pooling!r}")


# ---------------------------------------------------------------------------------------- writing

NEW_TOKENIZER = train_tokenizer(["xy xyz xyzw"] * 3, 40)
NEW_CONFIG = dataclasses.replace(CONFIG, max_len=32, norm_eps=1e-3)


def version(folder):
    """Which model a folder holds, old or new in all its parts; or "refused", with a UserError."""
    try:
        config, weights, tokenizer, _ = model_folder.load_model(folder)
    except UserError:
        return "refused"
    torch.manual_seed(0 if config == CONFIG else 1)
    same_weights = MaskedLM(config).state_dict()
    assert all(torch.equal(same_weights[name], weight) for name, weight in weights.items())
    expected = TOKENIZER if config == CONFIG else NEW_TOKENIZER
    assert tokenizer.get_vocab() == expected.get_vocab()
    return "old" if config == CONFIG else "new"


def save_new(folder):
    save(folder, seed=1, config=NEW_CONFIG, tokenizer=NEW_TOKENIZER)


class Kill(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_overwriting_that_is_killed_between_two_writes_leaves_no_mixture(tmp_path, monkeypatch):
    assert NEW_CONFIG.vocab_size == NEW_TOKENIZER.get_vocab_size()  # sizes do not tell them apart
    versions = []
    for n_steps in range(6):  # removing config.json, and four files
        folder = tmp_path / str(n_steps)
        save(folder)
        steps_left = [None] * n_steps

        def step(real, steps_left=steps_left):
            def call(*arguments, **options):
                if not steps_left:
                    raise Kill
                steps_left.pop()
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", step(Path.unlink))
            patch.setattr(model_folder, "write_file", step(disk.write_file))
            try:
                save_new(folder)
            except Kill:
                assert n_steps < 5
        versions.append(version(folder))
        save_new(folder)
        assert version(folder) == "new"
    assert versions == ["old", "refused", "refused", "refused", "refused", "new"]


def test_write_file_replaces_a_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write_file(path, b"old")
    disk.write_file(path, b"new")
    assert content(tmp_path) == {"file": b"new"}
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError) as error:
        disk.write_file(path, b"newer")
    assert_one_line(error, path, "No space left")
    assert content(tmp_path) == {"file": b"new"}


def test_write_file_without_a_folder(tmp_path):
    with pytest.raises(UserError) as error:
        disk.write_file(tmp_path / "nothing" / "file", b"")
    assert_one_line(error, tmp_path / "nothing" / "file")


def test_save_model_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        save(tmp_path / "file" / "model")
    assert_one_line(error, tmp_path / "file" / "model", "cannot be written")


# ---------------------------------------------------------------------------------------- Windows


def test_files_are_written_where_a_folder_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows."""
    real = os.open

    def refuse_folders(path, *arguments, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    save(tmp_path)
    save_new(tmp_path)
    assert version(tmp_path) == "new"


# ------------------------------------------------------------------------------ flags and hardware


def test_the_help_shows_each_default_once():
    parser = Parser("What it is for.")
    parser.add_argument("--steps", type=int, default=7, help="how many")
    parser.add_argument("--resume", action="store_true", help="go on")
    parser.add_device()
    parser.add_dtype()
    text = " ".join(parser.format_help().split())
    assert "how many (default: 7)" in text
    assert "(default: auto)" in text
    assert text.count("default:") == 2  # neither None nor False


@pytest.mark.parametrize("flag", ("--unknown", "--ste=3", "--steps=x\udc80", "--steps=many"))
def test_a_flag_that_is_wrong_ends_the_process(flag, capsys):
    parser = Parser("What it is for.")
    parser.add_argument("--steps", type=int, default=7)
    with pytest.raises(SystemExit) as end:
        parser.parse_args([flag])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def machine(monkeypatch):
    """Sets what torch reports: CUDA devices of one capability, and the abilities of the CPU."""

    def set_machine(capability=None, n_devices=1, **cpu):
        has_cuda = capability is not None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices if has_cuda else 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)

    for name in cli.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return set_machine


@pytest.mark.parametrize("name", ("cuda", "cuda:0", "mps", "meta", "nonsense", "cuda:x"))
def test_a_device_that_does_not_exist(machine, name):
    machine()
    with pytest.raises(UserError) as error:
        choose_hardware(name, "auto")
    assert_one_line(error, f"--device {name}", "available: cpu")


def test_a_gpu_whose_driver_is_too_old_does_not_exist(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of NVML, which knows no versions
    assert choose_hardware(None, "auto")[0] == CPU


def test_an_index_of_a_gpu_that_does_not_exist(machine):
    machine((9, 0))
    assert choose_hardware("cuda:0", "auto")[0] == torch.device("cuda:0")
    with pytest.raises(UserError) as error:
        choose_hardware("cuda:1", "auto")
    assert_one_line(error, "--device cuda:1")


@pytest.mark.parametrize("name", (None, "cuda"))
def test_each_rank_of_torchrun_has_its_own_gpu(machine, monkeypatch, name):
    machine((9, 0), n_devices=2)
    for variable in cli.TORCHRUN:
        monkeypatch.setenv(variable, "1")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_hardware(name, "auto")[0] == torch.device(f"cuda:{rank}")
        assert choose_hardware("cuda:0", "auto")[0] == torch.device("cuda:0")
        assert choose_hardware("cpu", "auto")[0] == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError) as error:
        choose_hardware(name, "auto")
    assert_one_line(error, "--device cuda:2")


@pytest.mark.parametrize(
    ("abilities", "dtype"),
    (
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ),
)
def test_bfloat16_only_where_the_cpu_multiplies_it(machine, abilities, dtype):
    machine(**abilities)
    assert choose_hardware(None, "auto") == (CPU, dtype)
    assert choose_hardware("cpu", "float16")[1] == torch.float16


@pytest.mark.parametrize(
    ("capability", "dtype"), (((7, 5), torch.float32), ((8, 0), torch.bfloat16))
)
def test_bfloat16_only_where_the_gpu_multiplies_it(machine, capability, dtype):
    """Whatever the CPU beside it can do; a GPU is chosen before the CPU."""
    machine(capability, avx512_bf16=True)
    assert choose_hardware(None, "auto") == (torch.device("cuda"), dtype)
