"""The labelled examples of finetune.py, of any task: read, sampled, and tokenized."""

import argparse

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from files import entities
from files.entities import TaggedDataset
from labels import LabeledDataset, encode, from_lists, hold_out_last_fifth, load, subsample

Dataset = LabeledDataset | TaggedDataset


def load_examples(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training examples, or a sample of them, and the test examples."""
    if args.task == "tokens":
        train, test = entities.load(args.train, args.test)
        return subsample(train, args.labels, args.seed), test
    columns = (args.text_column, args.pair_column, args.label_column)
    train, test = load(args.data, args.train, args.test, columns, args.task)
    return subsample(train, args.labels, args.seed), test


def load_lists(
    texts: list[str], labels: list, test: tuple[list[str], list] | None
) -> tuple[LabeledDataset, LabeledDataset]:
    """The same of lists, see `labels.from_lists`; `test` are texts and labels, or are held out."""
    train_set = from_lists(texts, labels)
    if test is None:
        return hold_out_last_fifth(train_set)
    test_set = from_lists(*test, train_set.names)
    if test_set.names != train_set.names:
        raise ValueError("the labels are numbers, the test labels are classes")
    return train_set, test_set


def balanced_weights(train: LabeledDataset) -> Tensor:
    """(C,) Weights of the classes with which they all contribute alike to the loss."""
    counts = np.bincount(train.targets, minlength=len(train.names))
    return torch.tensor(len(train) / len(counts) / counts.clip(1), dtype=torch.float32)


def encode_examples(dataset: Dataset, tokenizer: Tokenizer, max_len: int) -> tuple:
    """Tokenize: rows (see `labels.encode`), targets, first pieces (see `encode_words`), n_cut.

    The targets of an example are (1,) its class or number, or (tokens,) its tags.
    """
    if isinstance(dataset, TaggedDataset):
        rows, first_pieces, n_cut = entities.encode_words(dataset.words, tokenizer, max_len)
        return rows, entities.token_targets(rows, first_pieces, dataset), first_pieces, n_cut
    rows, n_cut = encode(dataset, tokenizer, max_len)
    return rows, list(dataset.targets[:, None]), None, n_cut
