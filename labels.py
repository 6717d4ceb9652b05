"""LabeledDataset examples to batches: files, splits, label budgets.

Axes: S sequences (examples), T tokens of a batch.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from files.tokenizer import special_ids
from files.disk import UserError
from files.readers import TABLE_SUFFIXES, read_table, text_suffix
from files.reviews import load_reviews

# Names that columns usually have, best first; where none is there, the shape of the values decides.
TEXT_NAMES = (
    "text",
    "sentence",
    "review",
    "content",
    "document",
    "body",
    "message",
    "title",
    "question",
    "premise",
)
PAIR_NAMES = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "answer"),
)
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score", "y")
# Integers with no more distinct values than this are names of classes, like stars; more are numbers to
# predict.
MOST_INTEGER_CLASSES = 20
TEST_SHARE = 0.2
T_MULTIPLE = 128  # at most, see `batches`


@dataclass(frozen=True)
class LabeledDataset:
    """Examples with their targets: class numbers (S,) int64 that index `names`, or numbers (S,) float32 where
    `names` is None (regression). `pairs` holds the second texts, or is None."""

    texts: list[str]
    pairs: list[str] | None
    targets: np.ndarray
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, which: np.ndarray) -> "LabeledDataset":
        pairs = None if self.pairs is None else [self.pairs[i] for i in which]
        return replace(self, texts=[self.texts[i] for i in which], pairs=pairs, targets=self.targets[which])


# --------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Columns:
    """The columns of a file that hold an example."""

    text: str
    pair: str | None
    label: str


def load(
    data: str | None,
    train: Path | None = None,
    test: Path | None = None,
    columns: tuple[str | None, str | None, str | None] = (None, None, None),
    task: str | None = None,
) -> tuple[LabeledDataset, LabeledDataset]:
    """(train, test) of a built-in set, or of the user's own files; without a test file, the last fifth of
    each class.

    `columns` names those of text, second text and label, None where they shall be guessed; `task` is
    "classify", "regress" or None. Guesses are printed. Raises UserError for what cannot be used.
    """
    if train is None:
        split = load_reviews()[data]
        names = sorted({label for _, label in split["train"]})
        parts = ([*zip(*split[part], strict=True)] for part in ("train", "test"))
        return tuple(LabeledDataset(list(t), None, np.array([names.index(x) for x in y]), names) for t, y in parts)
    rows = _read_rows(train)
    chosen = _choose_columns(train, rows, *columns)
    texts, pairs, raw, lines = _pick(train, rows, chosen)
    task = task or _guess_task(raw)
    names = None
    if task == "regress":
        targets = _to_numbers(train, raw, lines)
    else:
        counts = Counter(raw)
        names = sorted(counts, key=_natural)
        if len(names) < 2:
            raise UserError(
                f"{train}: column {chosen.label!r} has one class only, {names[0]!r}; two are needed"
            )
        for name in names:
            if counts[name] < (least := 2 if test else 3):
                wrong = f"class {name!r} has too few examples, {counts[name]}; each needs at least {least}"
                raise UserError(f"{train}:{lines[raw.index(name)]}: {wrong}")
        targets = np.array([names.index(label) for label in raw])
    examples = LabeledDataset(texts, pairs, targets, names)
    shown = (
        names if names and len(names) <= 10 else f"{len(names)} classes" if names else "numbers (regression)"
    )
    second = f" with {chosen.pair!r}" if chosen.pair else ""
    print(f"{train}: {len(texts):,} examples; text {chosen.text!r}{second}, label {chosen.label!r}: {shown}")
    if test is None:
        return _split(examples)
    texts, pairs, raw, lines = _pick(test, _read_rows(test), chosen)
    if names is None:
        return examples, LabeledDataset(texts, pairs, _to_numbers(test, raw, lines), None)
    for label, line in zip(raw, lines, strict=True):
        if label not in names:
            known = ", ".join(map(repr, names[:20]))
            raise UserError(f"{test}:{line}: label {label!r} is none of those in {train}: {known}")
    return examples, LabeledDataset(texts, pairs, np.array([names.index(label) for label in raw]), names)


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if text_suffix(path) not in TABLE_SUFFIXES:
        raise UserError(f"{path}: labelled examples come as {', '.join(TABLE_SUFFIXES)} (or .gz of one)")
    rows = list(read_table(path))
    if not rows:
        raise UserError(f"{path}: no examples in it")
    return rows


def _choose_columns(path: Path, rows: list, text: str | None, pair: str | None, label: str | None) -> Columns:
    """The named columns, or a guess by name and then by shape."""
    first = rows[0][1]
    there = ", ".join(map(repr, first))
    if label is None:
        lower = {name.lower(): name for name in reversed(first)}
        known = [lower[name] for name in LABEL_NAMES if name in lower and lower[name] not in (text, pair)]
        if not known:
            raise UserError(f"{path}: no label column found among {there}; name it with --label-column")
        label = known[0]
    elif label not in first:
        raise UserError(f"{path}: --label-column {label}: no such column; there are {there}")
    return Columns(*choose_texts(path, rows, text, pair, label), label)


def choose_texts(
    path: Path, rows: list, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None]:
    """The columns of text and second text: the named ones, or a guess among those that are not the label."""
    first = rows[0][1]
    there = ", ".join(map(repr, first))
    for flag, name in (("--text-column", text), ("--pair-column", pair)):
        if name is not None and name not in first:
            raise UserError(f"{path}: {flag} {name}: no such column; there are {there}")
    if text is None:
        lower = {name.lower(): name for name in reversed(first)}
        both = [
            (lower[a], lower[b]) for a, b in PAIR_NAMES if a in lower and b in lower and label not in (a, b)
        ]
        known = [lower[name] for name in TEXT_NAMES if name in lower and lower[name] not in (label, pair)]
        if both and pair is None:
            text, pair = both[0]
        elif known:
            text = known[0]
        else:
            others = [name for name in first if name not in (label, pair)]
            if not others:
                raise UserError(f"{path}: no text column beside {label!r}; name it with --text-column")
            text = max(others, key=lambda name: sum(len(str(row.get(name, ""))) for _, row in rows[:200]))
    return text, pair


def _pick(
    path: Path, rows: list, columns: Columns
) -> tuple[list[str], list[str] | None, list[str], list[int]]:
    """(texts, pairs, labels as text, lines) of the rows. Raises UserError where a field is missing or
    empty."""
    texts, pairs, labels, lines = [], [], [], []
    for line, row in rows:
        for name in (columns.text, columns.pair):
            if name is not None and not (isinstance(row.get(name), str) and row[name].strip()):
                raise UserError(f"{path}:{line}: no text in field {name!r}")
        label = row.get(columns.label)
        if label is None or isinstance(label, (dict, list)) or not str(label).strip():
            raise UserError(f"{path}:{line}: no label in field {columns.label!r}")
        texts.append(row[columns.text])
        pairs.append(row.get(columns.pair))
        labels.append(str(label).strip())
        lines.append(line)
    return texts, pairs if columns.pair else None, labels, lines


def _number(text: str) -> float:
    """The finite number that a text is, or NaN."""
    try:
        with np.errstate(over="ignore"):
            value = float(np.float32(text))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _natural(name: str) -> tuple[bool, float, str]:
    """Sort key of class names: numbers by value, then the rest by name."""
    value = _number(name)
    return math.isnan(value), 0.0 if math.isnan(value) else value, name


def _guess_task(labels: list[str]) -> str:
    distinct = set(labels)
    values = [_number(label) for label in distinct]
    if any(map(math.isnan, values)):
        return "classify"
    return (
        "classify"
        if all(v == int(v) for v in values) and len(distinct) <= MOST_INTEGER_CLASSES
        else "regress"
    )


def _to_numbers(path: Path, labels: list[str], lines: list[int]) -> np.ndarray:
    values = np.array([_number(label) for label in labels], dtype=np.float32)
    if np.isnan(values).any():
        bad = int(np.isnan(values).argmax())
        raise UserError(
            f"{path}:{lines[bad]}: label {labels[bad]!r} is no number, which --task regress needs"
        )
    return values


# -------------------------------------------------------------------------------------- splits and budgets


def _split(examples: LabeledDataset) -> tuple[LabeledDataset, LabeledDataset]:
    """Hold out the last fifth of each class: neighbours in a file often belong together, so that a random
    split would leak. Texts that also stand in the training part are dropped from the other."""
    groups = examples.targets if examples.names else np.zeros(len(examples), dtype=int)
    is_test = np.zeros(len(examples), dtype=bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        is_test[members[len(members) - max(1, int(TEST_SHARE * len(members))) :]] = True
    train, test = examples[np.flatnonzero(~is_test)], examples[np.flatnonzero(is_test)]
    seen = set(zip(train.texts, train.pairs or train.texts, strict=True))
    fresh = [
        i for i, key in enumerate(zip(test.texts, test.pairs or test.texts, strict=True)) if key not in seen
    ]
    if not fresh:
        raise UserError("every example of the held-out fifth also stands in the rest; give a --test file")
    print(f"no test file: the last fifth of each class is held out, {len(fresh):,} examples")
    return train, test[np.array(fresh)]


def draw(examples: LabeledDataset, n_labels: int | None, seed: int) -> LabeledDataset:
    """A label budget: `n_labels` examples drawn with the seed, in shares of the classes, in the order of the
    file.

    Every class gets at least one. Raises UserError where there are too few examples, or fewer labels than
    classes.
    """
    if examples.names is None and (n := n_labels or len(examples)) < 3:
        raise UserError(f"--labels {n}: at least 3 numbers are needed to learn from")
    if n_labels is None or n_labels == len(examples):
        return examples
    if n_labels > len(examples):
        raise UserError(f"--labels {n_labels}: there are only {len(examples)} to train on")
    rng = np.random.default_rng([seed, 3])
    if examples.names is None:
        return examples[np.sort(rng.permutation(len(examples))[:n_labels])]
    n_classes = len(examples.names)
    if n_labels < 2 * n_classes:
        raise UserError(
            f"--labels {n_labels}: {n_classes} classes need at least {2 * n_classes}, two of each"
        )
    counts = np.bincount(examples.targets, minlength=n_classes)
    quota = np.minimum(counts, np.maximum(2, n_labels * counts / len(examples)))
    sizes = np.floor(quota).astype(int)
    while sizes.sum() != n_labels:  # the largest remainder gets one more, or the largest class one less
        short = sizes.sum() < n_labels
        remainder = np.where(sizes < counts, quota - sizes, -np.inf)
        sizes[remainder.argmax() if short else sizes.argmax()] += 1 if short else -1
    members = [rng.permutation(np.flatnonzero(examples.targets == i))[:size] for i, size in enumerate(sizes)]
    return examples[np.sort(np.concatenate(members))]


def folds(examples: LabeledDataset, n_folds: int, hold_out: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, validation) indices, each class cut into contiguous blocks in the order of the file.

    `n_folds` > 1: cross-validation; 1: only the last `hold_out` of each class validates.
    """
    groups = examples.targets if examples.names else np.zeros(len(examples), dtype=int)
    place = np.empty(len(examples))  # of an example within its class, from 0 to 1
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    if n_folds == 1:
        is_last = [place >= 1 - hold_out]
    else:  # classes take turns in which block comes first, so that few examples leave no fold empty
        is_last = [((place * n_folds).astype(int) + groups) % n_folds == k for k in range(n_folds)]
    return [(np.flatnonzero(~held), np.flatnonzero(held)) for held in is_last]


# -------------------------------------------------------------------------------------- tokens and batches


def encode(examples: LabeledDataset, tokenizer: Tokenizer, max_len: int) -> tuple[list[np.ndarray], int]:
    """([CLS] text [SEP], or [CLS] text [SEP] second [SEP], of each example; how many were cut to `max_len`).
    A row is (tokens, 2): the id of each token, and its type, which is 1 in a second text and its [SEP].
    RoBERTa's template has two [SEP] between the texts, and no types.

    A long text keeps its head and its tail, where reviews and news put what they mean to say (Sun et al.
    2019, arXiv 1905.05583, section 5.3.1); of a pair, the longer text is cut first.
    """
    special = special_ids(tokenizer)
    between = [special["sep"]] * max(1, tokenizer.num_special_tokens_to_add(is_pair=True) - 2)
    sides = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
    tokens = [[e.ids for e in tokenizer.encode_batch_fast(side, add_special_tokens=False)] for side in sides]
    room, rows, n_cut = max_len - 2 - len(between) * (len(sides) - 1), [], 0
    for parts in zip(*tokens, strict=True):
        n_cut += sum(map(len, parts)) > room
        if len(parts) == 2:
            first = min(len(parts[0]), max(room - len(parts[1]), room - room // 2))
            limits = [first, room - first]
        else:
            limits = [room]
        first, *second = (
            part if len(part) <= limit else part[: limit - limit // 2] + part[len(part) - limit // 2 :]
            for part, limit in zip(parts, limits, strict=True)
        )
        row = [special["cls"], *first]
        for part in second:
            row += between + part
        types = (np.arange(len(row) + 1) > len(first) + 1) * (len(between) == 1)
        rows.append(np.stack((np.array([*row, special["sep"]]), types), axis=1))
    return rows, n_cut


def batches(
    rows: list[np.ndarray], order: np.ndarray, size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor, int, Tensor]]]:
    """(which examples, (ids (T,), cu_seqlens, longest, token_types (T,))) of `size` examples at a time, in
    the given order.

    T is rounded up by sequences of zeros, that no one reads: the CPU's products are compiled anew for each T.
    """
    for first in range(0, len(order), size):
        which = order[first : first + size]
        sequences = [rows[i] for i in which]
        n_tokens = sum(map(len, sequences))
        multiple = min(T_MULTIPLE, 2 ** max(0, n_tokens.bit_length() - 6))  # a filler of 3% at most
        longest, filler = max(map(len, sequences)), -n_tokens % multiple
        while filler:  # none longer than the others, which is as far as learned positions may reach
            sequences.append(np.zeros((min(filler, longest), 2), dtype=np.int64))
            filler -= len(sequences[-1])
        lengths = [len(sequence) for sequence in sequences]
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        ids, types = torch.from_numpy(np.concatenate(sequences).T.copy()).to(device)  # (2, T)
        yield which, (ids, cu_seqlens.to(device), longest, types)
