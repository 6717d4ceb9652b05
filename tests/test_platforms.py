"""Not on Linux: a run needs nothing that Windows or macOS lacks, and closes its files in time."""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path, PureWindowsPath

import pytest
import torch
from conftest import FAST, SMALL

import model
from files import disk, hub_datasets, machine
from files.cli import flags_to_json

ROOT = Path(model.__file__).parent

# Windows has no fcntl, no Triton, ... and refuses to open a folder, to rename onto what exists, and
# to rename or remove a file that is open. Its console is cp1252 (see the environment below).
WINDOWS = """
import builtins, contextlib, importlib, os, shutil, signal, sys
from pathlib import Path
for name in ("fcntl", "resource", "triton"):
    sys.modules[name] = None
import sklearn.pipeline, torch  # which guard what follows themselves
for name in ("sysconf", "sync", "fork", "wait4"):
    delattr(os, name)
del signal.SIGTERM
shutil._use_fd_functions = False
n_checked = 0

def open_files():
    names = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")]
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names

def guarded(function, is_rename=False):
    def check(path, *arguments, **options):
        global n_checked
        n_checked += 1
        path = os.path.realpath(path)
        for name in open_files():
            if name == path or name.startswith(path + "/") and not os.path.isdir(name):
                raise PermissionError(13, "another process uses the file", name)
        if is_rename and os.path.exists(arguments[0]):
            raise FileExistsError(17, "it exists", str(arguments[0]))
        return function(path, *arguments, **options)
    return check

def replace(old, new, real=os.replace):
    if os.path.isdir(new) or os.path.realpath(new) in open_files():
        raise PermissionError(13, "Access is denied", str(new))
    return real(old, new)

def open_file(path, *arguments, real=os.open, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, *arguments, **options)

os.rename = guarded(os.rename, is_rename=True)
os.replace = guarded(replace)
os.unlink = os.remove = guarded(os.unlink)
os.open = open_file

modules = [path for folder in ("", "files", "analysis", "kernels", "benchmarks")
           for path in Path(folder).glob("[!_]*.py")]
for path in modules:
    importlib.import_module(".".join(path.with_suffix("").parts))
import filelock, finetune, kernels.dispatch, predict, train
from files.cli import run_script
assert not filelock.has_fcntl and kernels.dispatch.triton is None
corpus, topics, out = sys.argv[1:]
small = [*SMALL, "--layers", "1", "--d-model", "64", "--save-every", "1", "--keep", "1"]
first = ["--corpus", corpus, "--out", f"{out}/a", "--steps", "3", *small, "--snapshots", "1"]
run_script(lambda: train.main(first))
run_script(lambda: train.main([*first, "--resume"]))
run_script(lambda: train.main(first))
next_one = ["--model", f"{out}/a", "--train", topics, "--out", f"{out}/b", *FAST]
run_script(lambda: finetune.main(next_one))
run_script(lambda: finetune.main([*next_one, "--resume"]))
run_script(lambda: finetune.main([*next_one, "--methods", "ngrams"]))
run_script(lambda: predict.main(["--model", f"{out}/a", "--embeddings", f"{out}/x.npy", "bal"]))
assert n_checked > 50
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it looks for open files there")
def test_the_scripts_run_without_what_windows_lacks(corpus_file, topics, tmp_path):
    script = WINDOWS.replace("*SMALL", f"*{SMALL}").replace("*FAST", f"*{FAST}")
    command = [sys.executable, "-c", script, corpus_file, topics[0], tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert "кошки" in done.stdout.decode()
    assert not list(tmp_path.rglob(".[!l]*")), "something temporary is left"


def test_names_of_the_hub_are_the_same_in_windows_paths():
    name = PureWindowsPath("hf:nyu-mll/glue:mrpc")
    assert hub_datasets.is_hub_name(name)
    flags = flags_to_json(argparse.Namespace(train=name, labels=None, seed=1))
    assert flags == {"train": "hf:nyu-mll/glue:mrpc", "labels": None, "seed": 1}
    assert disk.file_name(r'hf:a/b-c\d "e"') == "hf-a-b-c-d -e-"


def test_a_run_outside_the_main_thread_has_no_signals():
    received = []

    def collect():
        with machine.collect_signals() as signals:
            received.append(signals)

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join()
    assert received == [[]]


def test_pooling_leaves_a_device_without_segment_reduce(monkeypatch):
    """As a Mac's."""

    class MacTensor(torch.Tensor):
        device = torch.device("mps")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    states, ends = torch.rand(7, 3), torch.tensor([0, 2, 7], dtype=torch.int32)
    expected = model.mean_pool(states, ends)
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moved.append(device) or x)
    pooled = model.mean_pool(states.as_subclass(MacTensor), ends.as_subclass(MacTensor))
    assert torch.equal(pooled, expected) and moved[-1] == torch.device("mps")
