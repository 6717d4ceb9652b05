"""What run_folder.py promises: checkpoints are whole, damage is detected, runs do not mix.

Here the damage is done within the process, or in a child that ends in the middle;
tests/test_damage.py does it to real runs.
"""

import argparse
import fcntl
import gzip
import json
import math
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import train
from files import disk, model_folder, run_folder
from files.disk import UserError
from files.machine import Ranks
from files.step_monitor import StepMonitor
from files.tokenizer import train_tokenizer
from model import Config, MaskedLM

TOKENIZER = train_tokenizer(["ab abc abcd"] * 3, 40)
CONFIG = Config(TOKENIZER.get_vocab_size(), d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=16)
FLAGS = {"steps": 9, "seed": 1, "mask_rate": 0.3, "corpus": [], "out": "a", "device": "cpu"}
FLAGS |= {"resume": False, "keep": 2, "label_column": "a"}
ENVIRONMENT = {"torch": "2.13", "threads": 2}
RECORD = {"flags": FLAGS, "environment": ENVIRONMENT, "data": "tokens-1"}


def training(model):
    """What save_checkpoint and restore take, without an optimizer."""
    return model, torch.amp.GradScaler(enabled=False), StepMonitor()


def model_of(step):
    torch.manual_seed(step)
    return MaskedLM(CONFIG)


def same_weights(one, other):
    weights = other.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())


def save(out, step, keep=1, losses=None, record=RECORD):
    """A checkpoint that depends on the step alone."""
    model = model_of(step)
    points = [{"step": s, "validation_loss": loss} for s, loss in (losses or {}).items()]
    state = record | {"step": step, "points": points, "momentum": torch.full((3,), step / 7)}
    run_folder.save_checkpoint(out, training(model), TOKENIZER, state, keep)


def resume(out, defaults=FLAGS, **changes):
    """The state of the last checkpoint."""
    args = argparse.Namespace(out=out, resume=True)
    return run_folder.start_or_resume(args, RECORD | changes, defaults, Ranks(0, 1))


def steps(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def latest(out):
    """(step of the newest whole checkpoint, the messages on the way to it)."""
    messages = []
    folder = run_folder.latest_checkpoint(out, messages.append)
    return folder and resume(out)["step"], messages


@pytest.fixture
def started(tmp_path):
    """The folder of a run that was just started."""
    run_folder.start_run(tmp_path, RECORD)
    return tmp_path


# -------------------------------------------------------------------------------------- checkpoints


def test_a_run_without_checkpoints_says_so(started):
    step, messages = latest(started)
    assert step is None and len(messages) == 1 and "no checkpoint yet" in messages[0]


def test_the_last_checkpoint_is_what_was_saved(started):
    for step in (2, 9, 10):
        save(started, step)
        assert steps(started) == [f"step-{step}"]
        folder = run_folder.latest_checkpoint(started, pytest.fail)
        state = resume(started)
        assert state["step"] == step
        assert torch.equal(state["momentum"], torch.full((3,), step / 7))
        assert state["data"] == "tokens-1"
        assert model_folder.load_model(folder)[0] == CONFIG


def test_the_last_and_the_best_checkpoints_stay(started):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 3.5, 6: 3.6, 7: 2.0}
    left = []
    for step in losses:
        save(started, step, keep=2, losses={s: losses[s] for s in losses if s <= step})
        left.append([int(name[5:]) for name in steps(started)])
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7]]


def test_the_best_checkpoint_is_loaded(started):
    points = [{"step": s, "validation_loss": loss} for s, loss in ((1, 3.0), (2, 2.5), (3, 4.0))]
    model = model_of(9)
    assert run_folder.load_best(started, model, points) == {}
    assert same_weights(model, model_of(9))
    for step in (1, 2, 3):
        save(started, step, keep=1, losses={p["step"]: p["validation_loss"] for p in points})
    best = run_folder.load_best(started, model, [*points, {"step": 2, "loss": 9.0}])
    assert best["best_step"] == 2 and best["validation_loss"] == 2.5
    assert same_weights(model, model_of(2))


@pytest.mark.parametrize(
    "change", ({"steps": 10}, {"mask_rate": 0.15}, {"label_column": "b"}), ids=str
)
def test_resuming_with_other_flags_is_refused(started, change):
    save(started, 1)
    name, value = next(iter(change.items()))
    with pytest.raises(UserError) as error:
        resume(started, flags=FLAGS | change)
    message = str(error.value)
    assert f"--{name.replace('_', '-')} {value}" in message and str(FLAGS[name]) in message
    may_change = {"resume": True, "device": "cuda", "out": "b", "keep": 7, "keep_best": True}
    may_change |= {"corpus": ["moved.txt"], "model": "a", "train": "b.csv", "test": "c.csv"}
    assert resume(started, flags=FLAGS | may_change)


def resumed(main, flags, capsys):
    """What a run prints that goes on after its last checkpoint."""
    capsys.readouterr()
    main([*map(str, flags), "--resume"])
    return capsys.readouterr().out


def test_pretraining_goes_on_where_the_corpus_and_the_model_are_now(
    pretrained, corpus_file, tmp_path, capsys
):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "texts").mkdir(parents=True)
    shutil.copy(corpus_file, old / "texts" / "notes.txt")
    shutil.copytree(pretrained, old / "model", ignore=shutil.ignore_patterns("checkpoints"))
    flags = ["--out", tmp_path / "run", "--steps", "1", "--micro-batch-tokens", "512"]
    flags += ["--dtype", "float32", "--device", "cpu"]
    train.main([*map(str, flags), "--corpus", f"{old}/texts/notes.txt", "--model", f"{old}/model"])
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    old.rename(new)
    moved = [*flags, "--corpus", new / "texts", "--model", new / "model"]
    assert "resuming after step 1" in resumed(train.main, moved, capsys)
    with gzip.open(new / "notes.gz", "wb") as file:  # the same text, packed
        file.write(corpus_file.read_bytes())
    moved[-3] = new / "notes.gz"
    assert "resuming after step 1" in resumed(train.main, moved, capsys)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights

    moved[-3] = new / "texts"
    weights = model_folder.load_model(new / "model")
    other = MaskedLM(weights.config)
    model_folder.save_model(new / "other", other, weights.tokenizer)
    with pytest.raises(UserError, match="started with another model or other data"):
        resumed(train.main, [*flags, "--corpus", new / "texts", "--model", new / "other"], capsys)
    with open(new / "texts" / "notes.txt", "a") as file:
        file.write("\nmore")
    with pytest.raises(UserError, match="started with another model or other data"):
        resumed(train.main, moved, capsys)


def test_fine_tuning_goes_on_where_the_files_are_now(pretrained, topics, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(pretrained, old / "model", ignore=shutil.ignore_patterns("checkpoints"))
    for path in topics:
        shutil.copy(path, old)

    def flags(folder):
        files = [f"--model={folder}/model", f"--train={folder}/train.csv"]
        files += [f"--test={folder}/test.csv", "--methods", "pretrained", "--epochs", "1"]
        return [*files, "--max-len", "32", "--dtype", "float32", "--out", f"{tmp_path}/run"]

    finetune.main(flags(old))
    old.rename(new)
    assert "resuming after epoch 1 of pretrained" in resumed(finetune.main, flags(new), capsys)
    text = (new / "train.csv").read_text(encoding="utf-8")
    (new / "train.csv").write_text(text + '"bal dom",2\n', encoding="utf-8")
    with pytest.raises(UserError, match="started with another model or other data"):
        resumed(finetune.main, flags(new), capsys)


def test_a_flag_that_an_older_run_did_not_have_counts_as_its_default(started):
    older = {name: value for name, value in FLAGS.items() if name != "mask_rate"}
    save(started, 1, record=RECORD | {"flags": older | {"removed_since": 1}})
    assert resume(started, defaults={"mask_rate": 0.3})
    with pytest.raises(UserError, match=r"--resume with --mask-rate 0\.3, but .* has 0\.2"):
        resume(started, defaults={"mask_rate": 0.2})
    for defaults in ({"mask_rate": None}, {}):  # chosen later: this run's value counts
        assert resume(started, defaults=defaults)


@pytest.mark.parametrize("name", ("data", "pretraining_only", "flags", "parts"))
def test_a_checkpoint_of_another_version_is_one_clear_line(started, name):
    save(started, 1)
    path = started / "checkpoints" / "step-1" / "training.pt"
    state = torch.load(path, weights_only=True)
    del state[name]
    torch.save(state, path)
    (path.parent / "manifest.json").write_bytes(run_folder.manifest(path.parent, 1))
    with pytest.raises(UserError, match=rf"step-1: cannot be read: .*\b{name}\b"):
        resume(started)


def test_another_environment_is_logged(started, capsys):
    save(started, 1)
    resume(started)
    assert not capsys.readouterr().out
    resume(started, environment=ENVIRONMENT | {"threads": 64})
    [message] = capsys.readouterr().out.splitlines()
    assert "{'threads': 2}, now {'threads': 64}" in message and "torch" not in message


def test_other_data_are_refused(started):
    save(started, 1)
    run_folder.append_metrics(started, [{"step": 2}])
    before = content(started)
    with pytest.raises(UserError, match="started with another model or other data"):
        resume(started, data="tokens-2")
    assert content(started) == before
    state = resume(started)
    assert state["step"] == 1
    model = model_of(8)
    run_folder.restore(started, state, training(model))
    assert same_weights(model, model_of(1))


def test_weights_that_only_pretraining_needs_are_in_checkpoints_and_not_in_models(started):
    class WithExtra(MaskedLM):
        pretraining_only = ("extra", "pool")

        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(8, 3)
            self.pool = torch.nn.Parameter(torch.ones(2))

    model = WithExtra(CONFIG)
    state = RECORD | {"step": 1}
    run_folder.save_checkpoint(started, training(model), TOKENIZER, state, 1)
    folder = started / "checkpoints" / "step-1"
    assert not any("extra" in name for name in model_folder.load_model(folder)[1])
    state = resume(started)
    assert state["pretraining_only"].keys() == {"extra.weight", "extra.bias", "pool"}
    other = WithExtra(CONFIG)
    run_folder.restore(started, state, training(other))
    assert same_weights(other, model)


def test_the_environment_is_what_decides_the_result(monkeypatch):
    describe = partial(run_folder.describe, argparse.Namespace(), "data", torch.device("cpu"), 2)
    environment = describe()["environment"]
    assert environment["torch"] == torch.__version__ and environment["ranks"] == 2
    assert environment["threads"] == torch.get_num_threads()
    monkeypatch.setattr(run_folder, "ARITHMETIC", ("model.py", "kernels/[!n]*.py"))
    other = describe()["environment"]  # with another code of the norm
    assert environment.items() - other.items() == {("arithmetic", environment["arithmetic"])}


# ----------------------------------------------------------------------- a new run in an old folder


def test_a_new_run_removes_what_an_earlier_one_left(started):
    save(started, 3)
    torch.manual_seed(0)
    model_folder.save_model(started, MaskedLM(CONFIG), TOKENIZER)
    model_folder.save_model(started / "snapshots" / "step-3", MaskedLM(CONFIG), TOKENIZER)
    run_folder.append_metrics(started, [{"step": 3, "loss": 1.0}])
    for name in ("metrics.json", "curve.png", "predictions.npz"):
        (started / name).write_text("old")
    (started / "notes.txt").write_text("of the user")
    environment = ENVIRONMENT | {"threads": 5}
    run_folder.start_run(started, RECORD | {"environment": environment})
    left = {path.name for path in started.iterdir()}
    assert left == {"flags.json", "environment.json", "notes.txt"}
    assert latest(started)[0] is None
    assert json.loads((started / "environment.json").read_text()) == environment
    with pytest.raises(UserError, match="no checkpoint"):
        model_folder.load_model(started)


def test_what_is_removed_first_is_what_makes_a_folder_a_model(started, monkeypatch):
    model_folder.save_model(started, MaskedLM(CONFIG), TOKENIZER)

    unlink = Path.unlink

    def fail_at_weights(path, **options):
        if path.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", fail_at_weights)
    with pytest.raises(UserError, match="cannot be written: Input/output error"):
        run_folder.start_run(started, RECORD)
    assert not (started / "config.json").exists()


# ------------------------------------------------------------------------------------ metrics.jsonl


def test_metrics_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_folder.append_metrics(tmp_path, [{"step": 1, "loss": 3.0}])
    inode = path.stat().st_ino
    path.write_text('{"step": 1, "loss": 3.5}\n')  # another process cannot tell: it only appends
    points = [{"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.5}, {"step": 3}]
    run_folder.append_metrics(tmp_path, points)
    run_folder.append_metrics(tmp_path, [])
    assert path.stat().st_ino == inode
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.5},
        *points,
    ]


@pytest.mark.parametrize("end", ["", '{"step": 3', "\x00\x00\x00", '{"step": 3}\n', None])
def test_a_resumed_run_has_the_metrics_of_its_checkpoint(started, end):
    """Whatever a kill or a power failure left of metrics.jsonl; None is no file at all."""
    save(started, 2, losses={1: 3.0, 2: 2.5})
    path = started / "metrics.jsonl"
    if end is not None:
        run_folder.append_metrics(started, [{"step": 1, "validation_loss": 3.0}])
        with open(path, "a") as file:
            file.write(end)
    points = resume(started)["points"]
    assert points == [{"step": s, "validation_loss": loss} for s, loss in ((1, 3.0), (2, 2.5))]
    run_folder.append_metrics(started, [{"step": 3}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [*points, {"step": 3}]


# ----------------------------------------------------------------- written as a whole or not at all


class Dropped(Exception):
    """Not an OSError: nothing in the program expects it."""


def intercept(monkeypatch, at):
    """Count the writes, syncs and renames of a save; `at(kind, number)` comes before each."""
    counts = {"write": 0, "fsync": 0, "rename": 0}

    def before(kind):
        counts[kind] += 1
        at(kind, counts[kind])

    def call(kind, real):
        return lambda *arguments: (before(kind), real(*arguments))[1]

    class Half:
        """A file of which half is written before a fault."""

        def __init__(self, file):
            self.file = file

        def write(self, raw):
            try:
                before("write")
            except BaseException:
                self.file.write(bytes(raw)[: len(raw) // 2])
                self.file.flush()
                raise
            return self.file.write(raw)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(disk, "open", lambda *a: Half(open(*a)), raising=False)  # noqa: SIM115
    monkeypatch.setattr(os, "fsync", call("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", call("rename", os.replace))
    return counts


def faults(monkeypatch, tmp_path):
    """Every (kind, number) of a save."""
    with monkeypatch.context() as patch:
        counts = intercept(patch, lambda *_: None)
        save(tmp_path / "count", 2)
    # six files: each is written, synced and renamed, and its folder synced; before them the folder
    # is without a config.json, after them comes the checkpoint
    assert counts == {"write": 6, "fsync": 14, "rename": 7}
    return [(kind, number) for kind, most in counts.items() for number in range(1, most + 1)]


def check_previous(out, before):
    """The step before is unchanged, unless the new one is whole; and saving works again."""
    step, messages = latest(out)
    assert step in (1, 2) and not messages
    if step == 1:
        assert content(out / "checkpoints" / "step-1") == before
    save(out, 2)
    assert steps(out) == ["step-2"] and latest(out) == (2, [])
    return step


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Dropped()], ids=["full", "dropped"]
)
def test_a_fault_at_any_call_leaves_the_checkpoint_before(tmp_path, monkeypatch, error):
    after = []
    for kind, number in faults(monkeypatch, tmp_path):
        out = tmp_path / f"{kind}-{number}"
        save(out, 1)
        before = content(out / "checkpoints" / "step-1")

        def at(*call, fault=(kind, number)):
            if call == fault:
                raise error

        with monkeypatch.context() as patch, pytest.raises((UserError, Dropped)) as caught:
            intercept(patch, at)
            save(out, 2)
        if isinstance(error, OSError):
            assert caught.type is UserError and len(str(caught.value).splitlines()) == 1
            assert "cannot be written: No space left" in str(caught.value)
        after.append(check_previous(out, before))
    assert after.count(2) == 1  # a fault in the sync after the last rename: the new one is there


def test_a_kill_at_any_call_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """A child process that ends there, without a chance to tidy up."""
    after = []
    for kind, number in faults(monkeypatch, tmp_path):
        out = tmp_path / f"{kind}-{number}"
        save(out, 1)
        before = content(out / "checkpoints" / "step-1")
        if not (child := os.fork()):
            intercept(
                monkeypatch, lambda *call, fault=(kind, number): call == fault and os._exit(9)
            )
            save(out, 2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        after.append(check_previous(out, before))
    assert after.count(2) == 1


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_kill_while_old_checkpoints_are_removed(started, monkeypatch, call):
    """A half removed one is no checkpoint, and does not count among the last ones."""
    for step in (1, 2, 3):
        save(started, step, keep=3)
    if not (child := os.fork()):
        real = shutil.rmtree

        def half(folder, **options):
            if folder.name == ".old" and folder.exists():
                next(folder.glob("*.json")).unlink()
                os._exit(9)
            real(folder, **options)

        monkeypatch.setattr(shutil, "rmtree", half)
        if call == "rename":
            monkeypatch.setattr(os, "rename", lambda *_: os._exit(9))
        save(started, 4, keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert latest(started) == (4, [])
    save(started, 5, keep=2)
    assert steps(started) == ["step-4", "step-5"]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Each file is synced, renamed, and its folder synced, before the checkpoint gets its name and
    the folder around it is synced.
    """
    log = []
    fsync, replace = os.fsync, os.replace
    name = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(("sync", name(d))), fsync(d)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (log.append(("rename", str(a), str(b))), replace(a, b))
    )
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    files = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
    expected = [("sync", str(folder / ".new"))]  # there is no config.json
    for file in (*files, "training.pt", "manifest.json"):
        temporary, final = str(folder / ".new" / f".{file}.tmp"), str(folder / ".new" / file)
        expected += [("sync", temporary), ("rename", temporary, final)]
        expected += [("sync", str(folder / ".new"))]
    expected += [("rename", str(folder / ".new"), str(folder / "step-1")), ("sync", str(folder))]
    assert log == expected


# ------------------------------------------------------------------------------------------- damage


def corrupt(rng, folder, other):
    """One kind of damage to a checkpoint; `other` is the checkpoint of another step."""
    files = sorted(path for path in folder.iterdir())
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    kind = rng.choice(
        ["flip", "flip", "cut", "longer", "zeros", "missing", "swapped", "foreign", "more", "moved"]
    )
    if kind == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[rng.randrange(len(raw)) :]
    elif kind == "longer":
        raw += rng.randbytes(rng.randint(1, 9))
    elif kind == "zeros":
        at = rng.randrange(len(raw))
        raw[at : at + 512] = bytes(len(raw[at : at + 512]))
        if bytes(raw) == path.read_bytes():
            raw[-1] ^= 1
    elif kind == "foreign":
        names = ("model.safetensors", "training.pt", "manifest.json")
        path = rng.choice([path for path in files if path.name in names])
        raw = (other / path.name).read_bytes()
    elif kind == "more":
        path, raw = folder / "pytorch_model.bin", rng.randbytes(9)
    elif kind == "moved":  # a whole checkpoint, under the name of another step
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        return kind, "changed: step)"
    elif kind == "swapped":
        second = rng.choice([file for file in files if file != path])
        (folder / path.name).write_bytes(second.read_bytes())
        second.write_bytes(raw)
        return kind, ""
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(raw)
    return kind, "" if path.name == "manifest.json" or kind == "foreign" else path.name


def test_every_one_of_200_damages_is_detected_and_stepped_over(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "whole", step, keep=3)
    rng, kinds = random.Random(0), set()
    for i in range(200):
        out = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", out)
        newest = [3, 2][: rng.randint(1, 2)]
        names = []
        for step in newest:
            checkpoints = out / "checkpoints"
            kind, name = corrupt(rng, checkpoints / f"step-{step}", checkpoints / "step-1")
            kinds.add(kind)
            names.append(name)
        latest_step, messages = latest(out)
        assert latest_step == 3 - len(newest), (i, kind)
        assert len(messages) == len(newest)
        for step, line, name in zip(newest, messages, names, strict=True):
            assert f"step-{step}: damaged (" in line and name in line
            assert len(line.splitlines()) == 1
        shutil.rmtree(out)
    assert len(kinds) == 9


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(started):
    save(started, 1)
    (started / "checkpoints" / "step-1" / "config.json").unlink()
    messages = []
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        run_folder.latest_checkpoint(started, messages.append)
    assert len(messages) == 1 and "config.json" in messages[0] and steps(started) == ["step-1"]


def test_a_damaged_checkpoint_is_replaced_and_a_stray_folder_ignored(started):
    for step in (1, 2, 3):
        save(started, step, keep=3)
    (started / "checkpoints" / "step-3" / "config.json").unlink()
    (started / "checkpoints" / "step-x").mkdir()
    assert latest(started)[0] == 2
    save(started, 3, keep=2)
    assert latest(started) == (3, []) and steps(started) == ["step-2", "step-3", "step-x"]


def test_a_damaged_later_checkpoint_does_not_remove_the_newest(started):
    for step in (1, 2, 9):
        save(started, step, keep=3)
    (started / "checkpoints" / "step-9" / "config.json").unlink()
    assert latest(started)[0] == 2
    save(started, 3, keep=1)
    assert latest(started)[0] == 3 and steps(started) == ["step-3", "step-9"]


# --------------------------------------------------------------------------------------------- lock


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    with run_folder.lock(tmp_path):
        is_locked = pytest.raises(
            UserError, match=f"^--out {tmp_path}: another run is writing into it"
        )
        with is_locked, run_folder.lock(tmp_path):
            pytest.fail("two runs in one folder")
        with run_folder.lock(tmp_path / "other"):
            pass
    with pytest.raises(Dropped), run_folder.lock(tmp_path):
        raise Dropped
    with run_folder.lock(tmp_path):  # which the end of the run before has unlocked
        pass


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    got_lock, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        try:
            with run_folder.lock(tmp_path):
                got_lock.append(1)
                barrier.wait()
        except UserError:
            got_lock.append(0)
            barrier.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got_lock) == [0] * 7 + [1]


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_folder.lock(tmp_path), run_folder.lock(tmp_path):
        pass


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_folder.lock(tmp_path / "file"):
        pass


def test_the_folder_of_the_model_is_not_overwritten(tmp_path):
    message = f"^--out {tmp_path}: this is the folder of --model"
    with pytest.raises(UserError, match=message), run_folder.lock(tmp_path, tmp_path / "a" / ".."):
        pass


# -------------------------------------------------------------------------------------- StepMonitor


def test_losses_that_hardly_vary_spike_by_a_tenth_at_least():
    monitor = StepMonitor()
    assert not any(monitor.check(1.0, 1.0) for _ in range(200))
    assert not monitor.check(1.05, 1.0) and monitor.check(1.2, 1.0)


def test_noise_is_no_spike_and_a_jump_is_one():
    rng, monitor = np.random.default_rng(0), StepMonitor()
    losses = 3 + 4 * np.exp(-np.arange(5000) / 300) + 0.05 * rng.standard_normal(5000)
    assert not any(monitor.check(loss, 1.0) for loss in losses)
    assert monitor.check(3.2, 1.0) == "" and "loss spike: 5.0" in monitor.check(5.0, 1.0)
    assert monitor.n_spikes == 1 and monitor.n_skipped == 0
    assert len(monitor.recent_losses) == monitor.N_RECENT


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skipped_steps_are_counted_in_a_row(bad):
    monitor = StepMonitor()
    for loss, norm, in_row in ((bad, 1, 1), (1, bad, 2), (bad, bad, 3), (1, 1, 0), (1, bad, 1)):
        message = monitor.check(float(loss), float(norm))
        assert monitor.n_skipped_in_a_row == in_row
        assert (monitor.n_skipped_in_a_row > 0) == ("skipped" in message) == (in_row > 0)
    assert monitor.n_skipped == 4
    assert monitor.patience == 5 < StepMonitor(has_scaler=True).patience


def test_a_run_gives_up_after_its_patience_and_can_be_resumed_behind_it():
    monitor = StepMonitor()
    gave_up = [bool(monitor.check(math.nan, 1.0)) and monitor.gave_up for _ in range(5)]
    assert gave_up == [False] * 4 + [True]
    other = StepMonitor()
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert not other.gave_up and other.n_skipped_in_a_row == 0
    assert other.state_dict() == monitor.state_dict() | {"n_skipped_in_a_row": 0}
    assert other.n_skipped == 5
