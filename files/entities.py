"""Token labels: files of tagged words, their tokens, and the entities that tags form.

Tags are IOB2 (Ramshaw & Marcus 1995, cmp-lg/9505040, with B- at each beginning): B-X begins an
entity of type X, I-X continues it, O is outside of any.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from files.disk import UserError
from files.readers import read_lines, read_table, text_suffix
from files.tokenizer import special_ids
from labels import TEST_SHARE, batches
from model import Tagger

WORD_FIELDS = ("words", "tokens")  # of a .jsonl file
TAG_FIELDS = ("tags", "labels", "ner_tags")
OUTSIDE = "O"
NOT_SCORED = -100  # the target of a token without a tag: cross_entropy's ignore_index
# What the files of CoNLL call a word, for text that is not split into words.
WORD = re.compile(r"\w+(?:[-.'\u2019]\w+)*|[^\w\s]")

Sentence = tuple[list[int], list[str], list[str]]  # line numbers, words, tags
Entity = tuple[str, int, int]  # type, first word, last word


@dataclass(frozen=True)
class TaggedDataset:
    """Sentences of words, with (words,) int64 tags that index `names`; the first is OUTSIDE."""

    words: list[list[str]]
    tags: list[np.ndarray]
    names: list[str]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, indices: np.ndarray) -> "TaggedDataset":
        words = [self.words[i] for i in indices]
        return TaggedDataset(words, [self.tags[i] for i in indices], self.names)

    @property
    def targets(self) -> list[list[str]]:
        """The tags of each sentence as text, with which predictions are compared."""
        return [[self.names[i] for i in tags] for tags in self.tags]


# ------------------------------------------------------------------------------------ files


def load(train: Path, test: Path | None) -> tuple[TaggedDataset, TaggedDataset]:
    """Read training and test sentences; without a test file, the last fifth of `train` is held out.

    Raises UserError if a file cannot be used, or has a tag that `train` does not have.
    """
    sentences = read_sentences(train)
    names = [OUTSIDE, *sorted({tag for *_, tags in sentences for tag in tags} - {OUTSIDE})]
    if len(names) < 2:
        raise UserError(f"{train}: every word is tagged {OUTSIDE}; there is nothing to learn")
    types = ", ".join(sorted({name[2:] for name in names[1:]}))
    print(f"{train}: {len(sentences):,} sentences; entities of {types}")
    if test is None and len(sentences) < 4:
        raise UserError(f"{train}: at least 4 sentences are needed without a --test file")
    if test is None:
        n_test = max(1, int(TEST_SHARE * len(sentences)))
        print(f"no test file: the last fifth is held out, {n_test:,} sentences")
        return _to_dataset(sentences[:-n_test], names), _to_dataset(sentences[-n_test:], names)
    test_sentences = read_sentences(test)
    for lines, _, tags in test_sentences:
        for line, tag in zip(lines, tags, strict=True):
            if tag not in names:
                choices = ", ".join(names)
                raise UserError(
                    f"{test}:{line}: tag {tag!r} is none of those in {train}: {choices}"
                )
    return _to_dataset(sentences, names), _to_dataset(test_sentences, names)


def _to_dataset(sentences: list[Sentence], names: list[str]) -> TaggedDataset:
    tags = [np.array([names.index(tag) for tag in tags]) for *_, tags in sentences]
    return TaggedDataset([words for _, words, _ in sentences], tags, names)


def read_sentences(path: Path) -> list[Sentence]:
    """Read a .jsonl file with lists of words and tags, or CoNLL's columns.

    A line of columns has the word first and the tag last; a blank line ends a sentence. Raises
    UserError if a line is not like this or its tag is not IOB2; the message names the line.
    """
    read = _read_jsonl if text_suffix(path) == ".jsonl" else _read_columns
    sentences = [sentence for sentence in read(path) if sentence[1]]
    if not sentences:
        raise UserError(f"{path}: no sentences in it")
    for lines, _, tags in sentences:
        for line, previous, tag in zip(lines, [OUTSIDE, *tags], tags, strict=False):
            if not re.fullmatch(f"{OUTSIDE}|[BI]-.+", tag):
                raise UserError(
                    f"{path}:{line}: tag {tag!r} is none of {OUTSIDE}, B-TYPE and I-TYPE"
                )
            if tag[0] == "I" and previous[2:] != tag[2:]:
                rule = f"an entity begins with B-{tag[2:]}"
                raise UserError(f"{path}:{line}: {tag} after {previous}: {rule}")
    return sentences


def _read_jsonl(path: Path) -> list[Sentence]:
    sentences = []
    for line, row in read_table(path):
        words = next((row[name] for name in WORD_FIELDS if name in row), None)
        tags = next((row[name] for name in TAG_FIELDS if name in row), None)
        if not _are_texts(words) or not _are_texts(tags):
            fields = " or ".join(WORD_FIELDS) + " and " + " or ".join(TAG_FIELDS)
            raise UserError(f"{path}:{line}: it needs lists of text {fields}")
        if len(words) != len(tags):
            raise UserError(f"{path}:{line}: {len(words)} words, but {len(tags)} tags")
        sentences.append(([line] * len(words), words, tags))
    return sentences


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)


def _read_columns(path: Path) -> list[Sentence]:
    sentences: list[Sentence] = [([], [], [])]
    for line, text in read_lines(path):
        columns = text.split()
        if not columns or columns[0] == "-DOCSTART-":
            sentences.append(([], [], []))
            continue
        if len(columns) < 2:
            raise UserError(f"{path}:{line}: one column; a word and its tag are needed")
        for column, value in zip(sentences[-1], (line, columns[0], columns[-1]), strict=True):
            column.append(value)
    return sentences


def subsample(dataset: TaggedDataset, n_labels: int | None, seed: int) -> TaggedDataset:
    """Sample `n_labels` sentences, or take all. Raises UserError if there are fewer."""
    if n_labels is None:
        return dataset
    if n_labels > len(dataset):
        raise UserError(f"--labels {n_labels}: there are only {len(dataset)} sentences")
    sample = np.random.default_rng([seed, 3]).permutation(len(dataset))[:n_labels]
    return dataset[np.sort(sample)]


# ---------------------------------------------------------------------- tokens and entities


def encode_words(
    sentences: list[list[str]], tokenizer: Tokenizer, max_len: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Tokenize sentences that are split into words; a sentence that is too long loses its end.

    Returns:
        rows: (tokens, 2) int64 of each sentence, as `labels.encode` gives them.
        first_pieces: (words,) int64 of each sentence: where in its row a word begins; 0: nowhere.
        n_cut: The number of sentences that were longer than `max_len` tokens.
    """
    special = special_ids(tokenizer)
    encodings = tokenizer.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
    rows = []
    first_pieces = []
    n_cut = 0
    for words, encoding in zip(sentences, encodings, strict=True):
        ids = encoding.ids[: max_len - 2]
        n_cut += len(ids) < len(encoding.ids)
        first = np.zeros(len(words), dtype=np.int64)
        for i in reversed(range(len(ids))):  # backwards, so that the first piece of a word stays
            first[encoding.word_ids[i]] = i + 1
        row = np.array([special["cls"], *ids, special["sep"]])
        rows.append(np.stack((row, np.zeros_like(row)), axis=1))
        first_pieces.append(first)
    return rows, first_pieces, n_cut


def token_targets(
    rows: list[np.ndarray], first_pieces: list[np.ndarray], tags: list[np.ndarray]
) -> list[np.ndarray]:
    """(tokens,) of each row: the tag of a word at its first piece, NOT_SCORED elsewhere."""
    targets = []
    for row, first, tag in zip(rows, first_pieces, tags, strict=True):
        target = np.full(len(row), NOT_SCORED)
        has_piece = first > 0
        target[first[has_piece]] = tag[has_piece]
        targets.append(target)
    return targets


def word_tags(token_tags: np.ndarray, first_pieces: np.ndarray, names: list[str]) -> list[str]:
    """The tag of each word, from those of its row's tokens; a word without a token is OUTSIDE."""
    return [names[token_tags[first]] if first else OUTSIDE for first in first_pieces]


def entities_of(tags: list[str]) -> list[Entity]:
    """The entities of a sentence; a misplaced I-X begins one, as in CoNLL's evaluation script."""
    entities: list[Entity] = []
    for i, tag in enumerate(tags):
        kind = tag[2:]
        if tag[0] == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        elif tag != OUTSIDE:
            entities.append((kind, i, i))
    return entities


def predict_entities(
    model: Tagger, tokenizer: Tokenizer, names: list[str], texts: list[str]
) -> tuple[list[list[dict[str, Any]]], int]:
    """Find the entities of texts, in one batch, and count the texts that the model must cut.

    An entity is {"type", "text", "start", "end"}; its places count characters.
    """
    matches = [list(WORD.finditer(text)) for text in texts]
    words = [[match.group() for match in sentence] for sentence in matches]
    rows, first_pieces, n_cut = encode_words(words, tokenizer, model.config.max_len)
    device = next(model.parameters()).device
    _, inputs = next(batches(rows, np.arange(len(rows)), len(rows), device))
    token_tags = model(*inputs).argmax(1).cpu().numpy()
    row_starts = np.cumsum([0, *map(len, rows)])
    answers: list[list[dict[str, Any]]] = []
    for i, text in enumerate(texts):
        tags = word_tags(token_tags[row_starts[i] : row_starts[i + 1]], first_pieces[i], names)
        answers.append([])
        for kind, first, last in entities_of(tags):
            start, end = matches[i][first].start(), matches[i][last].end()
            answers[-1].append({"type": kind, "text": text[start:end], "start": start, "end": end})
    return answers, n_cut


def entity_f1(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """F1, precision and recall over entities, which must agree in type, beginning and end."""
    true_entities = {(i, *entity) for i, tags in enumerate(truth) for entity in entities_of(tags)}
    predictions = {(i, *entity) for i, tags in enumerate(predicted) for entity in entities_of(tags)}
    n_correct = len(true_entities & predictions)
    precision = n_correct / max(1, len(predictions))
    recall = n_correct / max(1, len(true_entities))
    f1 = 2 * n_correct / max(1, len(true_entities) + len(predictions))
    return {"f1": f1, "precision": precision, "recall": recall}


def most_frequent_tags(train: TaggedDataset, sentences: list[list[str]]) -> list[list[str]]:
    """A baseline: the most frequent tag of each word in training, OUTSIDE for an unseen word."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for words, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(words, tags.tolist(), strict=True):
            counts[word][tag] += 1
    best = {word: train.names[tags.most_common(1)[0][0]] for word, tags in counts.items()}
    return [[best.get(word, OUTSIDE) for word in words] for words in sentences]
