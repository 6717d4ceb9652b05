"""Run one method on one draw of the labels: choose its hyperparameters inside these labels, fit it
on all of them, and evaluate it once on the test set."""

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import finetune
from analysis import baselines
from analysis.baselines import Fit
from analysis.evaluation import forward_all, measure
from analysis.results import Run
from files import model_folder
from files.disk import UserError
from finetune import WITH_NGRAMS
from labels import LabeledDataset, encode, subsample
from model import Classifier

# Peak learning rates; 0 trains nothing but a linear head. Networks with post-norm do worse at
# higher rates. No baseline searches less than `pretrained`, whose search thus is no advantage.
PRETRAINED_RATES = (0.0, 1e-4, 3e-4)
BERT_RATES = (0.0, 5e-5, 1e-4)
RANDOM_WEIGHTS_RATES = (5e-4, 1e-3, 2e-3)
MAX_CHOOSING = 2000  # examples on which networks are trained while the learning rate is chosen
FROZEN_GRID = tuple(("mean", c) for c in (1e-3, 1e-2, 0.1, 1.0))  # C
NOT_THE_RECIPE = {"seed", "out", "device", "resume", "compile", "log_every", "save_every", "keep"}


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a key of a cache
class Setup:
    """What all runs of an experiment share."""

    data: str  # its name in the results
    models: dict[str, Path]
    starts: dict[str, Path]  # of these models, those at step 0 of their pretraining
    train: LabeledDataset
    test: LabeledDataset
    device: torch.device
    dtype: torch.dtype
    out: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the first model, whose words all baselines count."""
        return model_folder.load_model(next(iter(self.models.values()))).tokenizer

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def plan_runs(
    setup: Setup, model: str, method: str, budgets: list[int], n_draws: int
) -> dict[int, list[Run]]:
    """{number of labels: a run per draw}."""
    key = (setup.data, model, method)
    dependencies = fingerprint(model, setup)
    return {n: [Run(*key, n, seed, dependencies) for seed in range(n_draws)] for n in budgets}


@functools.cache
def fingerprint(model: str, setup: Setup) -> str:
    """A hash of what a result depends on: dtype, labelled examples and weights."""
    digest = hashlib.sha256(str(setup.dtype).encode())
    for dataset in (setup.train, setup.test):
        digest.update(repr((dataset.texts, dataset.pairs, dataset.names)).encode())
        digest.update(dataset.targets.tobytes())
    for path in sorted(model_folder.find_model(setup.models[model]).iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def check_pool(setup: Setup) -> None:
    """Raises UserError unless the models are seeds of one recipe: equal flags, other weights."""
    for (name, folder), (other_name, other) in itertools.combinations(setup.models.items(), 2):
        if fingerprint(name, setup) == fingerprint(other_name, setup):
            raise UserError(f"--pool: {folder} and {other} have the same weights")
        flags, other_flags = read_flags(folder), read_flags(other)
        for flag in sorted(flags.keys() & other_flags.keys() - NOT_THE_RECIPE):
            if flags[flag] != other_flags[flag]:
                problem = f"were trained with different --{flag.replace('_', '-')}"
                raise UserError(f"--pool: {folder} and {other} {problem}")


def read_flags(folder: Path) -> dict[str, Any]:
    """The flags of a run of train.py; of other models there are none."""
    path = folder / "flags.json"
    with model_folder.reading(path):
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def run_method(run: Run, setup: Setup) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of a run for results.csv, and its predictions for the test set: probabilities
    (examples, classes) or numbers (examples,)."""
    start_time = time.time()
    train = subsample(setup.train, run.labels, run.seed)
    examples = baselines.concatenate(train, setup.test)
    fit, grid = METHODS[run.method](examples, run, setup)
    choice, validation = baselines.choose(fit, grid, train)
    train_idx, test_idx = np.split(np.arange(len(examples)), [len(train)])
    predictions = fit(choice, train_idx, test_idx)
    metrics = measure(setup.test.targets, predictions)
    metrics |= {"seconds": time.time() - start_time, "choice": choice, "validation": validation}
    return metrics, predictions


# ---------------------------------------------------------------------------------- the methods
# Each takes the examples of a run, the training examples first, and returns its `fit` and its grid
# (see analysis/baselines.py).


def fine_tuning(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """finetune.py with pretrained or random weights, those of step 0, or with n-grams."""
    model = setup.starts[run.model] if run.method == "start" else setup.models[run.model]
    methods = {"start": "pretrained", WITH_NGRAMS: f"pretrained,{WITH_NGRAMS}"}
    methods = methods.get(run.method, run.method)
    out = setup.out / "work" / run.method / run.model

    def fit(rate: float, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        if len(train_idx) < run.labels:  # while the rate is chosen
            rng = np.random.default_rng([run.seed, 6])
            train_idx = np.sort(rng.permutation(train_idx)[:MAX_CHOOSING])
        flags = ["--model", str(model), "--methods", methods, "--lr", str(rate)]
        flags += ["--seed", str(run.seed), "--device", str(setup.device), "--out", str(out)]
        flags += ["--dtype", str(setup.dtype).removeprefix("torch.")]
        finetune.main(flags, data=(examples[train_idx], examples[eval_idx]))
        with np.load(out / "predictions.npz") as arrays:
            return arrays[methods.rpartition(",")[2]]

    if run.method == "random_weights":
        return fit, RANDOM_WEIGHTS_RATES
    rates = PRETRAINED_RATES if model_folder.load_model(model)[0].is_modern else BERT_RATES
    if run.labels > MAX_CHOOSING:  # fewer cannot show how much a network learns from all
        rates = [rate for rate in rates if rate]
    return fit, rates


def frozen(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """A linear model of the features that the classifier of the pretrained network reads."""
    network, tokenizer, max_len = load_classifier(run.model, setup)
    rows, _ = encode(examples, tokenizer, max_len)
    features = forward_all(network, rows, np.arange(len(rows)), setup.autocast, network.features)
    return baselines.fit_linear(lambda _: features, examples), FROZEN_GRID


def spectral(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """Means of the word vectors that the pretraining started from."""
    folder = setup.models[run.model]
    config = model_folder.load_model(folder).config
    corpus = baselines.pretraining_corpus(folder, config.max_len)
    return baselines.spectral(examples, corpus, config.d_model)


def load_classifier(model: str, setup: Setup) -> tuple[Classifier, Tokenizer, int]:
    """The network of a model under a new linear layer, its tokenizer, and its maximum length."""
    folder = setup.models[model]
    config, weights, tokenizer, raw = model_folder.load_model(folder)
    config, max_len = model_folder.choose_max_len(config, None, finetune.MAX_LEN, folder)
    torch.manual_seed(0)  # some BERTs lack a pooler
    pooling = model_folder.choose_pooling(config, raw, None, folder)
    network = Classifier(config, len(setup.train.names or [""]), pooling).to(setup.device).eval()
    model_folder.load_weights(network, weights, folder, allow_missing=("classifier", "pooler"))
    return network, tokenizer, max_len


METHODS = {
    "pretrained": fine_tuning,
    WITH_NGRAMS: fine_tuning,
    "start": fine_tuning,
    "frozen": frozen,
    "random_weights": fine_tuning,
    "ngrams": lambda examples, run, setup: baselines.ngrams(examples, setup.tokenizer, run.seed),
    "lsa": lambda examples, run, setup: baselines.lsa(
        examples, run.labels, setup.models[run.model], setup.tokenizer
    ),
    "spectral": spectral,
}
