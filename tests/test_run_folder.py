"""What run_folder.py promises: checkpoints are whole or not there, damage is seen, bad steps are counted.

Here the damage is done within the process, or in a child that ends in the middle; tests/test_damage.py does
it to real runs.
"""

import json
import math
import os
import random
import shutil
import threading

import numpy as np
import pytest
import torch

import optim
from data import train_tokenizer
from files import model_folder, run_folder
from files.disk import UserError
from model import Config, MaskedLM

TOKENIZER = train_tokenizer(["ab abc abcd"] * 3, 40)
CONFIG = Config(TOKENIZER.get_vocab_size(), d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=16)
FLAGS = {"steps": 9, "seed": 1, "mask_rate": 0.3, "corpus": [], "out": "a", "device": "cpu"}
FLAGS |= {"resume": False, "keep": 2}
FOUND = {"torch": "2.13", "threads": 2}


def save(out, step, keep=1, losses=None):
    """A checkpoint that depends on the step alone."""
    torch.manual_seed(step)
    points = [{"step": s, "validation_loss": loss} for s, loss in (losses or {}).items()]
    state = {"step": step, "points": points, "momentum": torch.randn(3), "flags": FLAGS, "environment": FOUND}
    run_folder.save_checkpoint(out, MaskedLM(CONFIG), [], torch.amp.GradScaler(enabled=False), TOKENIZER, state, keep)


def steps(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last(out):
    """(step of the newest whole checkpoint, what was said on the way to it)."""
    said = []
    folder = run_folder.latest_checkpoint(out, said.append)
    return folder and run_folder.load_state(folder, FLAGS, FOUND, said.append)["step"], said


@pytest.fixture
def begun(tmp_path):
    run_folder.start_run(tmp_path, FLAGS, FOUND)
    return tmp_path


# -------------------------------------------------------------------------------------------- what is kept


def test_a_run_without_checkpoints_says_so(begun):
    step, said = last(begun)
    assert step is None and len(said) == 1 and "starting afresh" in said[0]


def test_the_last_checkpoint_is_what_was_saved(begun):
    for step in (2, 9, 10):
        save(begun, step)
        assert steps(begun) == [f"step-{step}"]
        folder = run_folder.latest_checkpoint(begun, pytest.fail)
        state = run_folder.load_state(folder, FLAGS, FOUND, pytest.fail)
        torch.manual_seed(step)
        assert state["step"] == step and torch.equal(state["momentum"], torch.randn(3))
        assert model_folder.load_model(folder)[0] == CONFIG


def test_the_last_and_the_best_stay(begun):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 3.5, 6: 3.6, 7: 2.0}
    left = []
    for step in losses:
        save(begun, step, keep=2, losses={s: losses[s] for s in losses if s <= step})
        left.append([int(name[5:]) for name in steps(begun)])
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7]]


def test_a_new_run_does_not_go_on_from_an_earlier_one(begun):
    save(begun, 3)
    run_folder.start_run(begun, FLAGS, FOUND)
    assert last(begun)[0] is None and json.loads((begun / "environment.json").read_text()) == FOUND


@pytest.mark.parametrize("change", ({"steps": 10}, {"mask_rate": 0.15}, {"corpus": ["a.txt"]}), ids=str)
def test_resuming_with_other_flags_is_refused(begun, change):
    save(begun, 1)
    folder = run_folder.latest_checkpoint(begun, pytest.fail)
    name, value = next(iter(change.items()))
    with pytest.raises(UserError) as error:
        run_folder.load_state(folder, FLAGS | change, FOUND, pytest.fail)
    message = str(error.value)
    assert f"--{name.replace('_', '-')} {value}" in message and str(FLAGS[name]) in message
    may_change = {"resume": True, "device": "cuda", "out": "b", "keep": 7}
    assert run_folder.load_state(folder, FLAGS | may_change, FOUND, pytest.fail)


def test_another_environment_is_named(begun):
    save(begun, 1)
    said = []
    run_folder.load_state(begun / "checkpoints" / "step-1", FLAGS, FOUND | {"threads": 64}, said.append)
    assert len(said) == 1 and "threads 2, now 64" in said[0] and "torch" not in said[0]


def test_the_environment_is_told(monkeypatch):
    found = run_folder.environment(torch.device("cpu"), 2)
    assert found["torch"] == torch.__version__ and found["ranks"] == 2 and found["numpy"] == np.__version__
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment(torch.device("cpu"), 1)["commit"] is None


def test_too_small_a_disk_is_told_before_training(begun, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 13 * 10**6))
    run_folder.check_space(begun, 10**6, keep=2, n_saves=9, n_snapshots=0)
    run_folder.check_space(begun, 10**6, keep=1000, n_saves=1, n_snapshots=0)
    for more in ({"keep": 3, "n_saves": 9, "n_snapshots": 0}, {"keep": 2, "n_saves": 9, "n_snapshots": 1}):
        with pytest.raises(UserError, match="MB, and 13 MB are free"):
            run_folder.check_space(begun, 10**6, **more)
    (begun / "checkpoints" / "step-1").mkdir()
    (begun / "checkpoints" / "step-1" / "weights").write_bytes(bytes(10**6))  # makes way
    run_folder.check_space(begun, 10**6, keep=2, n_saves=9, n_snapshots=1)


# ------------------------------------------------------------------------------- written whole or not at all


class Dropped(Exception):
    """Not an OSError: nothing in the program expects it."""


def intercept(monkeypatch, at):
    """Counts the writes, syncs and renames of a save; `at(kind, number)` comes before each."""
    counts = {"write": 0, "fsync": 0, "rename": 0}

    def before(kind):
        counts[kind] += 1
        at(kind, counts[kind])

    def call(kind, real):
        return lambda *given: (before(kind), real(*given))[1]

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

    monkeypatch.setattr(model_folder, "open", lambda *given: Half(open(*given)), raising=False)  # noqa: SIM115
    monkeypatch.setattr(os, "fsync", call("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", call("rename", os.replace))
    return counts


def faults(monkeypatch, tmp_path):
    """Every (kind, number) of a save."""
    with monkeypatch.context() as patch:
        counts = intercept(patch, lambda *_: None)
        save(tmp_path / "count", 2)
    assert counts == {"write": 6, "fsync": 13, "rename": 7}
    return [(kind, number) for kind, most in counts.items() for number in range(1, most + 1)]


def check_previous(out, before):
    """The step before is what it was, unless the new one is there and whole; and saving works again."""
    step, said = last(out)
    assert step in (1, 2) and not said
    if step == 1:
        assert content(out / "checkpoints" / "step-1") == before
    save(out, 2)
    assert steps(out) == ["step-2"] and last(out) == (2, [])
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

        def at(*call, wanted=(kind, number)):
            if call == wanted:
                raise error

        with monkeypatch.context() as patch, pytest.raises((UserError, Dropped)) as caught:
            intercept(patch, at)
            save(out, 2)
        if isinstance(error, OSError):
            assert caught.type is UserError and len(str(caught.value).splitlines()) == 1
            assert "cannot be written: No space left" in str(caught.value)
        after.append(check_previous(out, before))
    assert after.count(2) == 1  # only a fault in the sync after the last renaming finds the new one in place


def test_a_kill_at_any_call_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """A child process that ends there, without a chance to tidy up."""
    after = []
    for kind, number in faults(monkeypatch, tmp_path):
        out = tmp_path / f"{kind}-{number}"
        save(out, 1)
        before = content(out / "checkpoints" / "step-1")
        if not (child := os.fork()):
            intercept(monkeypatch, lambda *call, wanted=(kind, number): call == wanted and os._exit(9))
            save(out, 2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        after.append(check_previous(out, before))
    assert after.count(2) == 1


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_kill_while_old_checkpoints_are_removed(begun, monkeypatch, call):
    """What is half removed is no checkpoint, and does not count as one that is kept."""
    for step in (1, 2, 3):
        save(begun, step, keep=3)
    if not (child := os.fork()):
        real = shutil.rmtree

        def half(folder, **given):
            if folder.name == ".old" and folder.exists():
                next(folder.glob("*.json")).unlink()
                os._exit(9)
            real(folder, **given)

        monkeypatch.setattr(shutil, "rmtree", half)
        if call == "rename":
            monkeypatch.setattr(os, "rename", lambda *_: os._exit(9))
        save(begun, 4, keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert last(begun) == (4, [])
    save(begun, 5, keep=2)
    assert steps(begun) == ["step-4", "step-5"]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """In the order of the calls: a file is synced, renamed, and its folder synced, before the folder of the
    checkpoint gets its name; then the folder around that is synced."""
    log = []
    fsync, replace = os.fsync, os.replace
    name = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(("sync", name(d))), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(("rename", str(a), str(b))), replace(a, b)))
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    files = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
    expected = []
    for file in (*files, "training.pt", "manifest.json"):
        temporary, final = str(folder / ".new" / f".{file}.tmp"), str(folder / ".new" / file)
        expected += [("sync", temporary), ("rename", temporary, final), ("sync", str(folder / ".new"))]
    expected += [("rename", str(folder / ".new"), str(folder / "step-1")), ("sync", str(folder))]
    assert log == expected


# ---------------------------------------------------------------------------------------------------- damage


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
        path = rng.choice(
            [path for path in files if path.name in ("model.safetensors", "training.pt", "manifest.json")]
        )
        raw = (other / path.name).read_bytes()
    elif kind == "more":
        path, raw = folder / "pytorch_model.bin", rng.randbytes(9)
    elif kind == "moved":  # a whole checkpoint, under the name of another step
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        return kind, "of step"
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


def test_every_one_of_200_damages_is_found_and_stepped_over(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "whole", step, keep=3)
    rng, kinds = random.Random(0), set()
    for i in range(200):
        out = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", out)
        newest = [3, 2][: rng.randint(1, 2)]
        names = []
        for step in newest:
            kind, name = corrupt(rng, out / "checkpoints" / f"step-{step}", out / "checkpoints" / "step-1")
            kinds.add(kind)
            names.append(name)
        found, said = last(out)
        assert found == 3 - len(newest), (i, kind)
        assert len(said) == len(newest)
        for step, line, name in zip(newest, said, names, strict=True):
            assert f"step-{step}: damaged, " in line and name in line and len(line.splitlines()) == 1
        shutil.rmtree(out)
    assert len(kinds) == 9


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(begun):
    save(begun, 1)
    (begun / "checkpoints" / "step-1" / "config.json").unlink()
    said = []
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        run_folder.latest_checkpoint(begun, said.append)
    assert len(said) == 1 and "config.json" in said[0] and steps(begun) == ["step-1"]


def test_damage_is_neither_counted_nor_kept_in_the_place_of_a_whole_one(begun):
    for step in (1, 2, 3):
        save(begun, step, keep=3)
    (begun / "checkpoints" / "step-3" / "config.json").unlink()
    (begun / "checkpoints" / "step-x").mkdir()
    assert last(begun)[0] == 2
    save(begun, 3, keep=2)
    assert last(begun) == (3, []) and steps(begun) == ["step-2", "step-3", "step-x"]


def test_a_damaged_later_one_does_not_make_the_newest_go(begun):
    for step in (1, 2, 9):
        save(begun, step, keep=3)
    (begun / "checkpoints" / "step-9" / "config.json").unlink()
    assert last(begun)[0] == 2
    save(begun, 3, keep=1)
    assert last(begun)[0] == 3 and steps(begun) == ["step-3", "step-9"]


# ------------------------------------------------------------------------------------------ one at a time


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    with run_folder.lock_folder(tmp_path):
        told = pytest.raises(UserError, match=f"^--out {tmp_path}: another run is writing into it$")
        with told, run_folder.lock_folder(tmp_path):
            pytest.fail("two runs in one folder")
        with run_folder.lock_folder(tmp_path / "other"):
            pass
    with pytest.raises(Dropped), run_folder.lock_folder(tmp_path):
        raise Dropped
    with run_folder.lock_folder(tmp_path):  # which the end of the one before has left free
        pass


def test_of_many_that_begin_at_once_one_gets_the_folder(tmp_path):
    got, gate = [], threading.Barrier(8)

    def begin():
        gate.wait()
        try:
            with run_folder.lock_folder(tmp_path):
                got.append(1)
                gate.wait()
        except UserError:
            got.append(0)
            gate.wait()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0] * 7 + [1]


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with run_folder.lock_folder(tmp_path):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_run_where_a_file_stands(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_folder.lock_folder(tmp_path / "file"):
        pass


# --------------------------------------------------------------------------------------- does it go well?


def test_noise_is_no_spike_and_a_leap_is_one():
    rng, health = np.random.default_rng(0), optim.new_health(False)
    losses = 3 + 4 * np.exp(-np.arange(5000) / 300) + 0.05 * rng.standard_normal(5000)
    assert not any(optim.judge(health, loss, 1.0) for loss in losses)
    assert optim.judge(health, 3.2, 1.0) == "" and "leapt to 5.0" in optim.judge(health, 5.0, 1.0)
    assert health["spikes"] == 1 and health["skipped"] == 0 and len(health["losses"]) == optim.RECENT


def test_losses_that_hardly_vary_leap_by_a_tenth_at_least():
    health = optim.new_health(False)
    assert not any(optim.judge(health, 1.0, 1.0) for _ in range(200))
    assert not optim.judge(health, 1.05, 1.0) and optim.judge(health, 1.2, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_steps_are_counted_in_a_row(bad):
    health = optim.new_health(False)
    for loss, norm, in_row in ((bad, 1, 1), (1, bad, 2), (bad, bad, 3), (1, 1, 0), (1, bad, 1)):
        said = optim.judge(health, float(loss), float(norm))
        assert health["in_row"] == in_row and ("skipped" in said) == (in_row > 0)
    assert health["skipped"] == 4 and health["patience"] == 5 < optim.new_health(True)["patience"]
