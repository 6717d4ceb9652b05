"""Every patch of docs/forking.md applies to today's code, trains, and leaves a model that loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "forking.md").read_text()
PATCHES = dict(re.findall(r"^## \d\. (.+?)$.*?^```diff\n(.*?)^```$", DOCUMENT, re.S | re.M))
WITHOUT_LEARNING = ["--lr-muon", "0", "--lr-adamw", "0", "--lr-embedding", "0"]
FLAGS = {
    "SwiGLU": ["--activation", "silu"],
    "A second objective": ["--replaced-weight", "0.5"],
    "A Unigram tokenizer": [],
    "Early stopping": ["--patience", "1", "--save-every", "1", *WITHOUT_LEARNING],
    "Attention pooling": [],
}
SMALL = "--steps 5 --layers 1 --d-model 64 --max-len 32 --micro-batch-tokens 512 --dtype float32"
SMALL = SMALL.split()

REFUSED = """
import train
try:
    train.parse_args(["--model", "pretrained", "--activation", "gelu"])
except SystemExit as stop:
    print(stop.code)
"""
TWO_SEEDS = """
import sys, train
for seed in "14":
    train.main([*sys.argv[1:], "--seed", seed, "--out", f"seed-{seed}"])
"""


def python(fork: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(fork)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=fork, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", FLAGS)
def test_a_documented_fork_trains_and_its_model_loads(name, corpus_file, topics, tmp_path):
    fork = tmp_path / "fork"
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for file in files.stdout.split():
        if not file.startswith("tests/") and (ROOT / file).exists():
            (fork / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, fork / file)
    apply = ["git", "apply", "-"]
    applied = subprocess.run(apply, cwd=fork, input=PATCHES[name].encode(), capture_output=True)
    assert applied.returncode == 0, applied.stderr.decode()

    out = fork / "pretrained"
    flags = ["--corpus", str(corpus_file), *SMALL]
    log = python(fork, "train.py", *flags, "--out", str(out), *FLAGS[name])
    config = json.loads((out / "config.json").read_text())
    weights = safetensors.torch.load_file(out / "model.safetensors")
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["validation_loss"] > 0
    assert python(fork, "predict.py", "--model", str(out), "bal [MASK] kist.")
    if name == "SwiGLU":
        assert config["hidden_activation"] == "silu"
        assert python(fork, "-c", REFUSED) == "2\n"
    if name == "A second objective":
        assert points[-1]["validation_replaced"] > 0
        assert not any("detector" in weight for weight in weights)
        python(fork, "-c", TWO_SEEDS, *flags, "--replaced-weight", "0")
        for seed in "14":
            train.main([*flags, "--seed", seed, "--out", str(tmp_path / seed)])
            plain = (tmp_path / seed / "model.safetensors").read_bytes()
            assert (fork / f"seed-{seed}" / "model.safetensors").read_bytes() == plain
    if name == "A Unigram tokenizer":
        assert json.loads((out / "tokenizer.json").read_text())["model"]["type"] == "Unigram"
    if name == "Early stopping":
        assert "stopped early" in log and points[-1]["step"] == 2
        assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    if name == "Attention pooling":
        tuned = fork / "tuned"
        labels = ["--train", str(topics[0]), "--test", str(topics[1]), "--methods", "pretrained"]
        flags = ["--model", str(out), "--out", str(tuned), "--epochs", "1", *labels]
        python(fork, "finetune.py", "--pooling", "attention", "--dtype", "float32", *flags)
        config = json.loads((tuned / "config.json").read_text())
        assert config["classifier_pooling"] == "attention"
        weights = safetensors.torch.load_file(tuned / "model.safetensors")
        assert weights["pooler.query"].any()
        assert python(fork, "predict.py", "--model", str(tuned), "bal dom kist.")


def test_every_documented_fork_is_tried():
    assert set(PATCHES) == set(FLAGS)
