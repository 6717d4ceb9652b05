"""Nothing is lost: damage done to real runs, in processes of their own.

A run that was killed, over and over, and resumed, is compared with one that was left alone: every byte of
weights and optimizers, and all that was logged but the clock. CI runs a sample of each; -m slow runs all.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL

import runs
import train
from text import UserError

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CLOCK = {"tokens_per_second", "seconds"}
STEPS = 24
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def flags(corpus_file, out, *more, dtype="float32", steps=STEPS):
    given = ["--corpus", str(corpus_file), "--out", str(out), "--steps", str(steps), "--dtype", dtype]
    return [*given, *SMALL, "--save-every", "3", *more]


def start(given, ranks=1, script="train.py", **more):
    """A script in a session of its own, so that a kill takes all its processes."""
    command = [sys.executable, "-u", *(TORCHRUN if ranks > 1 else []), str(ROOT / script), *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes, env=ENVIRONMENT, start_new_session=True, **more)


def finish(given, ranks=1, code=0, script="train.py", **more):
    process = start(given, ranks, script, **more)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def await_line(process, words):
    """Read on to the line with these words; False where the process ended before."""
    return any(words in line for line in process.stdout)


def plain(value):
    """Tensors as bytes, and nothing of the clock."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in CLOCK}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    return value


def result(out):
    """All that a finished run leaves, but the clock."""
    [*_, last] = runs.step_folders(out).values()
    state = torch.load(last / "training.pt", weights_only=True)
    del state["flags"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = {
        name: (out / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")
    }
    return files | plain(
        {"state": state, "logged": logged, "metrics": json.loads((out / "metrics.json").read_text())}
    )


def assert_equal(found, wanted):
    """Without the pages that pytest would print."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(found[key], dict):
            assert_equal(found[key], value)
        else:
            assert bool(found[key] == value), key


# ---------------------------------------------------------------------------------------------------- killed


def kill_and_resume(given, out, ranks, n_kills, seed):
    """Kill a run `n_kills` times at random moments, every other one during a save; returns how many of them
    left a half written checkpoint."""
    rng, n_amid = random.Random(seed), 0
    for i in range(n_kills):
        process = start([*given, *["--resume"] * (i > 0)], ranks)
        await_line(process, f"{STEPS} steps of")
        if i % 2 == 0:
            while not (out / "checkpoints" / ".new").exists() and process.poll() is None:
                pass
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 0.8))
        kill(process)
        n_amid += (out / "checkpoints" / ".new").exists()
    finish([*given, "--resume"], ranks)
    return n_amid


CASES = [(1, "float32", 3), (2, "bfloat16", 1)]
ALL_CASES = [(ranks, dtype, 20) for ranks in (1, 2) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("ranks", "dtype", "n_kills"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_CASES)],
)
def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(
    corpus_file, tmp_path, ranks, dtype, n_kills
):
    """With accumulation: two micro-batches a rank."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    given = ["--accumulate", str(2 * ranks)]
    finish(flags(corpus_file, straight, *given, dtype=dtype), ranks)
    n_amid = kill_and_resume(flags(corpus_file, killed, *given, dtype=dtype), killed, ranks, n_kills, ranks)
    assert n_amid >= 1
    assert_equal(result(killed), result(straight))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_run(corpus_file, tmp_path, ranks):
    for name in ("one", "two"):
        finish(flags(corpus_file, tmp_path / name, "--accumulate", "2"), ranks)
    assert_equal(result(tmp_path / "one"), result(tmp_path / "two"))
    finish(flags(corpus_file, tmp_path / "three", "--accumulate", "2", "--seed", "1"), ranks)
    assert result(tmp_path / "three")["model.safetensors"] != result(tmp_path / "two")["model.safetensors"]


def test_killed_after_the_last_step_it_is_finished(corpus_file, tmp_path, monkeypatch):
    train.main(flags(corpus_file, tmp_path, steps=6))
    before = result(tmp_path)
    for name in ("model.safetensors", "metrics.json", "config.json"):
        (tmp_path / name).unlink()
    train.main(flags(corpus_file, tmp_path, "--resume", steps=6))
    assert_equal(result(tmp_path), before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_saves_and_says_how_to_go_on(corpus_file, tmp_path, number, code):
    process = start(flags(corpus_file, tmp_path, "--save-every", "100000", steps=100_000))
    await_line(process, "step 3:")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output
    assert "saved; the same command with --resume goes on" in output.splitlines()[-1]
    [step] = runs.step_folders(tmp_path)
    assert step >= 3 and runs.last_step(tmp_path, pytest.fail)


def test_a_signal_before_the_first_step_is_no_traceback(corpus_file, tmp_path):
    process = start(flags("-", tmp_path), stdin=subprocess.PIPE)  # which waits for its text
    while not (tmp_path / ".lock").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_same_step(corpus_file, tmp_path):
    process = start(flags(corpus_file, tmp_path, "--save-every", "100000", steps=100_000), ranks=2)
    await_line(process, "step 3:")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.count("saved; the same command with --resume goes on") == 1
    assert len(runs.step_folders(tmp_path)) == 1 and runs.last_step(tmp_path, pytest.fail)


# ------------------------------------------------------------------------------------- the disk, the text


def test_a_limit_on_the_size_of_files_leaves_the_checkpoint_before(corpus_file, tmp_path):
    given = flags(corpus_file, tmp_path, "--save-every", "1", steps=400)
    process = start(given)
    await_line(process, "step 3:")
    kill(process)
    before = runs.last_step(tmp_path, pytest.fail)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # noqa: E731
    output = finish([*given, "--resume"], code=2, preexec_fn=limit)
    assert "cannot be written: File too large" in output.splitlines()[-1] and "Traceback" not in output
    assert runs.last_step(tmp_path, pytest.fail) == before


def test_a_full_disk_leaves_the_checkpoint_before(corpus_file, tmp_path):
    """A file system of its own, in memory: first too small from the start, then filled by others."""
    given = " ".join(flags(corpus_file, tmp_path / "disk", "--save-every", "1", "--keep", "1"))
    script = f"""
        mkdir {tmp_path}/disk && mount -t tmpfs -o size=30m none {tmp_path}/disk || exit 99
        {sys.executable} train.py {given} && exit 98
        echo "code $?"
        mount -o remount,size=300m {tmp_path}/disk
        {sys.executable} train.py {given} > {tmp_path}/said 2>&1 & run=$!
        until [ -e {tmp_path}/disk/checkpoints/step-2 ]; do sleep 0.01; done
        dd if=/dev/zero of={tmp_path}/disk/other bs=1M status=none
        wait $run
        echo "code $?"
        tail -n 1 {tmp_path}/said
        ls {tmp_path}/disk/checkpoints
        rm {tmp_path}/disk/other
        {sys.executable} train.py {given} --resume || exit 97
        cp -r {tmp_path}/disk {tmp_path}/copy
    """
    command = ["unshare", "-rm", "bash", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=200)
    except OSError:
        pytest.skip("no unshare on this machine, to mount a small file system with")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    first, _, rest = done.stdout.partition("code 2\n")
    assert "MB are free" in done.stderr and "steps of" in first
    full, _, rest = rest.partition("resuming after step ")
    assert full.startswith("code 2\n") and "cannot be written: No space left on device" in full
    assert "step-" in full and int(rest.split()[0]) >= 2
    finish(flags(corpus_file, tmp_path / "straight", "--save-every", "1", "--keep", "1"))
    assert_equal(result(tmp_path / "copy"), result(tmp_path / "straight"))


def test_two_runs_do_not_write_into_one_folder(corpus_file, tmp_path):
    given = flags(corpus_file, tmp_path, steps=100_000)
    process = start(given)
    await_line(process, "step 3:")
    output = finish([*given, "--resume"], code=2)
    assert output == f"train.py: --out {tmp_path}: another run is writing into it\n"
    assert process.poll() is None
    kill(process)
    after = start([*given, "--resume"])  # the dead one holds no lock
    assert await_line(after, "resuming after step")
    kill(after)


def test_a_damaged_checkpoint_is_stepped_over_by_a_run(corpus_file, tmp_path, capsys):
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    for out in (straight, damaged):
        train.main(flags(corpus_file, out, steps=6))
    path = damaged / "checkpoints" / "step-6" / "training.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    train.main(flags(corpus_file, damaged, "--resume", steps=6))
    said = capsys.readouterr().out
    assert "step-6: damaged, training.pt is not as it was written" in said and "resuming after step 3" in said
    assert_equal(result(damaged), result(straight))


def test_a_resumed_run_goes_on_with_its_own_text_only(corpus_file, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(corpus_file, text)
    train.main(flags(text, tmp_path / "out", steps=3))
    text.write_text(text.read_text() + "\nbal dom kist.")
    with pytest.raises(UserError, match="--corpus is not what the run"):
        train.main(flags(text, tmp_path / "out", "--resume", steps=3))


def test_another_environment_is_said_and_the_run_goes_on(corpus_file, tmp_path, monkeypatch, capsys):
    train.main(flags(corpus_file, tmp_path, steps=3))
    real = runs.environment
    monkeypatch.setattr(runs, "environment", lambda *given: real(*given) | {"torch": "1.0"})
    train.main(flags(corpus_file, tmp_path, "--resume", steps=3))
    assert f"torch {torch.__version__}, now 1.0" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ going wrong


def spoil(monkeypatch, steps, spoilt):
    """`spoilt(losses)` takes the place of the losses of these steps."""
    batch, forward, now = train.Corpus.batch, train.MaskedLM.forward, []

    def note(corpus, step, *rest):
        now[:] = [step + 1]
        return batch(corpus, step, *rest)

    def losses(model, some):
        found = forward(model, some)
        return spoilt(found) if model.training and torch.is_grad_enabled() and now[0] in steps else found

    monkeypatch.setattr(train.Corpus, "batch", note)
    monkeypatch.setattr(train.MaskedLM, "forward", losses)


NAN = {
    "the loss": lambda found: (found[0] + torch.tensor(float("nan")), found[1]),
    "the pooled loss": lambda found: (found[0], found[1] + torch.tensor(float("inf"))),
    "the gradient": lambda found: (
        found[0] + (found[0] - found[0].detach()) * torch.tensor(float("nan")),
        found[1],
    ),
}


@pytest.mark.parametrize("what", NAN)
def test_a_bad_step_is_skipped_and_counted(corpus_file, tmp_path, monkeypatch, capsys, what):
    spoil(monkeypatch, {4, 6, 7, 8, 9}, NAN[what])
    metrics = train.main(flags(corpus_file, tmp_path, "--snapshots", "10", steps=10))
    weights = [
        (tmp_path / "snapshots" / f"step-{s}" / "model.safetensors").read_bytes() for s in range(1, 11)
    ]
    changed = [s for s in range(2, 11) if weights[s - 1] != weights[s - 2]]
    assert changed == [2, 3, 5, 10]
    assert metrics["skipped"] == 5 and capsys.readouterr().out.count(": skipped\n") == 5


def test_five_bad_steps_in_a_row_stop_the_run_with_the_last_good_state(
    corpus_file, tmp_path, monkeypatch, capsys
):
    given = flags(corpus_file, tmp_path, "--snapshots", "20", steps=20)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        spoil(patch, set(range(8, 21)), NAN["the gradient"])
        train.main(given)
    said, folder = capsys.readouterr().out, tmp_path / "checkpoints" / "step-12"
    assert (
        ended.value.code == 1
        and f"5 bad steps in a row; the last good state is in {folder}: --resume" in said
    )
    last_good = (tmp_path / "snapshots" / "step-7" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == last_good
    train.main([*given, "--resume"])  # behind the bad ones
    assert "resuming after step 12" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() != last_good


def test_weights_that_are_lost_do_not_take_the_place_of_good_ones(corpus_file, tmp_path, capsys):
    """They are finite, but predict nothing any more: a rate far too high."""
    with pytest.raises(SystemExit) as ended:
        train.main(
            flags(corpus_file, tmp_path, "--lr-adamw", "1e30", "--lr-muon", "1e30", "--save-every", "100")
        )
    assert ended.value.code == 1 and not runs.step_folders(tmp_path)
    assert "there is no checkpoint yet: begin anew, with a lower --lr-adamw" in capsys.readouterr().out


def test_a_leap_of_the_loss_is_said_and_counted(corpus_file, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {30}, lambda found: (3 * found[0], found[1]))
    assert train.main(flags(corpus_file, tmp_path, steps=32))["spikes"] == 1
    assert "step 30: the loss leapt to" in capsys.readouterr().out


ONE_RANK_BAD = """
import os, torch, train
forward, calls = train.MaskedLM.forward, []
def losses(model, batch):
    calls.append(1)
    found = forward(model, batch)
    bad = os.environ["RANK"] == "1" and len(calls) > 3
    return (found[0] + torch.tensor(float("nan")), found[1]) if bad else found
train.MaskedLM.forward = losses
train.main()
"""


def test_ranks_decide_alike_on_a_loss_that_is_bad_on_one(corpus_file, tmp_path):
    """Its gradient is good everywhere: only the sum over the ranks shows it."""
    script = tmp_path / "one_rank_bad.py"
    script.write_text(ONE_RANK_BAD)
    output = finish(
        flags(corpus_file, tmp_path / "out", "--validate-every", "1000"), ranks=2, code=1, script=script
    )
    assert output.count(": skipped\n") == 5 and "5 bad steps in a row; the last good state is in" in output
    assert list(runs.step_folders(tmp_path / "out")) == [3, 6, 8]


# ----------------------------------------------------------------------------------------------- memory


MEASURED = """
import importlib, sys
module, name = importlib.import_module(sys.argv.pop(1)), sys.argv.pop(1)
real, pages = getattr(module, name), []
def noted(*given, **more):
    pages.append(int(open("/proc/self/statm").read().split()[1]))
    return real(*given, **more)
setattr(module, name, noted)
module.main()
print("pages", len(pages), max(pages[: len(pages) // 10]), max(pages), file=sys.stderr)
"""


def assert_flat(tmp_path, module, name, given, n_calls):
    """The memory of a script, looked at in each call of a function of it, grows by less than 2% after the
    first tenth."""
    (tmp_path / "measured.py").write_text(MEASURED)
    command = [sys.executable, str(tmp_path / "measured.py"), module, name, *map(str, given)]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, calls, early, most = done.stderr.splitlines()[-1].split()
    assert int(calls) >= n_calls and int(most) <= 1.02 * int(early), done.stderr.splitlines()[-1]


SAMPLE_OR_ALL = (0.2, pytest.param(1.0, marks=pytest.mark.slow))


@pytest.mark.parametrize("share", SAMPLE_OR_ALL)
def test_memory_stays_flat_in_pretraining(corpus_file, tmp_path, share):
    n_steps = round(2000 * share)
    given = flags(corpus_file, tmp_path / "out", "--save-every", "50", "--log-every", "20", steps=n_steps)
    assert_flat(tmp_path, "train", "mask_rate", given, n_steps)


@pytest.mark.parametrize("share", SAMPLE_OR_ALL)
def test_memory_stays_flat_in_fine_tuning(topics, pretrained, tmp_path, share):
    n_epochs = round(1000 * share)
    given = [
        "--model",
        pretrained,
        "--train",
        topics[0],
        "--labels",
        "30",
        "--epochs",
        n_epochs,
        "--lr",
        "1e-4",
    ]
    given += ["--rows", "pretrained", "--out", tmp_path / "out", "--max-len", "32"]
    assert_flat(tmp_path, "finetune", "set_learning_rates", given, n_epochs)


@pytest.mark.parametrize("share", (0.02, pytest.param(1.0, marks=pytest.mark.slow)))
def test_memory_stays_flat_in_prediction(topics, finetuned, tmp_path, share):
    n_texts, path = round(10**6 * share), tmp_path / "texts.txt"
    with open(path, "w") as file:
        file.writelines(f"bal dom kist {i % 977}.\n" for i in range(n_texts))
    given = ["--model", finetuned[0], "--file", path]
    assert_flat(tmp_path, "predict", "batches", given, n_texts // 64)
