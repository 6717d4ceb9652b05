"""Run one method on one draw of the labels: choose its hyperparameters inside these labels, fit it
on all of them, and evaluate it once on the test set."""

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import finetune
from analysis import baselines
from analysis.evaluation import forward_all, measure
from analysis.results import Run
from files import model_folder
from labels import LabeledDataset, encode, subsample, validation_splits
from model import Classifier, mean_pool

# Networks choose their peak learning rate (0 trains nothing but a linear head), LSA (width, C), the
# others C. No method searches less than `pretrained`, whose search therefore is no advantage.
# "layer 0", "layer 1", ... are `frozen` on the mean state after the embedding and after each layer.
GRIDS: dict[str, Sequence] = {
    "pretrained": (0.0, 1e-4, 3e-4),
    "frozen": (1e-3, 1e-2, 0.1, 1.0),
    "random_weights": (5e-4, 1e-3, 2e-3),
    "ngrams": (None,),  # chooses inside its own function
    "lsa": tuple((width, c) for width in baselines.LSA_WIDTHS for c in (1.0, 10.0)),
    "bag_of_words": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}
BERT_GRID = (0.0, 5e-5, 1e-4)  # pretrained networks with post-norm do worse at higher rates
NETWORKS = ("pretrained", "random_weights")
MAX_CHOOSING = 2000  # examples on which networks are trained while the learning rate is chosen


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a key of lru_cache
class Setup:
    """What all runs of an experiment share."""

    data: str  # its name in the results
    models: dict[str, Path]
    train: LabeledDataset
    test: LabeledDataset
    device: torch.device
    dtype: torch.dtype
    out: Path

    @property
    def n_classes(self) -> int | None:
        """None for regression."""
        return len(self.train.names) if self.train.names else None

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


def run_method(run: Run, setup: Setup) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of a run for results.csv, and its predictions for the test set: probabilities
    (examples, classes) or numbers (examples,)."""
    start_time = time.time()
    examples, n_train = draw_examples(run.labels, run.seed, setup)
    choice, validation = choose(run, examples, n_train, setup)

    train_idx = np.arange(n_train)
    test_idx = np.arange(n_train, len(examples))
    predictions = fit_and_predict(run, choice, examples, train_idx, test_idx, setup)

    metrics = measure(setup.test.targets, predictions)
    metrics |= {"seconds": time.time() - start_time, "choice": choice, "validation": validation}
    return metrics, predictions


def draw_examples(labels: int, seed: int, setup: Setup) -> tuple[LabeledDataset, int]:
    """A draw of the training set followed by the test set, and the size of the draw."""
    train = subsample(setup.train, labels, seed)
    texts = train.texts + setup.test.texts
    pairs = None if train.pairs is None else train.pairs + setup.test.pairs
    targets = np.concatenate((train.targets, setup.test.targets))
    return replace(train, texts=texts, pairs=pairs, targets=targets), len(train)


def choose(
    run: Run, examples: LabeledDataset, n_train: int, setup: Setup
) -> tuple[Any, float | None]:
    """The choice with the best mean accuracy, or smallest error, over the validation splits of the
    first `n_train` examples, and this mean; it is None if there is only one choice."""
    grid = GRIDS.get(run.method, GRIDS["frozen"])
    if run.method == "pretrained":
        if not model_folder.load_model(setup.models[run.model])[0].is_modern:
            grid = BERT_GRID
        if n_train > MAX_CHOOSING:  # fewer labels cannot show how much a network learns from all
            grid = [rate for rate in grid if rate]
    if len(grid) == 1:
        return grid[0], None

    rng = np.random.default_rng([run.seed, 6])
    scores = []  # of each split and choice
    for train_idx, eval_idx in validation_splits(examples[np.arange(n_train)]):
        if run.method in NETWORKS:
            train_idx = np.sort(rng.permutation(train_idx)[:MAX_CHOOSING])
        scores.append([])
        for choice in grid:
            predictions = fit_and_predict(run, choice, examples, train_idx, eval_idx, setup)
            metrics = measure(examples.targets[eval_idx], predictions)
            scores[-1].append(metrics["accuracy"] if setup.n_classes else -metrics["rmse"])
    means = np.mean(scores, axis=0)
    return grid[means.argmax()], float(means.max())


def fit_and_predict(
    run: Run,
    choice: Any,
    examples: LabeledDataset,
    train_idx: np.ndarray,
    eval_idx: np.ndarray,
    setup: Setup,
) -> np.ndarray:
    """Fit a method on some examples of its draw and predict others."""
    model = setup.models[run.model]
    targets = examples.targets[train_idx]

    if run.method in NETWORKS:
        out = setup.out / "work" / run.method / run.model
        flags = ["--model", str(model), "--methods", run.method, "--lr", str(choice)]
        flags += ["--seed", str(run.seed), "--device", str(setup.device), "--out", str(out)]
        flags += ["--dtype", str(setup.dtype).removeprefix("torch.")]
        finetune.main(flags, data=(examples[train_idx], examples[eval_idx]))
        with np.load(out / "predictions.npz") as arrays:
            return arrays[run.method]

    if run.method in ("ngrams", "bag_of_words"):
        texts = examples.joined_texts()
        train_texts = [texts[i] for i in train_idx]
        eval_texts = [texts[i] for i in eval_idx]
        inputs = (train_texts, targets, eval_texts, setup.n_classes)
        if run.method == "ngrams":
            return baselines.ngrams(*inputs, seed=run.seed)
        return baselines.bag_of_words(*inputs, [(choice,)])[choice,]

    if run.method == "lsa":
        vectors = lsa_vectors(run.model, run.labels, run.seed, setup)
        inputs = (vectors[train_idx], targets, vectors[eval_idx], setup.n_classes)
        return baselines.lsa(*inputs, [choice])[choice]

    features = network_features(run.model, run.labels, run.seed, setup)
    i = -1 if run.method == "frozen" else int(run.method.removeprefix("layer "))
    inputs = (features[train_idx, i], targets, features[eval_idx, i], setup.n_classes)
    return baselines.linear_scores(*inputs, choice)


@functools.lru_cache(1)
def lsa_vectors(model: str, labels: int, seed: int, setup: Setup) -> np.ndarray:
    """The vectors of `draw_examples` in the latent space of the pretraining text."""
    examples, n_train = draw_examples(labels, seed, setup)
    texts = examples.joined_texts()
    return baselines.document_vectors(texts, texts[:n_train], setup.models[model], seed)[0]


@functools.lru_cache(1)  # `frozen` and the layers share one forward pass
def network_features(model: str, labels: int, seed: int, setup: Setup) -> np.ndarray:
    """The mean states of `draw_examples` after the embedding and after each layer, and last the
    features that the classifier reads, (examples, 1 + layers + 1, d_model)."""
    network, tokenizer, max_len = load_classifier(model, setup)
    rows, _ = encode(draw_examples(labels, seed, setup)[0], tokenizer, max_len)
    states: list[Tensor] = []
    for module in (network.model.embeddings, *network.model.layers):
        module.register_forward_hook(lambda module, inputs, output: states.append(output))

    def function(ids: Tensor, cu_seqlens: Tensor, *rest) -> Tensor:
        states.clear()
        features = network.features(ids, cu_seqlens, *rest)
        return torch.stack([*(mean_pool(x, cu_seqlens) for x in states), features.float()], dim=1)

    return forward_all(network, rows, np.arange(len(rows)), setup.autocast, function)


def load_classifier(model: str, setup: Setup) -> tuple[Classifier, Tokenizer, int]:
    """The network of a model under a new linear layer, its tokenizer, and its maximum length."""
    folder = setup.models[model]
    config, weights, tokenizer, _ = model_folder.load_model(folder)
    config, max_len = model_folder.choose_max_len(config, None, finetune.MAX_LEN, folder)
    torch.manual_seed(0)  # some BERTs lack a pooler
    network = Classifier(config, setup.n_classes or 1).to(setup.device).eval()
    model_folder.load_weights(network, weights, folder, allow_missing=("classifier", "pooler"))
    return network, tokenizer, max_len
