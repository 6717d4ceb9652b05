"""Nothing is lost: damage done to real runs, in processes of their own.

A run that was killed again and again, and resumed, is compared with an uninterrupted one: every
byte of weights and optimizers, and everything in the curve except for times. CI runs a sample of
each test; -m slow runs all.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL
from tqdm import tqdm

import finetune
import predict
import train
from files import model_folder, run_folder, token_cache
from files.disk import UserError
from files.tokenizer import train_tokenizer
from model import Config, MaskedLM

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CLOCK = {"tokens_per_second", "seconds"}
STEPS = 24


@pytest.fixture(scope="session")
def seedling(corpus_file, tmp_path_factory):
    """A model so small that its steps take no time, for --model."""
    folder = tmp_path_factory.mktemp("seedling")
    tokenizer = train_tokenizer(corpus_file.read_text().splitlines(), 300)
    n_pieces = tokenizer.get_vocab_size()
    config = Config(n_pieces, d_model=32, n_layers=2, n_heads=2, d_ff=48, max_len=32)
    torch.manual_seed(0)
    model_folder.save_model(folder, MaskedLM(config), tokenizer)
    return folder


@pytest.fixture
def flags(corpus_file, seedling):
    """A function that returns the flags of a short run into a folder."""

    def make(out, *more, dtype="float32", steps=STEPS, corpus=corpus_file):
        run = ["--model", str(seedling), "--corpus", str(corpus), "--out", str(out)]
        run += ["--steps", str(steps), "--dtype", dtype]
        return [*run, *SMALL, "--save-every", "3", *more]

    return make


class Run(NamedTuple):
    """The processes of a run, and the file that they log to."""

    pids: list[int]
    log: Path

    def await_words(self, words):
        while words not in self.log.read_text():
            assert not self.has_ended(), self.log.read_text()
            time.sleep(0.005)

    def has_ended(self):
        """Whether the first process has ended; `wait` must still be called."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pids[0], options) is not None

    def kill(self):
        """Kill all processes; returns the exit code of the first, 0 if it had ended before."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        return self.wait()[0]

    def wait(self):
        """(exit code of the first process, everything that was logged)."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        return codes[0], self.log.read_text()


def start(argv, ranks=1, main=train.main):
    """main(argv) in processes of its own, forked, which saves them the seconds of the imports."""
    with tempfile.NamedTemporaryFile(delete=False) as log, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 70
        try:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # a kill would leave the lock that is shared with us
            sys.stdout = sys.stderr = open(log.name, "a", buffering=1)  # noqa: SIM115
            if ranks > 1:
                torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                torchrun |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
                os.environ.update({key: str(value) for key, value in torchrun.items()})
            main([str(flag) for flag in argv])
            code = 0
        except UserError as error:
            print(error)
            code = 2
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return Run(pids, Path(log.name))


def finish(argv, ranks=1, code=0, main=train.main):
    """The log of a run that must end with the exit code."""
    actual, log = start(argv, ranks, main).wait()
    assert actual == code, log
    return log


def command(argv, script="train.py"):
    """python train.py, a process from the command line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, "-u", script, *argv], cwd=ROOT, env=ENVIRONMENT, **pipes
    )


def await_line(process, words):
    assert any(words in line for line in process.stdout)


def plain(value):
    """A value with its tensors as bytes and without times."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in CLOCK}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    return value


def result(out):
    """Everything that a finished run leaves, except for times."""
    [*_, last] = run_folder.checkpoint_folders(out).values()
    state = torch.load(last / "training.pt", weights_only=True)
    del state["flags"], state["environment"]  # the folder, and the commit that the tests may be of
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("model.safetensors", "config.json", "tokenizer.json")
    files = {name: (out / name).read_bytes() for name in names}
    metrics = json.loads((out / "metrics.json").read_text())
    return files | plain({"state": state, "logged": logged, "metrics": metrics})


def assert_equal(actual, expected):
    """Compare without the pages that pytest would print."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict) and isinstance(actual[key], dict):
            assert_equal(actual[key], value)
        else:
            assert bool(actual[key] == value), key


# ----------------------------------------------------------------------------------------- killed


def kill_and_resume(argv, out, ranks, n_kills, seed):
    """Kill a run `n_kills` times at random moments, every other one during a save.

    Returns:
        (steps that it was resumed after, how many kills left a half written checkpoint).
    """
    rng, n_amid, steps = random.Random(seed), 0, set()
    for i in range(n_kills):
        before = set(run_folder.checkpoint_folders(out))
        run = start([*argv, *["--resume"] * (i > 0)], ranks)
        run.await_words("tokens/s")
        if i % 2 == 0:  # of a save that is not the first of this process, so that the run comes on
            new = out / "checkpoints" / ".new"
            while set(run_folder.checkpoint_folders(out)) == before or not new.exists():
                assert not run.has_ended()
            time.sleep(rng.uniform(0, 0.005) * (i > 0))
        else:
            time.sleep(rng.uniform(0, 0.1))
        assert run.kill() == -signal.SIGKILL
        n_amid += (out / "checkpoints" / ".new").exists()
        steps |= {
            int(step) for step in re.findall(r"resuming after step (\d+)", run.log.read_text())
        }
    log = finish([*argv, "--resume"], ranks)
    return steps | {int(step) for step in re.findall(r"resuming after step (\d+)", log)}, n_amid


CASES = [(1, "bfloat16", 3), (2, "float32", 1)]
ALL_CASES = [(ranks, dtype, 20) for ranks in (1, 2) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("ranks", "dtype", "n_kills"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_CASES)],
)
def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(
    flags, tmp_path, ranks, dtype, n_kills
):
    """With accumulation: two micro-batches a rank."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = {"dtype": dtype, "steps": 12 + 14 * n_kills}
    finish(flags(straight, "--accumulate", str(2 * ranks), **more), ranks)
    argv = flags(killed, "--accumulate", str(2 * ranks), **more)
    steps, n_amid = kill_and_resume(argv, killed, ranks, n_kills, ranks)
    assert len(steps) >= n_kills // 2 and steps and n_amid >= max(1, n_kills // 10)
    assert_equal(result(killed), result(straight))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_seed_gives_the_same_run(flags, tmp_path, ranks):
    for name in ("one", "two"):
        finish(flags(tmp_path / name, "--accumulate", "2", steps=9), ranks)
    assert_equal(result(tmp_path / "one"), result(tmp_path / "two"))


@pytest.mark.slow
def test_three_ranks_resume_to_the_bit(corpus_file, tmp_path):
    """DDP sums the gradients of a model of several megabytes in groups, and in other groups after
    the first step of a process, which changes the order of the sums.
    """
    argv = ["--corpus", corpus_file, "--steps", 6, "--dtype", "float32", *SMALL, "--save-every", 3]
    finish([*argv, "--out", tmp_path / "straight"], ranks=3)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-6")
    log = finish([*argv, "--out", tmp_path / "resumed", "--resume"], ranks=3)
    assert "resuming after step 3" in log
    assert_equal(result(tmp_path / "resumed"), result(tmp_path / "straight"))


def test_machines_without_a_common_disk_prepare_the_corpus_each_for_itself(flags, tmp_path):
    def on_its_own_machine(argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_cache, "CACHE", tmp_path / f"cache-{os.environ['RANK']}")
            patch.setenv("LOCAL_RANK", "0")
            train.main(argv)

    finish(flags(tmp_path / "two"), ranks=2, main=on_its_own_machine)
    content = [sorted(p.name for p in (tmp_path / f"cache-{i}").rglob("*")) for i in range(2)]
    assert content[0] == content[1] and "tokens.bin" in content[0]
    finish(flags(tmp_path / "one"), ranks=2)
    assert_equal(result(tmp_path / "two"), result(tmp_path / "one"))


@pytest.mark.slow
def test_torchrun_killed_with_all_its_processes(flags, tmp_path):
    """From the command line, as a user would."""
    argv = flags(tmp_path / "killed", "--accumulate", "2", steps=60)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
    ]
    for i in range(3):
        torchrun = subprocess.Popen(
            [*launch, *argv, *["--resume"] * (i > 0)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        await_line(torchrun, "tokens/s")
        time.sleep(0.2)
        children = subprocess.run(
            ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True
        ).stdout
        torchrun.kill()
        for rank in map(int, children.split()):  # which outlive it, in sessions of their own
            os.kill(rank, signal.SIGKILL)
        torchrun.communicate()
    finish([*argv, "--resume"], ranks=2)
    finish(flags(tmp_path / "straight", "--accumulate", "2", steps=60), ranks=2)
    assert_equal(result(tmp_path / "killed"), result(tmp_path / "straight"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_after_its_last_step_is_finished(flags, tmp_path, ranks):
    argv = flags(tmp_path, "--accumulate", "2", steps=6)
    finish(argv, ranks)
    before = result(tmp_path)
    for name in ("model.safetensors", "metrics.json", "config.json"):
        (tmp_path / name).unlink()
    log = finish([*argv, "--resume"], ranks)
    assert "Traceback" not in log  # of the second rank either
    assert_equal(result(tmp_path), before)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(*SIGNALS[0], marks=pytest.mark.slow), SIGNALS[1]]
)
def test_a_signal_saves_and_says_how_to_go_on(flags, tmp_path, number, code):
    process = command(flags(tmp_path, "--save-every", "100000", steps=100_000))
    await_line(process, "step 3:")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output
    assert "saved; --resume continues the run" in output.splitlines()[-1]
    [step] = run_folder.checkpoint_folders(tmp_path)
    assert step >= 3 and run_folder.latest_checkpoint(tmp_path, pytest.fail)


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_no_traceback(flags, tmp_path):
    reading, writing = os.pipe()  # it waits for the end of its text, which does not come
    pipes = {"stdin": reading, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    argv = [sys.executable, "train.py", *flags(tmp_path / "out", corpus="-")]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, **pipes)
    while not (tmp_path / "out" / ".lock").exists():
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    os.close(reading)
    os.close(writing)
    assert process.returncode == 130 and "Traceback" not in output


def test_a_signal_to_one_rank_stops_both_after_the_same_step(flags, tmp_path):
    run = start(flags(tmp_path, "--save-every", "100000", steps=100_000), ranks=2)
    run.await_words("step 3:")
    os.kill(run.pids[1], signal.SIGTERM)
    code, log = run.wait()
    assert code == 143 and log.count("saved; --resume continues the run") == 1
    assert len(run_folder.checkpoint_folders(tmp_path)) == 1 and run_folder.latest_checkpoint(
        tmp_path, pytest.fail
    )


# ------------------------------------------------------------------------------- the disk, the text


def test_a_limit_on_the_size_of_files_leaves_the_checkpoint_before(flags, tmp_path):
    argv = flags(tmp_path, "--save-every", "1", steps=400)
    run = start(argv)
    run.await_words("step 3:")
    run.kill()
    before = run_folder.latest_checkpoint(tmp_path, pytest.fail)

    def limited(argv):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
        train.main(argv)

    log = finish([*argv, "--resume"], code=2, main=limited)
    assert "cannot be written: File too large" in log.splitlines()[-1]
    assert run_folder.latest_checkpoint(tmp_path, pytest.fail) == before


FULL_DISK = """
import os, subprocess, sys, threading, time, torch, train
from files.disk import UserError
disk, argv = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
def fill():
    while not os.path.exists(disk + "/checkpoints/step-2"):
        time.sleep(0.001)
    with open(disk + "/other", "wb", buffering=0) as file:
        try:
            while file.write(bytes(10**4)):
                pass
        except OSError:
            pass
def begin():
    try:
        train.main(argv)
    except UserError as error:
        print("error:", error)
mount("size=200k")
begin()
mount("remount,size=4m")
threading.Thread(target=fill, daemon=True).start()
begin()
os.unlink(disk + "/other")
subprocess.run(["cp", "-r", disk, disk + "-copy"], check=True)
argv.append("--resume")
begin()
subprocess.run(["cp", "-r", disk, disk + "-finished"], check=True)
"""


def test_a_full_disk_leaves_the_checkpoint_before(flags, tmp_path):
    """A file system of its own, in memory: first too small, then filled by another program."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = [
        "unshare",
        "-rm",
        sys.executable,
        "-c",
        FULL_DISK,
        disk,
        *flags(disk, "--save-every", "1", "--keep", "1", steps=6),
    ]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=200
        )
    except OSError:
        pytest.skip("no unshare on this machine, to mount a small file system with")
    if done.returncode and ("unshare" in done.stderr or "'mount'" in done.stderr):
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    small, full = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    for error in (small, full):
        assert "cannot be written: No space left on device" in error
    copy, finished = (disk.with_name(disk.name + end) for end in ("-copy", "-finished"))
    [*_, step] = run_folder.checkpoint_folders(copy)
    assert (
        step >= 2
        and run_folder.latest_checkpoint(copy, pytest.fail)
        and f"resuming after step {step}\n" in done.stdout
    )
    finish(flags(tmp_path / "straight", "--save-every", "1", "--keep", "1", steps=6))
    assert_equal(result(finished), result(tmp_path / "straight"))


def test_two_runs_do_not_write_into_one_folder(flags, tmp_path):
    argv = flags(tmp_path, steps=100_000)
    run = start(argv)
    run.await_words("step 4:")  # so the checkpoint of step 3 is written
    log = finish([*argv, "--resume"], code=2)
    assert log == f"--out {tmp_path}: another run is writing into it\n"
    assert not run.has_ended()
    run.kill()
    third = start([*argv, "--resume"])  # the dead one holds no lock
    third.await_words("resuming after step")
    third.kill()


def test_a_damaged_checkpoint_is_stepped_over_by_a_run(flags, tmp_path, capsys):
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    for out in (straight, damaged):
        train.main(flags(out, steps=6))
    path = damaged / "checkpoints" / "step-6" / "training.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    train.main(flags(damaged, "--resume", steps=6))
    log = capsys.readouterr().out
    assert (
        "step-6: damaged (changed: training.pt), skipped" in log and "resuming after step 3" in log
    )
    assert_equal(result(damaged), result(straight))


def test_a_resumed_run_continues_on_its_own_text_only(flags, corpus_file, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(corpus_file, text)
    train.main(flags(tmp_path / "out", corpus=text, steps=3))
    text.write_text(text.read_text() + "\nbal dom kist.")
    with pytest.raises(UserError, match="started with another model or other data"):
        train.main(flags(tmp_path / "out", "--resume", corpus=text, steps=3))


def test_another_environment_is_logged_and_the_run_continues(flags, tmp_path, monkeypatch, capsys):
    train.main(flags(tmp_path, steps=3))
    monkeypatch.setattr(run_folder, "code_digest", lambda names: "other code")
    train.main(flags(tmp_path, "--resume", steps=3))
    assert "now {'arithmetic': 'other code'}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ going wrong


def spoil(monkeypatch, steps, spoilt):
    """`spoilt(loss)` takes the place of the loss of these steps."""
    forward = train.MaskedLM.forward

    def losses(model, batch):
        [(name, (total, count))] = forward(model, batch).items()
        _, _, step, *_ = (*batch.key, None)  # of validation the key is shorter
        if model.training and torch.is_grad_enabled() and step + 1 in steps:
            total = spoilt(total)
        return {name: (total, count)}

    monkeypatch.setattr(train.MaskedLM, "forward", losses)


NOT_FINITE = {
    "a loss of NaN": lambda loss: loss + torch.tensor(float("nan")),
    "an infinite loss": lambda loss: loss + torch.tensor(float("inf")),
    "the gradient": lambda loss: loss + (loss - loss.detach()) * torch.tensor(float("nan")),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    flags, tmp_path, monkeypatch, capsys, what
):
    spoil(monkeypatch, {4, 6, 7, 8, 9}, NOT_FINITE[what])
    metrics = train.main(flags(tmp_path, "--snapshots", "10", steps=10))
    folders = [tmp_path / "snapshots" / f"step-{s}" for s in range(1, 11)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    changed = [s for s in range(2, 11) if weights[s - 1] != weights[s - 2]]
    assert changed == [2, 3, 5, 10]
    assert metrics["skipped"] == 5 and capsys.readouterr().out.count(": skipped\n") == 5


def test_five_skipped_steps_in_a_row_stop_the_run_with_the_last_good_state(
    flags, tmp_path, monkeypatch, capsys
):
    argv = flags(tmp_path, "--snapshots", "20", steps=20)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        spoil(patch, set(range(8, 21)), NOT_FINITE["the gradient"])
        train.main(argv)
    folder = tmp_path / "checkpoints" / "step-12"
    assert ended.value.code == 1
    message = "5 skipped steps in a row; start again with lower rates, or --resume"
    assert message in capsys.readouterr().out
    last_good = (tmp_path / "snapshots" / "step-7" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == last_good
    train.main([*argv, "--resume"])  # behind the bad ones
    assert "resuming after step 12" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() != last_good


def test_diverged_weights_are_not_saved(flags, tmp_path, capsys):
    """They are finite, but predict nothing any more: the learning rate is far too high."""
    with pytest.raises(SystemExit) as ended:
        train.main(
            flags(tmp_path, "--lr-adamw", "1e30", "--lr-muon", "1e30", "--save-every", "100")
        )
    assert ended.value.code == 1 and not run_folder.checkpoint_folders(tmp_path)
    assert "start again with lower rates" in capsys.readouterr().out


def test_a_spike_of_the_loss_is_logged_and_counted(flags, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {30}, lambda loss: 3 * loss)
    assert train.main(flags(tmp_path, steps=32))["spikes"] == 1
    assert "step 30: loss spike: " in capsys.readouterr().out


def test_ranks_decide_alike_on_a_loss_that_is_bad_on_one(flags, tmp_path):
    """Its gradient is good everywhere: only the sum over the ranks shows it."""

    def one_rank_bad(argv):
        with pytest.MonkeyPatch.context() as patch:
            if os.environ["RANK"] == "1":
                spoil(patch, range(5, 100), NOT_FINITE["a loss of NaN"])
            train.main(argv)

    log = finish(flags(tmp_path), ranks=2, code=1, main=one_rank_bad)
    assert log.count(": skipped\n") == 5 and "stopped: 5 skipped steps in a row" in log
    assert [*run_folder.checkpoint_folders(tmp_path)] == [6, 9]


# ------------------------------------------------------------------------------------ fine-tuning

TAGGED_WORDS = "".join(
    f"bal B-X\nkir I-X\n{word} O\n\nlem O\n{word} B-Y\n\n"
    for word in ("dom", "kist", "nost", "mel") * 6
)


@pytest.fixture
def finetuning(seedling, topics, tmp_path):
    """The flags of a short fine-tuning, of classes or of token labels, into a folder."""
    words = tmp_path / "words.conll"
    words.write_text(TAGGED_WORDS)
    examples = {
        "classify": ["--train", topics[0], "--test", topics[1]],
        "tokens": ["--train", words, "--test", words, "--task", "tokens"],
    }

    def flags(out, task, *more, dtype="float32"):
        run = ["--model", seedling, "--out", out, "--epochs", 6, "--max-len", 32]
        run += ["--accumulate", 2, "--dtype", dtype]
        return [str(flag) for flag in (*run, *examples[task], *more)]

    return flags


def finetuning_result(out):
    """All that a finished fine-tuning leaves, except for the seconds."""
    names = ("model.safetensors", "config.json", "tokenizer.json", "predictions.npz")
    files = {name: (out / name).read_bytes() for name in names}
    return files | {"metrics": plain(json.loads((out / "metrics.json").read_text()))}


CASES_FINETUNING = [("classify", "float32", 4), ("tokens", "bfloat16", 2)]
ALL_CASES_FINETUNING = [
    (task, dtype, 20) for task in ("classify", "tokens") for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(
    ("task", "dtype", "n_kills"),
    [
        *CASES_FINETUNING,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_CASES_FINETUNING),
    ],
)
def test_a_fine_tuning_that_is_killed_and_resumed_equals_one_that_is_not(
    finetuning, tmp_path, task, dtype, n_kills
):
    """It is killed at random moments: within epochs, while it saves one, and between methods."""
    straight, killed, rng = tmp_path / "straight", tmp_path / "killed", random.Random(n_kills)
    finish(finetuning(straight, task, dtype=dtype), main=finetune.main)
    resumed_after = set()
    n_done = 0
    while n_done < n_kills:
        resumed = ["--resume"] * killed.exists()
        before = set(run_folder.checkpoint_folders(killed))
        run = start(finetuning(killed, task, *resumed, dtype=dtype), main=finetune.main)
        run.await_words("test examples;")
        while set(run_folder.checkpoint_folders(killed)) == before and not run.has_ended():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        exit_code = run.kill()
        resumed_after |= set(re.findall(r"resuming after epoch (\d+ of \w+)", run.log.read_text()))
        if exit_code == 0:  # it had ended before: the next one begins again
            assert_equal(finetuning_result(killed), finetuning_result(straight))
            shutil.rmtree(killed)
        else:
            n_done += 1
    resumed = ["--resume"] * killed.exists()
    finish(finetuning(killed, task, *resumed, dtype=dtype), main=finetune.main)
    assert len(resumed_after) >= n_kills // 2
    assert_equal(finetuning_result(killed), finetuning_result(straight))


def test_a_finished_fine_tuning_is_resumed_to_the_same_result(finetuning, tmp_path, capsys):
    """Only the last checkpoint is kept, and the results of the methods before are in it."""
    out = tmp_path / "out"
    finetune.main(finetuning(out, "classify"))
    before = finetuning_result(out)
    assert list(run_folder.checkpoint_folders(out)) == [12]
    (out / "model.safetensors").unlink()
    capsys.readouterr()
    finetune.main(finetuning(out, "classify", "--resume"))
    printed = capsys.readouterr().out
    assert "pretrained " in printed and "\nrandom_weights " not in printed
    assert_equal(finetuning_result(out), before)


def test_a_fine_tuning_is_resumed_with_its_own_flags_and_examples_only(
    finetuning, topics, tmp_path, capsys
):
    copy = tmp_path / "train.csv"
    shutil.copy(topics[0], copy)
    more = ("--methods", "random_weights", "--train", str(copy))
    flags = finetuning(tmp_path / "out", "classify", *more)
    finetune.main([*flags, "--resume"])
    assert "no checkpoint yet" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--resume with --seed 1, but the run in .* has 0"):
        finetune.main([*flags, "--resume", "--seed", "1"])
    copy.write_text(copy.read_text().replace("bal", "kir"))
    with pytest.raises(UserError, match="another model or other data"):
        finetune.main([*flags, "--resume"])


@pytest.mark.parametrize(
    ("number", "code"), [SIGNALS[0], pytest.param(*SIGNALS[1], marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_fine_tuning_with_a_line(finetuning, tmp_path, number, code):
    process = command(finetuning(tmp_path, "classify", "--epochs", 100), "finetune.py")
    await_line(process, "ngrams ")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("stopped; the same command with --resume continues")


def test_five_skipped_steps_in_a_row_stop_fine_tuning(finetuning, tmp_path, monkeypatch, capsys):
    forward, in_training = finetune.Classifier.forward, []

    def spoiled_forward(model, *inputs):
        in_training.append(model.training)
        logits = forward(model, *inputs)
        is_spoiled = model.training and sum(in_training) in spoiled_steps
        return logits * torch.tensor(float("nan")) if is_spoiled else logits

    monkeypatch.setattr(finetune.Classifier, "forward", spoiled_forward)
    more = ("--methods", "random_weights", "--accumulate", 1)
    spoiled_steps = {2, 4}
    finetune.main(finetuning(tmp_path / "two", "classify", *more))
    assert capsys.readouterr().out.count(": skipped") == 2
    n_steps = sum(in_training)
    spoiled_steps = set(range(n_steps + 3, n_steps + 1000))
    with pytest.raises(SystemExit) as ended:
        finetune.main(finetuning(tmp_path / "all", "classify", *more))
    # Python prints such a message to stderr, and exits with code 1
    assert str(ended.value).startswith("too many skipped steps")
    assert not (tmp_path / "all" / "metrics.json").exists()
    assert capsys.readouterr().out.count(": skipped") == 5


# ----------------------------------------------------------------------------------------- memory


def assert_flat(module, name, given, n_calls):
    """After its first calls, the memory of a script grows by less than 2%."""

    def measured(argv):
        real, pages = getattr(module, name), []

        def noted(*given, **more):
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
            return real(*given, **more)

        setattr(module, name, noted)
        module.main(argv)
        print("\npages", len(pages), max(pages[: len(pages) // 10]), max(pages))

    last = finish(given, main=measured).splitlines()[-1]
    _, calls, early, most = last.split()
    assert int(calls) >= n_calls and int(most) <= 1.02 * int(early), last


SAMPLE_OR_ALL = (0.1, pytest.param(1.0, marks=pytest.mark.slow))


@pytest.mark.parametrize("share", SAMPLE_OR_ALL)
def test_memory_stays_flat_in_pretraining(flags, tmp_path, share):
    n_steps = round(2000 * share)
    given = flags(tmp_path / "out", "--save-every", "50", "--log-every", "20", steps=n_steps)
    assert_flat(train, "set_learning_rates", given, n_steps)


def finetune_flags(seedling, topics, out, n_epochs):
    run = ["--model", seedling, "--train", topics[0], "--test", topics[1], "--out", out]
    run += ["--methods", "pretrained", "--max-len", 32, "--epochs", n_epochs, "--lr", 1e-4]
    return [str(flag) for flag in (*run, "--labels", 30, "--batch-size", 30)]


@pytest.mark.parametrize("share", SAMPLE_OR_ALL)
def test_memory_stays_flat_in_fine_tuning(topics, seedling, tmp_path, share):
    n_epochs = round(1000 * share)
    given = finetune_flags(seedling, topics, tmp_path / "out", n_epochs)
    assert_flat(finetune, "set_learning_rates", given, n_epochs)


@pytest.mark.parametrize("share", (0.02, pytest.param(1.0, marks=pytest.mark.slow)))
def test_memory_stays_flat_in_prediction(topics, seedling, tmp_path, share):
    finetune.main([str(flag) for flag in finetune_flags(seedling, topics, tmp_path / "out", 1)])
    n_texts, path = round(10**6 * share), tmp_path / "texts.txt"
    with open(path, "w") as file:
        file.writelines(f"bal dom kist {i % 977}.\n" for i in range(n_texts))
    assert_flat(predict, "batches", ["--model", tmp_path / "out", "--file", path], n_texts // 64)
