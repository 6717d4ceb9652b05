"""Run one method on one draw of the labels: choose its hyperparameters inside these labels, fit it
on all of them, and evaluate it once on the test set."""

import contextlib
import functools
import hashlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import finetune
import train
from analysis import baselines
from analysis.baselines import WITH_NGRAMS, Fit
from analysis.evaluation import forward_all, measure
from analysis.results import USE_PRETRAINING, Plan, Run
from files import model_folder, streams
from files.cli import flags_to_argv
from files.disk import UserError, file_name, read_json, reading
from labels import LabeledDataset, encode, subsample
from model import Classifier

# Peak learning rates; 0 trains nothing but a linear head. Networks with post-norm do worse at
# higher rates. No baseline searches less than `pretrained`, whose search thus is no advantage.
PRETRAINED_RATES = (0.0, 1e-4, 3e-4)
BERT_RATES = (0.0, 5e-5, 1e-4)
RANDOM_WEIGHTS_RATES = (5e-4, 1e-3, 2e-3)
MAX_CHOOSING = 2000  # examples on which networks are trained while the learning rate is chosen
FROZEN_GRID = tuple(("mean", c) for c in (1e-3, 1e-2, 0.1, 1.0))  # C
START_WITH_NGRAMS = WITH_NGRAMS.replace("pretrained", "start")
STARTS = ("start", START_WITH_NGRAMS)
NETWORKS = ("pretrained", WITH_NGRAMS, *STARTS, "random_weights")
# Flags of train.py that its step 0 does not share with the run.
NOT_OF_THE_START = {"out", "steps", "dtype", "device", "resume", "compile", "keep_best"}
NOT_OF_THE_START |= {"tensorboard"}
NOT_THE_RECIPE = {"seed", "out", "device", "resume", "compile", "log_every", "save_every", "keep"}
NOT_THE_RECIPE |= {"tensorboard"}


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a key of a cache
class Setup:
    """What all runs of an experiment share."""

    data: str  # its name in the results
    models: dict[str, Path]
    starts: dict[str, Path]  # of these models, those at step 0 of their pretraining
    train: LabeledDataset
    test: LabeledDataset
    probes: LabeledDataset  # predicted too: the sentences of analysis/behaviour.py, or none
    device: torch.device
    dtype: torch.dtype
    fixed_rates: bool  # networks take the learning rates of finetune.py, and choose none
    out: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the first model, whose words all baselines count."""
        return model_folder.load_model(next(iter(self.models.values()))).tokenizer

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def name_models(folders: list[Path]) -> dict[str, Path]:
    """Names of the models: the last part of their paths, or all of it where two would be equal."""
    names = [folder.resolve().name if folder.exists() else str(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("--model: the same folder twice")
    return {file_name(name): folder for name, folder in zip(names, folders, strict=True)}


def make_starts(models: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The models at step 0 of the pretraining of these models, where they can be made again."""
    starts = {}
    for name, model in models.items():
        try:
            flags = read_flags(model)
            if not flags or "-" in flags.get("corpus", []):
                raise UserError(f"{model} is not a run of train.py on files")
            with contextlib.redirect_stdout(sys.stderr):
                train.main(flags_of_step_0(flags, folder / f"start-{name}"))
            starts[name] = folder / f"start-{name}"
        except UserError as error:
            print(f"{name}: start is left out: {error}", file=sys.stderr)
        except SystemExit as stop:
            if stop.code != 2:  # Ctrl-C
                raise
            print(f"{name}: start is left out: train.py refuses its flags", file=sys.stderr)
    return starts


def flags_of_step_0(flags: dict[str, Any], out: Path) -> list[str]:
    """The command line that ends a run of train.py with these flags before its first step."""
    argv = ["--steps", "0", "--dtype", "float32", "--out", str(out)]
    return argv + flags_to_argv({n: flags[n] for n in flags.keys() - NOT_OF_THE_START})


def make_plan(
    setup: Setup, methods: list[str], budgets: list[int], n_draws: int, pool: bool
) -> Plan:
    """The runs of an experiment; what cannot run is left out, with a line on stderr."""
    plan: Plan = {}
    for i, model in enumerate(setup.models):
        for method in methods:
            depends_on_model = method in (*USE_PRETRAINING, *STARTS)
            if i and not depends_on_model:
                continue
            if method in STARTS and model not in setup.starts:
                continue  # for the reason that was printed when it could not be made
            if problem := problem_of(method, model, setup):
                print(f"{model}: {method} is left out: {problem}", file=sys.stderr)
                continue
            one_of_several = depends_on_model and len(setup.models) > 1 and not pool
            name = f"{model}, {method}" if one_of_several else method
            for n in budgets:
                # with all labels, draws differ only in what is random about a network, and so do
                # pretraining seeds
                varies = n < len(setup.train) or (method in NETWORKS and not pool)
                key = (setup.data, model, method, n)
                draws = range(n_draws if varies else 1)
                runs = [Run(*key, draw, fingerprint(model, setup)) for draw in draws]
                plan[name, n] = plan.get((name, n), []) + runs
    return plan


def problem_of(method: str, model: str, setup: Setup) -> str:
    """Why a method cannot run, empty if it can."""
    if method in (WITH_NGRAMS, START_WITH_NGRAMS) and not setup.train.names:
        return "it needs classes"
    if method in ("lsa", "spectral") and not baselines.pretraining_corpus(setup.models[model]):
        return "the tokens of its pretraining are not in the cache"
    return ""


@functools.cache
def fingerprint(model: str, setup: Setup) -> str:
    """A hash of what a result depends on: dtype, labelled examples and weights."""
    digest = hashlib.sha256(f"{setup.dtype} {setup.fixed_rates}".encode())
    for dataset in (setup.train, setup.test, setup.probes):
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
    with reading(path):
        return dict(read_json(path))


def run_method(run: Run, setup: Setup) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of a run for results.csv, and its predictions for the test set and the probes:
    probabilities (examples, classes) or numbers (examples,)."""
    start_time = time.time()
    train = subsample(setup.train, run.labels, run.seed)
    examples = baselines.concatenate(baselines.concatenate(train, setup.test), setup.probes)
    fit, grid = METHODS[run.method](examples, run, setup)
    choice, validation = baselines.choose(fit, grid, train)
    train_idx, eval_idx = np.split(np.arange(len(examples)), [len(train)])
    predictions = fit(choice, train_idx, eval_idx)
    metrics = measure(setup.test.targets, predictions[: len(setup.test)])
    metrics |= {"seconds": time.time() - start_time, "choice": choice, "validation": validation}
    metrics["on_edge"] = baselines.is_on_edge(choice, grid)
    return metrics, predictions


# ---------------------------------------------------------------------------------- the methods
# Each takes the examples of a run, the training examples first, and returns its `fit` and its grid
# (see analysis/baselines.py).


def fine_tuning(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """finetune.py with pretrained or random weights, or those of step 0; with n-grams or without.

    A network is fine-tuned once for both, and not again after an interruption: what it predicts is
    saved in OUT/work."""
    model = (setup.starts if run.method in STARTS else setup.models)[run.model]
    method = run.method.replace("start", "pretrained")
    both = f"pretrained,{WITH_NGRAMS}" if setup.train.names else "pretrained"
    methods = method if method == "random_weights" else both
    work = setup.out / "work"

    def fit(rate: float, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        if len(train_idx) < run.labels:  # while the rate is chosen
            rng = np.random.default_rng([run.seed, streams.RATE_CHOICE])
            train_idx = np.sort(rng.permutation(train_idx)[:MAX_CHOOSING])
        flags = ["--model", str(model), "--methods", methods, "--lr", str(rate)]
        flags += ["--seed", str(run.seed), "--device", str(setup.device)]
        flags += ["--dtype", str(setup.dtype).removeprefix("torch.")]
        what = (flags, run.fingerprint, run.labels, train_idx.tolist(), eval_idx.tolist())
        saved = work / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.npz"
        if not saved.exists():
            data = (examples[train_idx], examples[eval_idx])
            finetune.main([*flags, "--out", str(work / "finetune")], data)
            (work / "finetune" / "predictions.npz").replace(saved)
        with np.load(saved) as arrays:
            return arrays[method]

    is_modern = model_folder.load_model(model).config.is_modern
    if run.method == "random_weights":
        return fit, [finetune.LR_RANDOM_WEIGHTS] if setup.fixed_rates else RANDOM_WEIGHTS_RATES
    if setup.fixed_rates:
        return fit, [finetune.LR_PRETRAINED if is_modern else finetune.LR_PRETRAINED_BERT]
    rates = PRETRAINED_RATES if is_modern else BERT_RATES
    if run.labels > MAX_CHOOSING:  # fewer cannot show how much a network learns from all
        rates = [rate for rate in rates if rate]
    return fit, rates


def frozen(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """A linear model of the features that the classifier of the pretrained network reads."""
    network, tokenizer, max_len = load_classifier(run.model, setup)
    rows, _ = encode(examples, tokenizer, max_len)
    features = forward_all(network, rows, np.arange(len(rows)), setup.autocast, network.features)
    return baselines.fit_linear(lambda _: features, examples), FROZEN_GRID


def lsa(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """A linear model of the latent semantics of the text of the pretraining."""
    return baselines.lsa(examples, baselines.pretraining_corpus(setup.models[run.model]))


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


def majority(examples: LabeledDataset, run: Run, setup: Setup) -> tuple[Fit, Sequence]:
    """The most frequent class, or the mean number."""

    def fit(_: None, train_idx: np.ndarray, eval_idx: np.ndarray) -> np.ndarray:
        return baselines.constant_scores(examples[train_idx], len(eval_idx))

    return fit, [None]


METHODS = {
    **dict.fromkeys(("pretrained", WITH_NGRAMS), fine_tuning),
    "frozen": frozen,
    **dict.fromkeys((*STARTS, "random_weights"), fine_tuning),
    "majority": majority,
    "ngrams": lambda examples, run, setup: baselines.ngrams(examples, setup.tokenizer, run.seed),
    "lsa": lsa,
    "spectral": spectral,
}
