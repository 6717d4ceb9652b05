"""Labelled examples to batches: files, splits, label budgets, tokens.

Axes: S sequences (examples), T tokens of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from files import streams
from files.columns import Columns, Item, choose_names, find_targets, read_examples, read_tests
from files.disk import UserError
from files.multilabel import to_targets
from files.reviews import load_reviews
from files.sequences import reads_items
from files.tokenizer import special_ids
from kernels.graphs import pad_sequences

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
        targets: (S,) int64 class numbers that index `names`, or (S,) float32 numbers to predict,
            or (S, names) float32, 1 where an example has a label and 0 elsewhere.
        names: The class names, or None for regression.
        parts: (S,) The part of each example in a test set of several, which are measured apart too.
    """

    texts: list[str]
    pairs: list[str] | None
    targets: np.ndarray
    names: list[str] | None
    parts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, indices: np.ndarray) -> "LabeledDataset":
        texts = [self.texts[i] for i in indices]
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        parts = None if self.parts is None else self.parts[indices]
        return replace(self, texts=texts, pairs=pairs, targets=self.targets[indices], parts=parts)

    @property
    def is_multilabel(self) -> bool:
        return self.targets.ndim == 2

    @property
    def has_one_class(self) -> bool:
        """Whether each example has one class, and not a number or several labels."""
        return self.names is not None and not self.is_multilabel

    @property
    def strata(self) -> np.ndarray:
        """(S,) The group of each example that a sample must represent: its class, or 0."""
        return self.targets if self.has_one_class else np.zeros(len(self), dtype=int)

    def joined_texts(self) -> list[str]:
        """Each pair as one text, for methods that count words."""
        if self.pairs is None:
            return self.texts
        return [f"{text} {pair}" for text, pair in zip(self.texts, self.pairs, strict=True)]


def from_lists(texts: list[str], labels: list, names: list[str] | None = None) -> LabeledDataset:
    """Examples from Python lists.

    Args:
        labels: Of each text a class (a string or a whole number, whose name is its digits), a list
            of any number of classes, or a float to predict.
        names: The classes; by default those that occur.

    Raises:
        ValueError: The lists differ in length, have fewer than two classes, or one not in `names`.
    """
    texts, labels = list(texts), list(labels)
    if len(texts) != len(labels) or not texts:
        raise ValueError(f"{len(texts)} texts and {len(labels)} labels")
    if names is None and isinstance(labels[0], (float, np.floating)):
        return LabeledDataset(texts, None, np.array(labels, np.float32), None)
    is_multilabel = isinstance(labels[0], (list, tuple, set))
    label_sets = [set(map(str, label if is_multilabel else [label])) for label in labels]
    names = names or sorted(set().union(*label_sets))
    if len(names) < 2:
        raise ValueError(f"fewer than two classes: {names}")
    if unknown := set().union(*label_sets) - set(names):
        raise ValueError(f"label {unknown.pop()!r} is none of {names}")
    if is_multilabel:
        return LabeledDataset(texts, None, to_targets(label_sets, names), names)
    targets = np.array([names.index(label) for [label] in label_sets])
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
        train: A table, or a dataset of the hub (files/hub_datasets.py).
        test: Another; without it, splits of the hub's dataset, or the last fifth of each class.
        columns: Those of the text, second text and label. None is guessed and printed.
        task: "classify", "multilabel", "regress", or None to guess it.

    Raises:
        UserError: A file cannot be used; the message names it and the line.
    """
    if train is None:
        parts = load_reviews()[data]
        train_part, test_part = (zip(*parts[name], strict=True) for name in ("train", "test"))
        return from_lists(*map(list, train_part)), from_lists(*map(list, test_part))

    items, chosen = read_examples(train, Columns(*columns), task)
    names = choose_names(train, items, chosen.label, task)
    examples = _to_dataset(items, names)
    task = "multilabel" if examples.is_multilabel else task
    test_items, parts = read_tests(train, test, chosen, task)
    if not test_items:
        return hold_out_last_fifth(examples)
    return examples, replace(_to_dataset(test_items, names), parts=parts)


def _to_dataset(items: list[Item], names: list[str] | None) -> LabeledDataset:
    texts = [item.text for item in items]
    pairs = None if items[0].pair is None else [item.pair for item in items]
    return LabeledDataset(texts, pairs, find_targets(items, names), names)


# ------------------------------------------------------------------------- splits and budgets
# These functions also take and return the TaggedDataset of files/entities.py.


def hold_out_last_fifth(dataset: LabeledDataset) -> tuple[LabeledDataset, LabeledDataset]:
    """Hold out the last fifth of each class, without texts that also occur in the rest.

    Neighbours in a file often belong together, so that a random split would leak. A class that
    then lacks test examples is named.
    """
    [(train_idx, test_idx)] = cross_validation_splits(dataset, 1, TEST_SHARE)
    texts = dataset.joined_texts()
    training_texts = {texts[i] for i in train_idx}
    new_idx = [i for i in test_idx if texts[i] not in training_texts]
    if not len(test_idx):
        raise UserError("there is no example to hold out for testing; add a --test file")
    if not new_idx:
        print("every held-out text is in the rest too; the scores are too high: add a --test file")
    test_idx = np.array(new_idx or test_idx)
    print(f"no test file: the last fifth of each class is held out, {len(test_idx):,} examples")
    train, test = dataset[train_idx], dataset[test_idx]
    if n_missing := len(set(train.strata.tolist()) - set(test.strata.tolist())):
        print(f"{n_missing} of the classes have no test example that differs from the rest")
    return train, test


def subsample(dataset: LabeledDataset, n_labels: int | None, seed: int) -> LabeledDataset:
    """Sample a label budget in proportion to the classes, at least two of each, if it has two.

    A budget that is too small for this takes fewer of the rarest classes, and says so.

    Returns:
        `n_labels` examples (None: all of them) in the order of the file.

    Raises:
        UserError: There are fewer examples.
    """
    n_labels = n_labels or len(dataset)
    counts = np.bincount(dataset.strata)
    at_least = np.minimum(2, counts)  # of each class
    if n_labels < at_least.sum():
        print(f"--labels {n_labels}: fewer than two for each of the {len(counts)} classes")
    if n_labels > len(dataset):
        raise UserError(f"--labels {n_labels}: there are only {len(dataset)} to train on")
    if n_labels == len(dataset):
        return dataset

    quota = n_labels * counts / counts.sum()
    sizes = np.maximum(at_least, np.floor(quota).astype(int))
    while sizes.sum() < n_labels:  # to the largest remainders
        sizes[(quota - sizes).argmax()] += 1
    while sizes.sum() > n_labels:  # where classes have more than their share, as the minimum
        sizes[np.lexsort((-counts, sizes))[-1]] -= 1  # of the most, the rarest class
    rng = np.random.default_rng([seed, streams.LABEL_SAMPLE])
    members = [np.flatnonzero(dataset.strata == stratum) for stratum in range(len(counts))]
    sample = [rng.permutation(m)[:size] for m, size in zip(members, sizes, strict=True)]
    return dataset[np.sort(np.concatenate(sample))]


def cross_validation_splits(dataset: LabeledDataset, n_folds: int, hold_out: float) -> list[Split]:
    """Cut each class into contiguous blocks, in the order of the file.

    Both sides of a split have examples of each class: of a single example the first side alone.

    Args:
        dataset: S examples.
        n_folds: One split per fold; 1 means one split.
        hold_out: The share of each class, its last examples, that this one split evaluates on.
    """
    strata = dataset.strata
    position = np.empty(len(dataset))  # of an example within its class, from 0 to 1
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
        position[members[-1:]] = 1 - 1e-9  # the last one is held out, however few there are
    is_single = np.bincount(strata)[strata] == 1
    held_out = [position >= 1 - hold_out]
    if n_folds > 1:
        # the classes take turns in which block comes first: no fold of few examples is empty
        fold = ((position * n_folds).astype(int) + strata) % n_folds
        held_out = [fold == i for i in range(n_folds)]
    held_out = [is_held & ~is_single for is_held in held_out]
    return [(np.flatnonzero(~is_held), np.flatnonzero(is_held)) for is_held in held_out]


def validation_splits(dataset: LabeledDataset) -> list[Split]:
    """The splits of the training examples by which a method chooses its hyperparameters; none
    where each class has one example."""
    n_folds = N_FOLDS if len(dataset) <= MOST_CROSS_VALIDATED else 1
    splits = cross_validation_splits(dataset, n_folds, HOLD_OUT)
    return [split for split in splits if len(split[1])]


# ------------------------------------------------------------------------- tokens and batches


def encode(
    dataset: LabeledDataset, tokenizer: Tokenizer, max_len: int
) -> tuple[list[np.ndarray], int]:
    """Tokenize: [CLS] text [SEP], or [CLS] text [SEP] second text [SEP].

    A long text keeps its head and its tail, where reviews and news say what they mean (Sun et al.
    2019, arXiv 1905.05583, section 5.3.1), a long sequence of items its end. Of a pair, the longer
    text is cut first. RoBERTa has two [SEP] between the texts, and no token types.

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
    keep_end = reads_items(tokenizer)
    rows = []
    n_cut = 0
    for encodings in zip(*encoded, strict=True):
        parts = [encoding.ids for encoding in encodings]
        n_cut += sum(map(len, parts)) > budget
        first, *rest = _cut(parts, budget, keep_end)
        ids = [special["cls"], *first]
        for second in rest:
            ids += separators + second
        ids.append(special["sep"])
        is_second = np.arange(len(ids)) > len(first) + 1
        rows.append(np.stack((np.array(ids), is_second * (n_separators == 1)), axis=1))
    return rows, n_cut


def _cut(parts: list[list[int]], budget: int, keep_end: bool) -> list[list[int]]:
    """Cut one text, or two, to `budget` tokens in all, each in its middle or before its end."""
    limits = [budget]
    if len(parts) == 2:
        first_limit = min(len(parts[0]), max(budget - len(parts[1]), budget - budget // 2))
        limits = [first_limit, budget - first_limit]
    tails = [limit if keep_end else limit // 2 for limit in limits]
    return [
        part if len(part) <= limit else part[: limit - tail] + part[len(part) - tail :]
        for part, limit, tail in zip(parts, limits, tails, strict=True)
    ]


def batches(
    rows: list[np.ndarray], order: np.ndarray, size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor, int, Tensor]]]:
    """Unpadded batches of `size` examples; `order` holds indices into `rows`.

    Sequences of zeros, whose outputs nobody reads, round T up to a multiple of a power of two: the
    CPU's matrix multiplications are compiled anew for each T. For a GPU, which records a step for
    each shape (kernels/graphs.py), they round T and the lengths further up.

    Yields:
        indices: The examples that the batch begins with.
        inputs: (ids (T,), cu_seqlens (S + 1,), length of the longest sequence, token types (T,)).
    """
    is_gpu = torch.device(device).type == "cuda"
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        sequences = [rows[i] for i in indices]
        n_tokens = sum(map(len, sequences))
        longest = max(map(len, sequences))
        multiple = min(MOST_PADDING, 2 ** max(0, n_tokens.bit_length() - 6))  # adds 3% at most
        if is_gpu:
            multiple = 2 ** max(0, n_tokens.bit_length() - 3)  # adds 25% at most
        n_padding = -n_tokens % multiple
        while n_padding:  # learned positions reach only as far as the longest sequence
            length = min(n_padding, longest)
            sequences.append(np.zeros((length, 2), dtype=np.int64))
            n_padding -= length
        lengths = [len(sequence) for sequence in sequences]
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device)
        ids, types = torch.from_numpy(np.concatenate(sequences).T.copy()).to(device)  # (2, T)
        if is_gpu:
            cu_seqlens = pad_sequences(cu_seqlens)
            longest = -(-longest // 64) * 64
        yield indices, (ids, cu_seqlens, longest, types)
