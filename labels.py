"""Labelled examples to batches: files, splits, label budgets, tokens.

Axes: S sequences (examples), T tokens of a batch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from files.columns import choose_columns, guess_task, read_columns, read_rows, to_number
from files.disk import UserError
from files.reviews import load_reviews
from files.tokenizer import special_ids

TEST_SHARE = 0.2
# Hyperparameters are chosen by cross-validation for few labels, by one hold-out for many.
MOST_CROSS_VALIDATED = 1000
N_FOLDS = 3
HOLD_OUT = 0.1
MOST_PADDING = 128  # tokens of a batch, see `batches`

Split = tuple[np.ndarray, np.ndarray]  # indices to train on, indices to evaluate on


@dataclass(frozen=True)
class LabeledDataset:
    """Examples with their targets.

    Args:
        texts: The texts, or the first texts of pairs.
        pairs: The second texts, or None.
        targets: (S,) int64 class numbers that index `names`, or (S,) float32 numbers to predict.
        names: The class names, or None for regression.
    """

    texts: list[str]
    pairs: list[str] | None
    targets: np.ndarray
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, indices: np.ndarray) -> "LabeledDataset":
        texts = [self.texts[i] for i in indices]
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return replace(self, texts=texts, pairs=pairs, targets=self.targets[indices])

    def joined_texts(self) -> list[str]:
        """Each pair as one text, for methods that count words."""
        if self.pairs is None:
            return self.texts
        return [f"{text} {pair}" for text, pair in zip(self.texts, self.pairs, strict=True)]


def from_lists(
    texts: list[str], labels: list[str], names: list[str] | None = None
) -> LabeledDataset:
    """Examples from Python lists; `names` are the classes, by default those that occur."""
    names = names or sorted(set(labels))
    targets = np.array([names.index(label) for label in labels])
    return LabeledDataset(texts, None, targets, names)


# -------------------------------------------------------------------------------------- files


def load(
    data: str | None,
    train: Path | None = None,
    test: Path | None = None,
    columns: tuple[str | None, str | None, str | None] = (None, None, None),
    task: str | None = None,
) -> tuple[LabeledDataset, LabeledDataset]:
    """Read the training and test examples of a built-in dataset or of the user's own files.

    Args:
        data: "mr" or "imdb"; not used if there is a `train` file.
        train: A .csv, .tsv or .jsonl file, or .gz of one.
        test: Another; without it, the last fifth of each class of `train` is held out.
        columns: Those of the text, second text and label. None is guessed and printed.
        task: "classify", "regress", or None to guess it.

    Raises:
        UserError: A file cannot be used; the message names it and the line.
    """
    if train is None:
        return _load_built_in(data)
    rows = read_rows(train)
    columns = choose_columns(train, rows, *columns)
    texts, pairs, labels = read_columns(train, rows, *columns)
    names = None
    if (task or guess_task(labels)) == "classify":
        names = _class_names(train, rows, labels, minimum=2 if test else 3)
    examples = LabeledDataset(texts, pairs, _to_targets(train, rows, labels, names), names)
    _print_guesses(train, examples, *columns)
    if test is None:
        return _hold_out_last_fifth(examples)
    rows = read_rows(test)
    texts, pairs, labels = read_columns(test, rows, *columns)
    return examples, LabeledDataset(texts, pairs, _to_targets(test, rows, labels, names), names)


def _load_built_in(data: str) -> tuple[LabeledDataset, LabeledDataset]:
    parts = load_reviews()[data]
    names = sorted({label for _, label in parts["train"]})
    datasets = []
    for part in (parts["train"], parts["test"]):
        targets = np.array([names.index(label) for _, label in part])
        datasets.append(LabeledDataset([text for text, _ in part], None, targets, names))
    return tuple(datasets)


def _class_names(path: Path, rows: list, labels: list[str], minimum: int) -> list[str]:
    """The distinct labels: numbers by value, then names. Raises UserError if one is too rare."""
    counts = Counter(labels)
    names = sorted(sorted(counts), key=lambda name: np.nan_to_num(to_number(name), nan=np.inf))
    if len(names) < 2:
        raise UserError(f"{path}: the label column has one class only, {names[0]!r}")
    for name in names:
        if counts[name] < minimum:
            line, _ = rows[labels.index(name)]
            problem = f"class {name!r} has too few examples, {counts[name]}"
            raise UserError(f"{path}:{line}: {problem}; each class needs at least {minimum}")
    return names


def _to_targets(path: Path, rows: list, labels: list[str], names: list[str] | None) -> np.ndarray:
    """Class numbers, or numbers to predict if `names` is None. Raises UserError."""
    if names is None:
        targets = np.array([to_number(label) for label in labels], dtype=np.float32)
        unusable = np.isnan(targets)
        problem = "is no number, which --task regress needs"
    else:
        class_numbers = {name: i for i, name in enumerate(names)}
        targets = np.array([class_numbers.get(label, -1) for label in labels])
        unusable = targets < 0
        problem = f"is none of the training labels {', '.join(map(repr, names[:20]))}"
    if unusable.any():
        first = int(unusable.argmax())
        raise UserError(f"{path}:{rows[first][0]}: label {labels[first]!r} {problem}")
    return targets


def _print_guesses(
    path: Path, examples: LabeledDataset, text: str, pair: str | None, label: str
) -> None:
    classes = "numbers (regression)"
    if examples.names:
        classes = examples.names if len(examples.names) <= 10 else f"{len(examples.names)} classes"
    columns = f"text {text!r}{f' with {pair!r}' if pair else ''}, label {label!r}"
    print(f"{path}: {len(examples):,} examples; {columns}: {classes}")


# ------------------------------------------------------------------------- splits and budgets


def _strata(examples: LabeledDataset) -> np.ndarray:
    """The group of each example that a split must represent: its class, or one for numbers."""
    return examples.targets if examples.names else np.zeros(len(examples), dtype=int)


def _hold_out_last_fifth(examples: LabeledDataset) -> tuple[LabeledDataset, LabeledDataset]:
    """Hold out the last fifth of each class, without texts that also occur in the rest.

    Neighbours in a file often belong together, so that a random split would leak.
    """
    strata = _strata(examples)
    is_test = np.zeros(len(examples), dtype=bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n_test = max(1, int(TEST_SHARE * len(members)))
        is_test[members[-n_test:]] = True
    keys = list(zip(examples.texts, examples.pairs or examples.texts, strict=True))
    training_keys = {keys[i] for i in np.flatnonzero(~is_test)}
    test = [i for i in np.flatnonzero(is_test) if keys[i] not in training_keys]
    if not test:
        problem = "every example of the held-out fifth also stands in the rest"
        raise UserError(f"{problem}; give a --test file")
    print(f"no test file: the last fifth of each class is held out, {len(test):,} examples")
    return examples[np.flatnonzero(~is_test)], examples[np.array(test)]


def subsample(dataset: LabeledDataset, n_labels: int | None, seed: int) -> LabeledDataset:
    """Sample a label budget in proportion to the classes, at least two of each.

    Returns:
        `n_labels` examples (None: all of them) in the order of the file.

    Raises:
        UserError: There are fewer examples, or fewer labels than two of each class.
    """
    n_all = len(dataset)
    n_labels = n_labels or n_all
    n_classes = len(dataset.names or [""])
    if dataset.names is None and n_labels < 3:
        raise UserError(f"--labels {n_labels}: at least 3 numbers are needed to learn from")
    if n_labels == n_all:
        return dataset
    if n_labels > n_all:
        raise UserError(f"--labels {n_labels}: there are only {n_all} to train on")
    if n_labels < 2 * n_classes:
        minimum = f"{n_classes} classes need at least {2 * n_classes}"
        raise UserError(f"--labels {n_labels}: {minimum}, two of each")
    rng = np.random.default_rng([seed, 3])
    strata = _strata(dataset)
    sample = []
    for stratum, size in enumerate(_allocate(np.bincount(strata, minlength=n_classes), n_labels)):
        sample.append(rng.permutation(np.flatnonzero(strata == stratum))[:size])
    return dataset[np.sort(np.concatenate(sample))]


def _allocate(counts: np.ndarray, n_labels: int) -> np.ndarray:
    """How many labels each class gets: its share, rounded by largest remainders."""
    quota = np.minimum(counts, np.maximum(2, n_labels * counts / counts.sum()))
    sizes = np.floor(quota).astype(int)
    while sizes.sum() < n_labels:
        sizes[np.where(sizes < counts, quota - sizes, -np.inf).argmax()] += 1
    while sizes.sum() > n_labels:
        sizes[sizes.argmax()] -= 1
    return sizes


def cross_validation_splits(dataset: LabeledDataset, n_folds: int, hold_out: float) -> list[Split]:
    """Cut each class into contiguous blocks, in the order of the file.

    Args:
        dataset: S examples.
        n_folds: One split per fold; 1 means one split.
        hold_out: The share of each class, its last examples, that this one split evaluates on.
    """
    strata = _strata(dataset)
    position = np.empty(len(dataset))  # of an example within its class, from 0 to 1
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    held_out = [position >= 1 - hold_out]
    if n_folds > 1:
        # the classes take turns in which block comes first: no fold of few examples is empty
        fold = ((position * n_folds).astype(int) + strata) % n_folds
        held_out = [fold == i for i in range(n_folds)]
    return [(np.flatnonzero(~is_held), np.flatnonzero(is_held)) for is_held in held_out]


def validation_splits(dataset: LabeledDataset) -> list[Split]:
    """The splits of the training examples by which a method chooses its hyperparameters."""
    n_folds = N_FOLDS if len(dataset) <= MOST_CROSS_VALIDATED else 1
    return cross_validation_splits(dataset, n_folds, HOLD_OUT)


# ------------------------------------------------------------------------- tokens and batches


def encode(
    dataset: LabeledDataset, tokenizer: Tokenizer, max_len: int
) -> tuple[list[np.ndarray], int]:
    """Tokenize: [CLS] text [SEP], or [CLS] text [SEP] second text [SEP].

    A long text keeps its head and its tail, where reviews and news say what they mean (Sun et al.
    2019, arXiv 1905.05583, section 5.3.1). Of a pair, the longer text is cut first. RoBERTa has two
    [SEP] between the texts, and no token types.

    Returns:
        rows: (tokens, 2) int64 of each example: token ids, and token types, which are 1 in a second
            text and its [SEP].
        n_cut: The number of examples that were longer than `max_len` tokens.
    """
    special = special_ids(tokenizer)
    n_separators = max(1, tokenizer.num_special_tokens_to_add(is_pair=True) - 2)
    separators = [special["sep"]] * n_separators
    sides = [dataset.texts] if dataset.pairs is None else [dataset.texts, dataset.pairs]
    encoded = [tokenizer.encode_batch_fast(side, add_special_tokens=False) for side in sides]
    budget = max_len - 2 - n_separators * (len(sides) - 1)
    rows = []
    n_cut = 0
    for encodings in zip(*encoded, strict=True):
        parts = [encoding.ids for encoding in encodings]
        n_cut += sum(map(len, parts)) > budget
        first, *rest = _cut(parts, budget)
        ids = [special["cls"], *first]
        for second in rest:
            ids += separators + second
        ids.append(special["sep"])
        is_second = np.arange(len(ids)) > len(first) + 1
        rows.append(np.stack((np.array(ids), is_second * (n_separators == 1)), axis=1))
    return rows, n_cut


def _cut(parts: list[list[int]], budget: int) -> list[list[int]]:
    """Cut one text, or two, to `budget` tokens in all, each in its middle."""
    limits = [budget]
    if len(parts) == 2:
        first_limit = min(len(parts[0]), max(budget - len(parts[1]), budget - budget // 2))
        limits = [first_limit, budget - first_limit]
    return [
        part if len(part) <= limit else part[: limit - limit // 2] + part[len(part) - limit // 2 :]
        for part, limit in zip(parts, limits, strict=True)
    ]


def batches(
    rows: list[np.ndarray], order: np.ndarray, size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor, int, Tensor]]]:
    """Unpadded batches of `size` examples; `order` holds indices into `rows`.

    Sequences of zeros, whose outputs nobody reads, round T up to a multiple of a power of two: the
    CPU's matrix multiplications are compiled anew for each T.

    Yields:
        indices: The examples that the batch begins with.
        inputs: (ids (T,), cu_seqlens (S + 1,), length of the longest sequence, token types (T,)).
    """
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        sequences = [rows[i] for i in indices]
        n_tokens = sum(map(len, sequences))
        longest = max(map(len, sequences))
        multiple = min(MOST_PADDING, 2 ** max(0, n_tokens.bit_length() - 6))  # adds 3% at most
        n_padding = -n_tokens % multiple
        while n_padding:  # learned positions reach only as far as the longest sequence
            length = min(n_padding, longest)
            sequences.append(np.zeros((length, 2), dtype=np.int64))
            n_padding -= length
        lengths = [len(sequence) for sequence in sequences]
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device)
        ids, types = torch.from_numpy(np.concatenate(sequences).T.copy()).to(device)  # (2, T)
        yield indices, (ids, cu_seqlens, longest, types)
