"""What a prediction costs: weights, operations, time and memory."""

import functools
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

from analysis.baselines import LSA_WIDTHS
from analysis.experiment import Setup, load_classifier
from analysis.results import Plan
from labels import LabeledDataset, batches, encode
from model import Config

TIMED_TEXTS = 64
ROUNDS = 5


def measure(plan: Plan, setup: Setup) -> dict[str, dict[str, float]]:
    """{method: {cost: value}}."""
    measured = {}
    for name, cells in plan.items():
        run = next(iter(cells.values()))[0]
        if run.method in ("ngrams", "lsa", "bag_of_words"):
            pipeline = baseline_pipeline(run.method, setup)
            measured[name] = time_predictions(pipeline.predict, setup.test.texts)
        else:
            measured[name] = network_costs(run.model, setup)
    return measured


def baseline_pipeline(method: str, setup: Setup) -> Pipeline:
    """A baseline from text to prediction, as it would be used."""
    texts = setup.train.joined_texts()
    n_grams = (1, 2 if method == "ngrams" else 1)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=n_grams, token_pattern=r"\S+")
    steps = [words]
    if method == "lsa":
        n_components = min(LSA_WIDTHS[1], len(words.fit(texts).vocabulary_))
        steps += [TruncatedSVD(n_components, random_state=0), Normalizer()]
    linear = LogisticRegression() if setup.n_classes else Ridge()
    return make_pipeline(*steps, linear).fit(texts, setup.train.targets)


@functools.cache  # methods share a network
def network_costs(model: str, setup: Setup) -> dict[str, float]:
    """The costs of a classifier with the network of a model."""
    network, tokenizer, max_len = load_classifier(model, setup)
    lengths: list[int] = []

    @torch.no_grad()
    def predict(texts: list[str]) -> None:
        examples = LabeledDataset(texts, None, np.zeros(len(texts)), None)
        rows, _ = encode(examples, tokenizer, max_len)
        lengths.extend(map(len, rows))
        for _, inputs in batches(rows, np.arange(len(rows)), len(rows), setup.device):
            with setup.autocast:
                network(*inputs).cpu()

    measured = time_predictions(predict, setup.test.texts)
    measured["weights"] = sum(parameter.numel() for parameter in network.parameters())
    measured["flops_per_token"] = flops_per_token(network.config, round(np.mean(lengths)))
    return measured | peak_memory(setup.out / "work" / "pretrained" / model, setup.test.texts)


def time_predictions(predict: Callable[[list[str]], Any], texts: list[str]) -> dict[str, float]:
    """Milliseconds per single text, the median of several rounds after one that warms up."""
    texts = (texts * (TIMED_TEXTS // len(texts) + 1))[:TIMED_TEXTS]
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for text in texts:
            predict([text])
        seconds.append((time.perf_counter() - start) / len(texts))
    return {"milliseconds": 1000 * float(np.median(seconds[1:]))}


def flops_per_token(config: Config, length: int) -> int:
    """Operations of the encoder's matrix multiplications in a forward pass, per token of a sequence
    of this length; a multiplication and an addition count as two. Local layers see a window."""
    weights = 4 * config.d_model**2 + (3 if config.is_modern else 2) * config.d_model * config.d_ff
    windows = [config.window(layer) for layer in range(config.n_layers)]
    attended = sum(length if w is None else min(length, 2 * w + 1) for w in windows)
    return 2 * (config.n_layers * weights + 2 * config.d_model * attended)


def peak_memory(classifier: Path, texts: list[str]) -> dict[str, float]:
    """Peak megabytes of a process of predict.py; empty without a classifier, or on Windows."""
    if not (classifier / "config.json").is_file() or not hasattr(os, "wait4"):
        return {}
    file = classifier / "texts.txt"
    file.write_text("\n".join(" ".join(text.split()) for text in texts[:TIMED_TEXTS]), "utf-8")
    script = str(Path(__file__).parents[1] / "predict.py")
    command = [sys.executable, script, "--model", str(classifier), "--file", str(file)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, child.returncode, usage = os.wait4(child.pid, 0)
    return {"peak_megabytes": usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}
