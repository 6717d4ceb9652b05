"""Recommend the next item: python -m examples.recommend, measured beside tuned baselines.

A user's items in the order of time are a sequence, and the model fills a [MASK] after its end. The
loop is that of train.py, and only the batches differ: each window ends at a random item, and in
half of them only this item is masked, as it is when the model is asked for the next one.

The protocol: the last item of each user (--last 5: the last five) is the test target, the one
before the validation target, by which everything is chosen. All items of the training part are
ranked except those of the user's history; a target that is not among them counts as missed. Items
of equal times are ordered by a seeded draw, the same for all methods.

Axes: U questions, V tokens of the vocabulary (the items and five special tokens).
"""

import argparse
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import softmax
from scipy.stats import zscore
from tokenizers import Tokenizer

import train
from analysis.statistics import Estimate
from data import Batch, Corpus
from files import streams
from files.cli import Parser, choose_hardware, flags_to_argv, number, run_script
from files.disk import UserError, make_folder, to_json, write_file
from files.model_folder import open_model
from files.readers import Report, read_table, refuse
from files.reviews import fetch_wheel
from files.sequences import is_sequence, reads_items, split_items
from files.token_cache import prepare
from files.tokenizer import SPECIAL_TOKENS
from model import MaskedLM

RECBOLE = ("recbole==1.2.1", "recbole-1.2.1-py3-none-any.whl")
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
MOVIELENS = "recbole/dataset_example/ml-100k/ml-100k.inter"  # for research; not redistributable
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))  # the first tokens of the vocabulary
TOP = 10  # of HR@10 and NDCG@10
CHUNK = 256  # questions answered at once
N_BOOTSTRAP = 2000

# Flags of train.py, chosen on the validation targets of MovieLens-100K.
NETWORK = {"layers": 2, "d_model": 64, "max_len": 32, "micro_batch_tokens": 2048, "dropout": 0.1}
NETWORK |= {"keep_best": True, "log_every": 100}
LAST_ONLY = 0.5  # share of the windows in which only the last item is masked


class Question(NamedTuple):
    """The tokens that a user has, in the order of time, and the one that comes next."""

    user: int
    history: np.ndarray
    target: int
    is_later: bool  # whether the time of the target is later than that of the history


Scores = Callable[[list[np.ndarray]], np.ndarray]  # histories to the scores of all tokens (U, V)
Candidate = tuple[str, str, Scores]  # of a method: its name, what is to be chosen, the scores


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Recommend the next item, and compare with baselines.")
    add = parser.add_argument
    positive = number(int, 1)
    add("--data", type=Path, help="interactions or lists of items; by default MovieLens-100K")
    add("--text-column", help="of --data: USER,ITEM,TIME; guessed by default")
    add("--last", type=positive, default=1, help="items of each user to test on")
    add("--vocab-size", type=number(int, 100, 20_000), default=10_000, help="the frequent items")
    add("--steps", type=positive, default=1500, help="of training")
    add("--seeds", type=positive, default=3, help="networks to train")
    add("--out", type=Path, default=Path("runs/recommend"), help="folder of the run")
    add("--model", type=Path, help="recommend with this model of --out or train.py")
    add("--history", nargs="+", metavar="ITEM", help="what a user has, the oldest first")
    add("stdin", nargs="?", choices=["-"], help="read sequences from standard input")
    add("--top", type=positive, default=TOP, help="items to recommend")
    parser.add_device()
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.history or args.stdin):
        parser.error("--model needs --history ITEM ... or -, and these need --model")
    return args


# --------------------------------------------------------------------------- data and protocol


def read_sequences(path: Path, column: str | None, report: Report) -> Iterator[tuple]:
    """The place, the items and the other columns of each sequence of a file."""
    for line, row in read_table(path, report, column):
        text = str(row.get(column or "text"))
        if is_sequence(text):
            yield f"{path}:{line}", split_items(text), row
        else:
            report(UserError(f"{path}:{line}: neither interactions nor a list of items"))


def read_users(args: argparse.Namespace) -> list[tuple[list[str], list]]:
    """The items and times of each user; those of equal times in a random order."""
    path = args.data
    if path is None:
        wheel = zipfile.ZipFile(fetch_wheel(*RECBOLE, RECBOLE_SHA256))
        path = Path(wheel.extract(MOVIELENS, args.out))
    rng = np.random.default_rng(0)
    users = []
    for _, items, row in read_sequences(path, args.text_column, refuse):
        times = row.get("times", range(len(items)))
        order = sorted(zip(times, rng.random(len(items)), items, strict=True))
        users.append(([item for *_, item in order], [time for time, *_ in order]))
    return users


def encode(tokenizer: Tokenizer, items: list[str]) -> np.ndarray:
    """The token of each item; of an unknown one that of [UNK]."""
    return np.array([tokenizer.token_to_id(item) or UNK for item in items])


class Histories(Corpus):
    """The training part of the users' sequences, and the questions `validation` and `test`."""

    def __init__(self, users: list[tuple[list[str], list]], args: argparse.Namespace):
        n_held_out = args.last + 1
        rows = [items[:-n_held_out] if len(items) > n_held_out else items for items, _ in users]
        if rows == [items for items, _ in users]:
            raise UserError(f"no user has more than {n_held_out} items, as the test needs")
        train_file = args.out / "train.jsonl"
        lines = (json.dumps({"items": row}, ensure_ascii=False) + "\n" for row in rows)
        write_file(train_file, "".join(lines).encode())
        folder = prepare([str(train_file)], args.vocab_size)
        super().__init__(folder, NETWORK["max_len"], micro_batch_tokens=1, seed=0, mask="even")
        self.micro_batch_tokens = NETWORK["micro_batch_tokens"]  # windows are drawn: few suffice
        self.validation: list[Question] = []
        self.test: list[Question] = []
        for user, (items, times) in enumerate(users):
            tokens = encode(self.tokenizer, items)
            for i in range(len(rows[user]), len(items)):
                part = self.validation if i == len(rows[user]) else self.test
                part.append(Question(user, tokens[:i], tokens[i], times[i] > times[i - 1]))

    def batch(self, step: int, micro: int, n_micro: int, mask_rate: float) -> Batch:
        """Windows that end at a random item, in some of which only this item is masked: a pure
        function of the arguments, the seed and the sequences."""
        key = (self.seed, streams.TRAINING_MASKS, step, micro)
        rng = np.random.default_rng(key)
        last = rng.integers(len(self.tokens), size=self.micro_batch_tokens // 3)
        document = np.searchsorted(self.document_ends, last, side="right")
        first = np.maximum(np.append(0, self.document_ends)[document], last - (self.max_len - 3))
        n_fitting = np.searchsorted(np.cumsum(last - first + 3), self.micro_batch_tokens, "right")
        windows = []
        masked = []
        for start, end in zip(first[:n_fitting], last[:n_fitting] + 1, strict=True):
            window = self.tokens[start:end]
            positions = np.array([len(window) - 1])
            if rng.random() >= LAST_ONLY:
                positions = rng.permutation(len(window))[: max(1, int(mask_rate * len(window)))]
            windows.append(window)
            masked.append(positions[window[positions] > MASK])  # never [UNK]
        return make_batch(windows, masked, self.micro_batch_tokens, key)

    def validation_batches(self) -> list[Batch]:
        """The validation targets, each masked at the end of its history."""
        windows = [np.append(q.history, q.target)[2 - self.max_len :] for q in self.validation]
        starts = range(0, len(windows), CHUNK)
        return [make_batch(windows[i : i + CHUNK]) for i in starts]


def make_batch(
    windows: list[np.ndarray],
    masked: list[np.ndarray] | None = None,
    n_tokens: int = 0,
    key: tuple[int, ...] = (),
) -> Batch:
    """Lay windows end to end and mask positions in each of them, by default the last.

    Sequences of one token that nobody reads fill the row up to `n_tokens`.
    """
    starts = np.cumsum([0, *(len(window) + 2 for window in windows)])
    cu_seqlens = np.append(starts, np.arange(starts[-1], n_tokens) + 1)
    ids = np.full(cu_seqlens[-1], PAD)
    ids[: starts[-1]] = np.concatenate([[CLS, *window, SEP] for window in windows])
    masked = masked or [np.array([len(window) - 1]) for window in windows]
    positions = [start + 1 + of_window for start, of_window in zip(starts, masked, strict=False)]
    positions = np.concatenate(positions)
    targets = ids[positions]
    ids[positions] = MASK
    arrays = (ids, cu_seqlens.astype(np.int32), positions, targets)
    ids, cu_seqlens, positions, targets = map(torch.from_numpy, arrays)
    return Batch(ids, cu_seqlens, int(cu_seqlens.diff().max()), positions, targets, key)


def score_new(scores: Scores, histories: list[np.ndarray]) -> np.ndarray:
    """The scores (U, V), minus infinity of special tokens and of what a user has."""
    values = np.array(scores(histories), dtype=np.float64)
    values[:, : MASK + 1] = -np.inf
    for row, history in zip(values, histories, strict=True):
        row[history] = -np.inf
    return values


def ranks(scores: Scores, questions: list[Question]) -> np.ndarray:
    """The rank of each target among the items that the user does not have, (U,), from 1.

    Other items of the same score come first. A target that is not ranked has an infinite rank.
    """
    parts = []
    for start in range(0, len(questions), CHUNK):
        part = questions[start : start + CHUNK]
        values = score_new(scores, [q.history for q in part])
        target = values[np.arange(len(part)), [q.target for q in part]]
        rank = (~(values < target[:, None])).sum(1)
        parts.append(np.where(np.isfinite(target), rank, np.inf))
    return np.concatenate(parts)


def ndcg(rank: np.ndarray) -> np.ndarray:
    return (rank <= TOP) / np.log2(rank + 1)


METRICS = {"HR@10": lambda rank: rank <= TOP, "NDCG@10": ndcg, "MRR": lambda rank: 1 / rank}


def estimate(values: np.ndarray, questions: list[Question]) -> Estimate:
    """The mean of values (U,) with its 95% bootstrap interval over the users."""
    _, user = np.unique([q.user for q in questions], return_inverse=True)
    sums, counts = np.bincount(user, values), np.bincount(user)
    draws = np.random.default_rng(0).integers(len(sums), size=(N_BOOTSTRAP, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


# --------------------------------------------------------------------------------- baselines
# Each weights the items of a history by their age (0: the newest) and multiplies by a matrix (V, V)
# of how much an item in the history speaks for another.

RATES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.0)  # weight of an item over that of the next newer one


def sum_rows(matrix: np.ndarray, weights: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
    """The weighted sum of the rows of the items in each history, (U, V)."""
    recent = [history[-len(weights) :] for history in histories]
    values = np.concatenate([weights[: len(history)][::-1] for history in recent])
    ends = np.cumsum([0, *map(len, recent)])
    return csr_array((values, np.concatenate(recent), ends), (len(recent), len(matrix))) @ matrix


def with_decay(name: str, choice: str, matrix: np.ndarray) -> Iterator[Candidate]:
    for rate in RATES:
        method = name if rate == 1 else f"{name}, recency-weighted"
        yield method, f"{choice}, {rate}", partial(sum_rows, matrix, rate ** np.arange(1000))


def transitions(corpus: Corpus, weights: np.ndarray) -> np.ndarray:
    """How often an item follows another, (V, V), with a weight for each distance."""
    user = np.searchsorted(corpus.document_ends, np.arange(len(corpus.tokens)), "right")
    counts = csr_array((corpus.vocab_size, corpus.vocab_size), dtype=np.float32)
    for distance, weight in enumerate(weights, 1):
        same = user[:-distance] == user[distance:]
        pairs = (corpus.tokens[:-distance][same], corpus.tokens[distance:][same])
        counts += csr_array((np.full(same.sum(), weight, np.float32), pairs), counts.shape)
    return counts.toarray()


def baselines(corpus: Corpus) -> Iterator[Candidate]:
    shape = (len(corpus.document_ends), corpus.vocab_size)
    ones = np.ones(len(corpus.tokens), dtype=np.float32)
    has = csr_array((ones, corpus.tokens, [0, *corpus.document_ends]), shape).sign()
    together = (has.T @ has).toarray()  # how many users have both of two items, (V, V)
    n_users = np.maximum(np.diag(together), 1)
    popularity = np.tile(n_users, (len(together), 1))
    yield "most popular", "no choice", partial(sum_rows, popularity, np.ones(1))

    cosines = together / np.sqrt(np.outer(n_users, n_users))
    np.fill_diagonal(cosines, 0)
    for k in (20, 50, 100, 200):
        nearest = -min(k, len(cosines))
        least = np.partition(cosines, nearest, axis=0)[nearest]
        yield from with_decay("item-kNN", f"{k}", np.where(cosines >= least, cosines, 0))

    # ridge regression of each item on all others (Steck 2019, arXiv 1905.03375, equation 8)
    for l2 in (100, 300, 1000, 3000):
        precision = np.linalg.inv(together + l2 * np.eye(len(together), dtype=np.float32))
        matrix = -precision / np.diag(precision)
        np.fill_diagonal(matrix, 0)
        yield from with_decay("EASE", f"{l2}", matrix)

    for reach, power in itertools.product((1, 5, 10, 20), (0.5, 1.0)):
        weights = 1 / np.arange(1, reach + 1) ** power
        counts = transitions(corpus, weights)
        name = "Markov, order 1" if reach == 1 else "Markov, last items"
        for row, column in itertools.product((0.0, 0.5, 1.0), (0.0, 0.3)):
            rows = np.maximum(counts.sum(1, keepdims=True), 1e-9) ** row
            scores = partial(sum_rows, counts / rows / n_users**column, weights)
            yield name, f"{reach}, {power}, {row}, {column}", scores

    for width in (64, 128):
        vectors = corpus.spectral_embedding(width)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        yield from with_decay("spectral initialization", f"{width}", vectors @ vectors.T)


def sums(name: str, first: Scores, second: Scores) -> Iterator[Candidate]:
    """Sums of the scores of two methods, each standardized over the tokens."""

    def add(weight: float, histories: list[np.ndarray]) -> np.ndarray:
        parts = [np.nan_to_num(zscore(scores(histories), axis=1)) for scores in (first, second)]
        return parts[0] + weight * parts[1]

    for weight in (0.25, 0.5, 1, 2):
        yield name, f"the second weighted {weight}", partial(add, weight)


def choose(candidates: Iterable[Candidate], validation: list[Question]) -> dict[str, Scores]:
    """Of each method the scores with the best NDCG@10 on the validation targets."""
    best: dict[str, tuple[float, str, Scores]] = {}
    for name, choice, scores in candidates:
        value = ndcg(ranks(scores, validation)).mean()
        if name not in best or value > best[name][0]:
            best[name] = (value, choice, scores)
    for name, (value, choice, _) in best.items():
        print(f"{name}: {choice} with the best validation NDCG@10, {value:.3f}", flush=True)
    return {name: scores for name, (_, _, scores) in best.items()}


# ------------------------------------------------------------------------------- the network


def open_network(args: argparse.Namespace, folder: Path) -> tuple[Scores, Tokenizer]:
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, _ = open_model(folder, device)
    if not isinstance(model, MaskedLM) or not reads_items(tokenizer):
        raise UserError(f"{folder}: no model of sequences; examples.recommend makes one")

    @torch.no_grad()
    def scores(histories: list[np.ndarray]) -> np.ndarray:
        windows = [np.append(history, MASK)[2 - model.config.max_len :] for history in histories]
        batch = make_batch(windows).to(device)
        states = model.model(*batch[:3], rows=batch.masked)  # (U, d_model)
        return model.decoder(model.head(states)).cpu().numpy()

    return scores, tokenizer


def train_network(args: argparse.Namespace, corpus: Histories, seed: int, steps: int) -> Scores:
    """Train with train.py's loop in OUT/seed-N; 0 steps leave the initialization in OUT/start."""
    out = args.out / (f"seed-{seed}" if steps else "start")
    flags = {"steps": steps, "save_every": max(1, steps // 8), "seed": seed, "out": out}
    corpus.seed = seed
    train.main(flags_to_argv(flags | NETWORK | {"device": args.device}), data=corpus)
    return open_network(args, out)[0]


# ------------------------------------------------------------------------------ use and compare


def recommend(args: argparse.Namespace) -> dict[str, Any]:
    """Print what --model recommends after each sequence; returns how many were answered."""
    scores, tokenizer = open_network(args, args.model)
    counts = {"answered": 0, "broken": 0}

    def report(error: UserError) -> None:
        counts["broken"] += 1
        print(f"recommend.py: {error}", file=sys.stderr)

    sequences = [("--history", args.history, {})]
    if args.stdin:
        sequences = read_sequences(Path(args.stdin), args.text_column, report)
    for place, items, _ in sequences:
        history = encode(tokenizer, items)
        unknown = [item for item, i in zip(items, history, strict=True) if i <= MASK]
        if unknown:
            print(f"{place}: unknown items are skipped: {unknown}", file=sys.stderr)
        probabilities = softmax(score_new(scores, [history[history > MASK]])[0])
        best = np.argsort(-probabilities)[: args.top]
        best = best[probabilities[best] > 0]
        answers = [f"{tokenizer.id_to_token(i)} {probabilities[i]:.4f}" for i in best]
        print("\t".join(answers), flush=True)
        counts["answered"] += 1
    if not any(counts.values()):
        raise UserError("standard input: no sequences in it")
    return counts


def print_table(results: dict[str, list[np.ndarray]], corpus: Histories) -> dict[str, Any]:
    """Print a table of the ranks of all targets by each method and seed; returns the figures."""
    n = len(corpus.validation)
    is_later = np.array([q.is_later for q in corpus.test])
    figures: dict[str, dict[str, Any]] = {}
    print(f"{'':42}{'validation':>10}{'later':>8}{''.join(f'{name:>22}' for name in METRICS)}")
    for method, rank in results.items():
        means = {name: metric(np.stack(rank)).mean(0) for name, metric in METRICS.items()}
        row = {name: estimate(values[n:], corpus.test) for name, values in means.items()}
        columns = "".join(f"{value!s:>22}" for value in row.values())
        row["validation"] = float(means["NDCG@10"][:n].mean())
        row["later"] = float(means["NDCG@10"][n:] @ is_later / max(1, is_later.sum()))
        print(f"{method:42}{row['validation']:10.3f}{row['later']:8.3f}{columns}")
        figures[method] = row
    networks = [method for method in results if "network" in method]
    best = max(results.keys() - networks, key=lambda method: figures[method]["NDCG@10"])
    for method in networks:
        lead = ndcg(np.stack(results[method])).mean(0) - ndcg(results[best][0])
        lead = figures[method]["lead"] = estimate(lead[n:], corpus.test)
        verdict = "better" if lead.low > 0 else "worse" if lead.high < 0 else "level"
        interval = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*lead)
        print(f"NDCG@10 of {method} less that of {best}, the best baseline: {interval}: {verdict}")
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Recommend, or train, compare and return what OUT/metrics.json holds."""
    args = parse_args(argv)
    if args.model:
        return recommend(args)
    make_folder(args.out)
    users = read_users(args)
    corpus = Histories(users, args)
    questions = corpus.validation + corpus.test
    print(f"{len(users):,} users, of whom {len(corpus.validation):,} have items to test on")
    later = np.mean([q.is_later for q in corpus.test])
    print(f"{len(corpus.test):,} test targets, {later:.0%} strictly later than the history")
    n_missed = sum(q.target == UNK or q.target in q.history for q in corpus.test)
    print(f"{n_missed:,} of them missed: the user has the item, or the training part lacks it")

    scores = choose(baselines(corpus), corpus.validation)
    ease, markov = scores["EASE, recency-weighted"], scores["Markov, last items"]
    scores |= choose(sums("EASE + Markov", ease, markov), corpus.validation)
    scores["untrained network"] = train_network(args, corpus, seed=0, steps=0)
    results = {method: [ranks(scores[method], questions)] for method in scores}
    for seed in range(args.seeds):
        scores = {"network": train_network(args, corpus, seed, args.steps)}
        both = sums("network + Markov", scores["network"], markov)
        scores |= choose(both, corpus.validation)
        for method in scores:
            results.setdefault(method, []).append(ranks(scores[method], questions))
    metrics = print_table(results, corpus)
    write_file(args.out / "metrics.json", to_json(metrics))
    return metrics


if __name__ == "__main__":
    sys.exit(2 if run_script(main).get("broken") else 0)
