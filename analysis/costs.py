"""What an answer costs: weights, operations, time, memory. Of a network, and of the rivals without one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from tokenizers import Tokenizer

from analysis.baselines import LSA_WIDTHS
from files import model_folder
from labels import LabeledDataset, batches, encode
from model import Classifier, Config

BATCHES = (1, 32)
TIMED_TEXTS = 64
ROUNDS = 5


def flops_per_token(config: Config, length: int) -> int:
    """Operations of the encoder's products forward, a multiplication and an addition each, for a token of a
    sequence of `length`: attention looks at the window of its layer."""
    d, d_ff = config.d_model, config.d_ff
    products = 4 * d * d + (3 if config.is_modern else 2) * d * d_ff
    windows = [config.window(layer) for layer in range(config.n_layers)]
    seen = sum(length if window is None else min(length, 2 * window + 1) for window in windows)
    return 2 * (config.n_layers * products + 2 * d * seen)


def of_pretraining(folder: Path, config: Config) -> dict[str, float]:
    """Seconds, tokens and operations of the run of train.py that left this folder, as far as it says: three
    times those of the forward pass, the vocabulary at the masked tokens, windows of the greatest length."""
    if not (run := folder / "metrics.json").is_file():
        return {}
    with model_folder.reading(run):
        metrics, flags = (json.loads((folder / name).read_text()) for name in (run.name, "flags.json"))
        head = 2 * float(flags["mask_rate"]) * config.d_model * (config.d_model + config.vocab_size)
        flops = 3 * metrics["tokens"] * (flops_per_token(config, flags["max_len"]) + head)
        measured = {"seconds": metrics["seconds"], "tokens": metrics["tokens"], "flops": flops}
    return {f"pretraining_{name}": value for name, value in measured.items()}


def time_answers(answer: Callable[[list[str]], Any], texts: list[str]) -> dict[str, float]:
    """Milliseconds until one text is answered, and texts a second in batches of 32: medians of the rounds,
    after one that is not counted."""
    some = (texts * (TIMED_TEXTS // len(texts) + 1))[:TIMED_TEXTS]
    seconds = {size: [] for size in BATCHES}
    for _ in range(ROUNDS + 1):
        for size in BATCHES:
            begun = time.perf_counter()
            for first in range(0, len(some), size):
                answer(some[first : first + size])
            seconds[size].append((time.perf_counter() - begun) / len(some))
    single, batched = (float(np.median(seconds[size][1:])) for size in BATCHES)
    return {"milliseconds": 1000 * single, "texts_per_second": 1 / batched}


def peak_memory(model: Path, texts: list[str], folder: Path) -> float:
    """Megabytes that predict.py takes at most, libraries and weights included, in a process of its own."""
    file = folder / "texts.txt"
    file.write_text("\n".join(" ".join(text.split()) for text in texts[:TIMED_TEXTS]))
    script = [sys.executable, str(Path(__file__).parents[1] / "predict.py")]
    child = subprocess.Popen(
        [*script, "--model", str(model), "--file", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, _, usage = os.wait4(child.pid, 0)
    file.unlink()
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def of_network(
    config: Config,
    tokenizer: Tokenizer,
    max_len: int,
    texts: list[str],
    n_classes: int,
    device: torch.device,
    autocast,
) -> dict[str, float]:
    """Of a classifier of this network, whatever it has learned."""
    model = Classifier(config, n_classes).to(device).eval()

    def rows_of(some: list[str]) -> list[np.ndarray]:
        return encode(LabeledDataset(some, None, np.zeros(len(some)), None), tokenizer, max_len)[0]

    @torch.no_grad()
    def answer(some: list[str]) -> None:
        rows = rows_of(some)
        for _, inputs in batches(rows, np.arange(len(rows)), len(rows), device):
            with autocast:
                model(*inputs).cpu()

    length = float(np.mean([len(row) for row in rows_of(texts)]))
    costs = time_answers(answer, texts)
    costs["weights"] = sum(p.numel() for p in model.parameters())
    costs["flops_per_token"] = flops_per_token(config, round(length))
    costs["tokens_per_text"] = length
    return costs


def rival_pipelines(is_classes: bool) -> dict[str, Pipeline]:
    """Bag of words and LSA as they would be used: baselines.py's parts end to end."""
    last = LogisticRegression if is_classes else Ridge
    bag = make_pipeline(TfidfVectorizer(sublinear_tf=True), last())
    reduced = (TruncatedSVD(LSA_WIDTHS[1], random_state=0), Normalizer())
    lsa = make_pipeline(TfidfVectorizer(sublinear_tf=True), *reduced, last())
    return {"bag_of_words": bag, "lsa": lsa}
