"""Recommend the next item: python -m examples.recommend, measured beside tuned baselines.

A user's items in the order of time are a sequence, and the model fills a [MASK] after its end. The
loop is that of train.py, and only the batches differ: each window ends at a random item, and in
half of them only this item is masked, as it is when the model is asked for the next one.

The protocol: the last item of each user (--last 5: the last five) is the test target, the one
before the validation target, by which everything is chosen. All items of the training part are
ranked except those of the user's history; a target that is not among them counts as missed. Items
of equal times are ordered by a seeded draw, the same for all methods.

Axes: U questions, V tokens of the vocabulary (the items and five special tokens), T of a batch.
"""

import argparse
import functools
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from tokenizers import Tokenizer

import train
from data import Batch, Corpus
from files import streams
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import CACHE, UserError, make_folder, to_json, write_file
from files.model_folder import open_model
from files.readers import read_table
from files.reviews import fetch_wheel
from files.sequences import is_sequence, reads_items, split_items
from files.token_cache import prepare
from files.tokenizer import SPECIAL_TOKENS, special_ids
from model import MaskedLM

RECBOLE = "recbole==1.2.1"
RECBOLE_WHEEL = "recbole-1.2.1-py3-none-any.whl"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
MOVIELENS = "recbole/dataset_example/ml-100k/ml-100k.inter"  # for research; not redistributable
N_SPECIAL = len(SPECIAL_TOKENS)  # the first tokens of the vocabulary
TOP = 10  # of HR@10 and NDCG@10
CHUNK = 256  # questions answered at once
N_BOOTSTRAP = 2000

# The network, chosen on the validation targets of MovieLens-100K.
NETWORK = "--layers 2 --d-model 64 --max-len 32 --micro-batch-tokens 2048 --dropout 0.1"
NETWORK += " --keep-best --log-every 100"
LAST_ONLY = 0.5  # share of the windows in which only the last item is masked
STEPS = 1500


class Question(NamedTuple):
    """The tokens that a user has, in the order of time, and the one that comes next."""

    user: int
    history: np.ndarray
    target: int
    is_later: bool  # whether the time of the target is later than that of the history


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Recommend the next item, and compare with baselines.")
    add = parser.add_argument
    positive = number(int, 1)
    add("--data", type=Path, help="interactions or lists of items; by default MovieLens-100K")
    add("--text-column", help="of --data: USER,ITEM,TIME; guessed by default")
    add("--last", type=positive, default=1, help="items of each user to test on")
    add("--vocab-size", type=number(int, 100, 20_000), default=10_000, help="the frequent items")
    add("--steps", type=positive, default=STEPS, help="of training")
    add("--seeds", type=number(int, 0), default=3, help="networks to train; 0: only baselines")
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


def read_users(args: argparse.Namespace) -> list[tuple[list[str], list]]:
    """The items and times of each user; those of equal times in a random order."""
    path = args.data
    if path is None:
        path = CACHE / "ml-100k.inter"
        wheel = zipfile.ZipFile(fetch_wheel(RECBOLE, RECBOLE_WHEEL, RECBOLE_SHA256))
        write_file(path, wheel.read(MOVIELENS))
    rng = np.random.default_rng(0)
    users = []
    for line, row in read_table(path, column=args.text_column):
        text = row.get(args.text_column or "text")
        if not isinstance(text, str) or not is_sequence(text):
            raise UserError(f"{path}:{line}: neither interactions nor a list of items")
        items = split_items(text)
        times = row.get("times") or range(len(items))
        order = sorted(zip(times, rng.random(len(items)), items, strict=True))
        users.append(([item for *_, item in order], [time for time, *_ in order]))
    return users


def split(
    users: list[tuple[list[str], list]], args: argparse.Namespace
) -> tuple[Path, list[Question], list[Question]]:
    """The token cache of the training part; the questions of the validation and the test."""
    n_held_out = args.last + 1
    rows = [items[:-n_held_out] if len(items) > n_held_out else items for items, _ in users]
    train_file = args.out / "train.jsonl"
    lines = (json.dumps({"items": row}, ensure_ascii=False) + "\n" for row in rows)
    write_file(train_file, "".join(lines).encode())
    folder = prepare([str(train_file)], args.vocab_size)
    vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    questions = []
    n_repeated = 0
    for user, (items, times) in enumerate(users):
        if len(items) <= n_held_out:
            continue
        tokens = np.array([vocab.get(item, vocab[SPECIAL_TOKENS["unk"]]) for item in items])
        for i in range(len(items) - n_held_out, len(items)):
            if items[i] in items[:i]:
                n_repeated += 1
                continue
            questions.append((i, Question(user, tokens[:i], tokens[i], times[i] > times[i - 1])))
    validation = [q for i, q in questions if i == len(users[q.user][0]) - n_held_out]
    test = [q for i, q in questions if i > len(users[q.user][0]) - n_held_out]
    if not validation or not test:
        raise UserError(f"no user has more than {n_held_out} different items, as the test needs")
    n_short = sum(len(items) <= n_held_out for items, _ in users)
    n_unknown = sum(q.target < N_SPECIAL for q in test)
    print(
        f"{len(users):,} users, {n_short:,} of them too short to test; {len(test):,} test targets, "
        f"{n_unknown:,} not among the {len(vocab) - N_SPECIAL:,} items of the training part; "
        f"{np.mean([q.is_later for q in test]):.0%} strictly later than the history; "
        f"{n_repeated:,} repeated targets are left out"
    )
    return folder, validation, test


Scores = Callable[[list[np.ndarray]], np.ndarray]  # histories to the scores of all tokens (U, V)


def ranks(scores: Scores, questions: list[Question]) -> np.ndarray:
    """The rank of each target among the items that the user does not have, (U,), from 1.

    Other items of the same score come first; so they do where a score is NaN.
    """
    parts = []
    for start in range(0, len(questions), CHUNK):
        part = questions[start : start + CHUNK]
        values = np.array(scores([q.history for q in part]), dtype=np.float64)
        target = np.array([q.target for q in part])
        target_score = values[np.arange(len(part)), target]
        is_better = ~(values < target_score[:, None])
        is_better[:, :N_SPECIAL] = False
        for i, question in enumerate(part):
            is_better[i, question.history] = False
        if_missing = (target < N_SPECIAL) * values.shape[1]  # a rank behind all items
        parts.append(is_better.sum(1) + if_missing)
    return np.concatenate(parts)


def hit_rate(rank: np.ndarray) -> np.ndarray:
    return (rank <= TOP).astype(float)


def ndcg(rank: np.ndarray) -> np.ndarray:
    return hit_rate(rank) / np.log2(rank + 1)


def reciprocal_rank(rank: np.ndarray) -> np.ndarray:
    return 1 / rank


METRICS = {"HR@10": hit_rate, "NDCG@10": ndcg, "MRR": reciprocal_rank}


def interval(values: np.ndarray, questions: list[Question]) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean over users; `values` (U,) of their questions."""
    _, user = np.unique([q.user for q in questions], return_inverse=True)
    sums, counts = np.bincount(user, values), np.bincount(user)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(sums), size=(N_BOOTSTRAP, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# --------------------------------------------------------------------------------- baselines
# Each weights the items of a history by their age (0: the newest) and multiplies by a matrix (V, V)
# of how much an item in the history speaks for another; `together` (V, V) says how many users have
# both of two items.


def linear(matrix: np.ndarray, weights: np.ndarray) -> Scores:
    def scores(histories: list[np.ndarray]) -> np.ndarray:
        recent = [h[-len(weights) :] for h in histories]
        values = [weights[: len(h)][::-1] for h in recent]
        ends = np.cumsum([0, *map(len, recent)])
        shape = (len(recent), len(matrix))
        return csr_array((np.concatenate(values), np.concatenate(recent), ends), shape) @ matrix

    return scores


def decay(rate: float) -> np.ndarray:
    return rate ** np.arange(1000)


def popularity(sequences: list[np.ndarray], together: np.ndarray, _: Any) -> np.ndarray:
    return np.tile(np.diag(together), (len(together), 1))


def item_knn(sequences: list[np.ndarray], together: np.ndarray, k: int) -> np.ndarray:
    """Cosines of the users of two items, of the k nearest items of each."""
    norms = np.sqrt(np.maximum(np.diag(together), 1))
    cosines = together / norms / norms[:, None]
    np.fill_diagonal(cosines, 0)
    kth = np.partition(cosines, -min(k, len(cosines)), axis=0)[-min(k, len(cosines))]
    return np.where(cosines >= kth, cosines, 0)


def ease(sequences: list[np.ndarray], together: np.ndarray, l2: float) -> np.ndarray:
    """Ridge regression of each item on all others (Steck 2019, arXiv 1905.03375, equation 8)."""
    precision = np.linalg.inv(together + l2 * np.eye(len(together), dtype=np.float32))
    weights = -precision / np.diag(precision)
    np.fill_diagonal(weights, 0)
    return weights


def transitions(sequences: list[np.ndarray], together: np.ndarray, choice: tuple) -> np.ndarray:
    """How often an item follows another, by 1 / distance^p, over powers of both frequencies."""
    reach, p, row_power, column_power = choice
    n = len(together)
    counts = np.zeros(n * n, dtype=np.float32)
    for d in range(1, reach + 1):
        pairs = np.concatenate([s[:-d].astype(np.int64) * n + s[d:] for s in sequences])
        pairs, n_pairs = np.unique(pairs, return_counts=True)
        counts[pairs] += n_pairs / d**p
    counts = counts.reshape(n, n)
    rows = np.maximum(counts.sum(1, keepdims=True), 1e-9) ** row_power
    return counts / rows / np.maximum(np.diag(together), 1) ** column_power


def linear_methods(
    build: Callable[[Any], np.ndarray], choices: list[tuple[Any, np.ndarray]]
) -> Iterator[tuple[str, Scores]]:
    """What is chosen, and the scores; the choices with equal matrices stand together."""
    for argument, group in itertools.groupby(choices, lambda choice: choice[0]):
        matrix = build(argument)
        for _, weights in group:
            about = f"{argument}; the newest items weighted {np.round(weights[:4], 2).tolist()}"
            yield about, linear(matrix, weights)


MARKOV = [(p, row, column) for p in (0.5, 1.0) for row in (0.0, 0.5, 1.0) for column in (0.0, 0.3)]
RATES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.0)


def baselines(corpus: Corpus) -> dict[str, tuple[Callable, list[tuple[Any, np.ndarray]]]]:
    """Of each name the function of its matrix, and the choices: (argument, weights by age)."""

    def spectral(sequences: list[np.ndarray], together: np.ndarray, width: int) -> np.ndarray:
        vectors = corpus.spectral_embedding(width)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return vectors @ vectors.T

    orders = [((n, *c), 1 / np.arange(1, n + 1) ** c[0]) for n in (1, 5, 10, 20) for c in MARKOV]
    return {
        "most popular": (popularity, [(None, decay(0.0))]),
        "item-kNN": (item_knn, [(k, decay(1.0)) for k in (20, 50, 100, 200)]),
        "item-kNN, recency-weighted": (item_knn, [(k, decay(r)) for k in (50, 200) for r in RATES]),
        "EASE": (ease, [(l2, decay(1.0)) for l2 in (100, 300, 1000)]),
        "EASE, recency-weighted": (ease, [(k, decay(r)) for k in (300, 1000, 3000) for r in RATES]),
        "Markov, order 1": (transitions, [order for order in orders if order[0][0] == 1]),
        "Markov, last items": (transitions, [order for order in orders if order[0][0] > 1]),
        "spectral initialization": (spectral, [(w, decay(r)) for w in (64, 128) for r in RATES]),
    }


def tune(name: str, methods: Iterable[tuple[str, Scores]], validation: list[Question]) -> Scores:
    """The scores with the best NDCG@10 on the validation targets, of (what is chosen, scores)."""
    best = -1.0
    for about, scores in methods:
        value = ndcg(ranks(scores, validation)).mean()
        if value > best:
            best, choice, best_scores = value, about, scores
    print(f"{name}: {choice}", flush=True)
    return best_scores


def add_scores(first: Scores, second: Scores, weight: float) -> Scores:
    """The sum of the scores of two methods, each standardized over the tokens."""

    def scores(histories: list[np.ndarray]) -> np.ndarray:
        parts = []
        for method in (first, second):
            values = method(histories)
            deviations = values - values.mean(1, keepdims=True)
            parts.append(deviations / np.maximum(values.std(1, keepdims=True), 1e-9))
        return parts[0] + weight * parts[1]

    return scores


# ------------------------------------------------------------------------------- the network


class Histories(Corpus):
    """Windows that end at a random item, in some of which only this item is masked."""

    def __init__(self, folder: Path, validation: list[Question], seed: int, flags: Any):
        super().__init__(folder, flags.max_len, micro_batch_tokens=1, seed=seed, mask="even")
        self.micro_batch_tokens = flags.micro_batch_tokens  # windows are drawn, so few suffice
        self.validation = validation
        self.document_starts = np.concatenate(([0], self.document_ends[:-1]))

    def batch(self, step: int, micro: int, n_micro: int, mask_rate: float) -> Batch:
        """A training batch: a pure function of its arguments, the seed and the sequences."""
        key = (self.seed, streams.TRAINING_MASKS, step, micro)
        rng = np.random.default_rng(key)
        last = rng.integers(len(self.tokens), size=self.micro_batch_tokens // 3)
        document = np.searchsorted(self.document_ends, last, side="right")
        first = np.maximum(self.document_starts[document], last - (self.max_len - 3))
        n_fitting = np.searchsorted(np.cumsum(last - first + 3), self.micro_batch_tokens, "right")
        windows = []
        masked = []
        for start, end in zip(first[:n_fitting], last[:n_fitting] + 1, strict=True):
            window = np.array(self.tokens[start:end])
            if rng.random() < LAST_ONLY:
                positions = np.array([len(window) - 1])
            else:
                positions = rng.permutation(len(window))[: max(1, int(mask_rate * len(window)))]
            windows.append(window)
            masked.append(positions[window[positions] >= N_SPECIAL])  # never [UNK]
        return make_batch(windows, masked, self.special, self.micro_batch_tokens, key)

    def validation_batches(self) -> list[Batch]:
        """The validation targets, each masked at the end of its history."""
        parts = [self.validation[i : i + CHUNK] for i in range(0, len(self.validation), CHUNK)]
        return [
            ask([q.history for q in part], [q.target for q in part], self.special, self.max_len)
            for part in parts
        ]


def make_batch(
    windows: list[np.ndarray],
    masked: list[np.ndarray],
    special: dict[str, int],
    n_tokens: int,
    key: tuple[int, ...] = (),
) -> Batch:
    """Lay windows end to end and mask some of their positions.

    Sequences of one token that nobody reads fill the row up to `n_tokens`.
    """
    cls, sep = [special["cls"]], [special["sep"]]
    starts = np.cumsum([0, *(len(window) + 2 for window in windows)])
    padding = np.full(n_tokens - starts[-1], special["pad"])
    ids = np.concatenate([*(part for w in windows for part in (cls, w, sep)), padding])
    ids = ids.astype(np.int64)
    positions = [start + 1 + where for start, where in zip(starts, masked, strict=False)]
    positions = np.concatenate(positions).astype(np.int64)
    targets = ids[positions]
    ids[positions] = special["mask"]
    cu_seqlens = np.append(starts, np.arange(starts[-1], n_tokens) + 1)
    return Batch(
        ids=torch.from_numpy(ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        masked=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        key=key,
    )


def ask(
    histories: list[np.ndarray], targets: list[int], special: dict[str, int], max_len: int
) -> Batch:
    """The ends of histories, each with a [MASK] for the target after it."""
    windows = [
        np.append(history[-(max_len - 3) :], target)
        for history, target in zip(histories, targets, strict=True)
    ]
    n_tokens = sum(len(window) + 2 for window in windows)
    masked = [np.array([len(window) - 1]) for window in windows]
    return make_batch(windows, masked, special, -(-n_tokens // 128) * 128)


def network(model: MaskedLM, special: dict[str, int]) -> Scores:
    device = next(model.parameters()).device

    @torch.no_grad()
    def scores(histories: list[np.ndarray]) -> np.ndarray:
        batch = ask(histories, [special["pad"]] * len(histories), special, model.config.max_len)
        inputs = batch.to(device)[:3]
        states = model.model(*inputs, rows=batch.masked.to(device))  # (U, d_model)
        return model.decoder(model.head(states)).cpu().numpy()

    return scores


def train_network(
    args: argparse.Namespace, folder: Path, validation: list[Question], seed: int, steps: int
) -> Scores:
    """Train with train.py's loop in OUT/seed-N; 0 steps leave the initialization in OUT/start."""
    out = args.out / (f"seed-{seed}" if steps else "start")
    flags = [*NETWORK.split(), "--steps", str(steps), "--seed", str(seed), "--out", str(out)]
    flags += ["--save-every", str(max(1, steps // 8))]
    flags += ["--device", args.device] if args.device else []
    corpus = Histories(folder, validation, seed, train.parse_args(flags))
    train.main(flags, data=corpus)
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, _ = open_model(out, device)
    return network(model, special_ids(tokenizer))


# ------------------------------------------------------------------------------ use and compare


def recommend(args: argparse.Namespace) -> dict[str, Any]:
    """Print what --model recommends after each sequence; returns how many were answered."""
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, _ = open_model(args.model, device)
    if not isinstance(model, MaskedLM) or not reads_items(tokenizer):
        raise UserError(f"{args.model}: no model of sequences; examples.recommend makes one")
    scores = network(model, special_ids(tokenizer))
    counts = {"answered": 0, "broken": 0}

    def report_broken(error: UserError) -> None:
        counts["broken"] += 1
        print(f"recommend.py: {error}", file=sys.stderr)

    for place, items in read_histories(args, report_broken):
        tokens = {item: tokenizer.token_to_id(item) for item in items}
        special = SPECIAL_TOKENS.values()
        unknown = [i for i, token in tokens.items() if token is None or i in special]
        if unknown:
            names = ", ".join(map(repr, unknown[:10]))
            print(f"{place}: {len(unknown)} unknown items are skipped: {names}", file=sys.stderr)
        history = np.array([tokens[i] for i in items if i not in unknown], dtype=np.int64)
        values = torch.from_numpy(scores([history])[0]).double()
        values[:N_SPECIAL] = -torch.inf
        values[history] = -torch.inf
        n_left = int(values.isfinite().sum())
        best = values.softmax(0).topk(min(args.top, n_left))
        names = map(tokenizer.id_to_token, best.indices.tolist())
        answers = [f"{name} {p:.4f}" for name, p in zip(names, best.values.tolist(), strict=True)]
        print("\t".join(answers), flush=True)
        counts["answered"] += 1
    if not any(counts.values()):
        raise UserError("standard input: no sequences in it")
    return counts


def read_histories(
    args: argparse.Namespace, report_broken: Callable[[UserError], None]
) -> Iterator[tuple[str, list[str]]]:
    """The place and the items of each sequence of the command line or of standard input."""
    if args.history:
        yield "--history", args.history
        return
    path = Path("-")
    for line, row in read_table(path, report_broken, args.text_column):
        text = row.get(args.text_column or "text")
        if isinstance(text, str) and is_sequence(text):
            yield f"{path}:{line}", split_items(text)
        else:
            example = "for example {'items': ['a', 'b']}"
            report_broken(UserError(f"{path}:{line}: no sequence; {example}"))


Measured = tuple[np.ndarray, np.ndarray]  # the ranks of the validation and of the test targets


def print_table(
    results: dict[str, list[Measured]], validation: list[Question], test: list[Question]
) -> dict[str, Any]:
    """Print a table, and the lead of the network over the best baseline; returns the figures."""
    is_later = np.array([q.is_later for q in test])
    figures: dict[str, Any] = {}
    means = {}  # NDCG@10 of each test target, the mean of the seeds
    print(f"{'':28}{'validation':>11}{'test, mean with 95% interval over users':>44}{'later':>14}")
    print(f"{'':28}{'NDCG@10':>11}{''.join(f'{name:>21}' for name in METRICS)}{'NDCG@10':>9}")
    for method, seeds in results.items():
        row = {"validation": float(np.mean([ndcg(rank).mean() for rank, _ in seeds]))}
        line = f"{method:28}{row['validation']:11.3f}"
        for name, metric in METRICS.items():
            values = np.mean([metric(rank) for _, rank in seeds], axis=0)
            row[name] = float(values.mean())
            row[f"{name} interval"] = low, high = interval(values, test)
            line += f"{row[name]:9.3f} ({low:.3f}-{high:.3f})".replace("0.", ".")
            if name == "NDCG@10":
                means[method] = values
        row["later"] = float(means[method][is_later].mean()) if is_later.any() else None
        row["seeds"] = [float(ndcg(rank).mean()) for _, rank in seeds]
        figures[method] = row
        print(f"{line}{row['later'] or 0:9.3f}")
    best = max((m for m in results if "network" not in m), key=lambda m: figures[m]["NDCG@10"])
    for method in ("network", "network + Markov"):
        if method not in results:
            continue
        lead = means[method] - means[best]
        low, high = interval(lead, test)
        verdict = "level" if low <= 0 <= high else "better" if low > 0 else "worse"
        print(
            f"NDCG@10 of {method} ({len(results[method])} seeds) less that of {best}, the best "
            f"baseline on the test: {lead.mean():+.4f} ({low:+.4f} to {high:+.4f}): {verdict}"
        )
        about = {"over": best, "mean": float(lead.mean()), "interval": (low, high)}
        figures[method]["lead"] = about
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Recommend, or train, compare and return what OUT/metrics.json holds."""
    args = parse_args(argv)
    if args.model:
        return recommend(args)
    make_folder(args.out)
    folder, validation, test = split(read_users(args), args)
    corpus = Histories(folder, validation, 0, train.parse_args(NETWORK.split()))
    sequences = np.split(np.asarray(corpus.tokens), corpus.document_ends[:-1])
    has = csr_array(
        (np.ones(len(corpus.tokens), np.float32), corpus.tokens, [0, *corpus.document_ends])
    )
    has.sum_duplicates()
    has.data[:] = 1
    together = (has.T @ has).toarray()
    together[:N_SPECIAL] = together[:, :N_SPECIAL] = 0

    results = {}
    tuned = {}

    def evaluate(name: str, scores: Scores) -> None:
        results.setdefault(name, []).append((ranks(scores, validation), ranks(scores, test)))

    def sums(first: Scores, second: Scores) -> Iterator[tuple[str, Scores]]:
        for weight in (0.25, 0.5, 1, 2):
            yield f"the second weighted {weight}", add_scores(first, second, weight)

    print("chosen by NDCG@10 on the validation targets:", flush=True)
    for name, (build, choices) in baselines(corpus).items():
        methods = linear_methods(functools.partial(build, sequences, together), choices)
        tuned[name] = tune(name, methods, validation)
        evaluate(name, tuned[name])
    markov = tuned["Markov, last items"]
    name = "EASE + Markov"
    evaluate(name, tune(name, sums(tuned["EASE, recency-weighted"], markov), validation))
    if args.seeds:
        evaluate("untrained network", train_network(args, folder, validation, seed=0, steps=0))
    for seed in range(args.seeds):
        scores = train_network(args, folder, validation, seed, args.steps)
        evaluate("network", scores)
        evaluate(
            "network + Markov", tune(f"seed {seed} + Markov", sums(scores, markov), validation)
        )
    metrics = print_table(results, validation, test)
    write_file(args.out / "metrics.json", to_json(metrics))
    return metrics


if __name__ == "__main__":
    sys.exit(2 if run_script(main).get("broken") else 0)
