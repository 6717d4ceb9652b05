"""The labelled examples of finetune.py, of any task: read, sampled, and tokenized."""

import argparse

from tokenizers import Tokenizer

from files import entities
from files.entities import TaggedDataset
from labels import LabeledDataset, encode, load, subsample

Dataset = LabeledDataset | TaggedDataset


def load_examples(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training examples, or a sample of them, and the test examples."""
    if args.task == "tokens":
        train, test = entities.load(args.train, args.test)
        return subsample(train, args.labels, args.seed), test
    columns = (args.text_column, args.pair_column, args.label_column)
    train, test = load(args.data, args.train, args.test, columns, args.task)
    return subsample(train, args.labels, args.seed), test


def encode_examples(dataset: Dataset, tokenizer: Tokenizer, max_len: int) -> tuple:
    """Tokenize: rows (see `labels.encode`), targets, first pieces (see `encode_words`), n_cut.

    The targets of an example are (1,) its class or number, or (tokens,) its tags.
    """
    if isinstance(dataset, TaggedDataset):
        rows, first_pieces, n_cut = entities.encode_words(dataset.words, tokenizer, max_len)
        return rows, entities.token_targets(rows, first_pieces, dataset), first_pieces, n_cut
    rows, n_cut = encode(dataset, tokenizer, max_len)
    return rows, list(dataset.targets[:, None]), None, n_cut
