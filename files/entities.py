"""Token labels: files of tagged words, their tokens, and the entities that tags form.

Tags are IOB2 (Ramshaw & Marcus 1995, cmp-lg/9505040, with B- at each beginning): B-X begins an
entity of type X, I-X continues it (or begins one where there is none), O is outside of any. Files
of other schemes (IOB1, BIOES, BILOU, BMES) are converted.

A model tags units: the tokenizer's words without their punctuation, marks of punctuation and, in
scripts without spaces, single characters. Words of a file are split into units for training, as
running text is for prediction, so that both agree; the score of a file counts its own words.
"""

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from files.columns import find_tests
from files.disk import UserError
from files.readers import read_lines, read_table, table_format
from files.tokenizer import NO_SPACES, special_ids
from labels import batches, hold_out_last_fifth
from model import Tagger

OUTSIDE = "O"
TAG = re.compile("O|[BIMELSU]-.+")
IOB2_LETTERS = {"O": "O", "B": "B", "I": "I", "M": "I", "E": "I", "L": "I", "S": "B", "U": "B"}
UNSPACED = f"{NO_SPACES}\uf900-\ufaff"  # and compatibility ideographs
LETTERS = [chr(i) for i in range(0x12000)]  # of all scripts in use
MARKS = "".join(c for c in LETTERS if unicodedata.category(c)[0] == "M")
PUNCTUATION = "".join(c for c in LETTERS if unicodedata.category(c)[0] == "P") + "$+<=>^`|~"
SINGLE = UNSPACED + re.escape(PUNCTUATION)  # that of BERT
UNIT = re.compile(f"(?:[{SINGLE}]|[^\\s{SINGLE}]+)[{MARKS}]*")
NOT_SCORED = -100  # the target of a token without a tag: cross_entropy's ignore_index

Sentence = tuple[list[str], list[str]]  # its words and their tags
Entity = tuple[str, int, int]  # type, first word, last word


@dataclass(frozen=True)
class TaggedDataset:
    """Sentences of words, with `targets` as tags of the words; `names` are all tags, O first."""

    words: list[list[str]]
    targets: list[list[str]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, indices: np.ndarray) -> "TaggedDataset":
        words = [self.words[i] for i in indices]
        return TaggedDataset(words, [self.targets[i] for i in indices], self.names)

    @property
    def strata(self) -> np.ndarray:
        """One group for all sentences, see LabeledDataset."""
        return np.zeros(len(self), dtype=int)

    def joined_texts(self) -> list[str]:
        """Each sentence as one text."""
        return [" ".join(words) for words in self.words]


# ------------------------------------------------------------------------------------ files


def load(train: Path, test: Path | None) -> tuple[TaggedDataset, TaggedDataset]:
    """Read training and test sentences; without a test file, the last fifth of `train` is held out.

    Raises UserError if a file cannot be used, or has a tag that `train` does not have.
    """
    words, tags = read_sentences(train)
    types = sorted({tag[2:] for tag in itertools.chain(*tags) if tag != OUTSIDE})
    if not types:
        raise UserError(f"{train}: every word is tagged {OUTSIDE}; there is nothing to learn")
    print(f"{train}: {len(words):,} sentences; entities of {', '.join(types)}")
    names = [OUTSIDE, *(f"{letter}-{kind}" for letter in "BI" for kind in types)]
    dataset = TaggedDataset(words, tags, names)
    tests = find_tests(train, test, "tags", "ner_tags")
    if not tests:
        return hold_out_last_fifth(dataset)
    parts = zip(*(read_sentences(path, names) for path in tests), strict=True)
    words, tags = (list(itertools.chain(*part)) for part in parts)
    return dataset, TaggedDataset(words, tags, names)


def read_sentences(
    path: Path, names: list[str] | None = None
) -> tuple[list[list[str]], list[list[str]]]:
    """Read the words and tags of JSON or parquet with lists, or of CoNLL's columns.

    A line of columns has the word first and the tag last; a blank line ends a sentence. The tags
    become IOB2, and must be among `names`, if given. Raises UserError if a line is not like this or
    has another tag; it names the line.
    """
    has_lists = (table_format(path) or "").startswith(("json", "parquet"))
    read = _read_lists if has_lists else _read_columns
    sentences = [sentence for sentence in read(path, names) if sentence[0]]
    if not sentences:
        raise UserError(f"{path}: no sentences in it")
    words, tags = map(list, zip(*sentences, strict=True))
    return words, [_to_iob2(tags_of_sentence) for tags_of_sentence in tags]


def _to_iob2(tags: list[str]) -> list[str]:
    tags = [IOB2_LETTERS[tag[0]] + tag[1:] for tag in tags]
    for kind, first, _ in entities_of(tags):
        tags[first] = f"B-{kind}"
    return tags


def _check_tag(source: str, tag: str, names: list[str] | None) -> None:
    if not TAG.fullmatch(tag):
        problem = f"tag {tag!r} is none of {OUTSIDE}, B-TYPE and I-TYPE"
        raise UserError(f"{source}: {problem}, or of another scheme such as BIOES")
    if names and IOB2_LETTERS[tag[0]] + tag[1:] not in names:
        raise UserError(f"{source}: tag {tag!r} is none of the training tags {', '.join(names)}")


def _read_lists(path: Path, names: list[str] | None) -> Iterator[Sentence]:
    for line, row in read_table(path):
        words = row.get("words", row.get("tokens"))
        tags = row.get("tags", row.get("ner_tags"))
        are_lists = isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)
        if not are_lists or not all(isinstance(text, str) for text in words + tags):
            problem = "the fields 'words' and 'tags' must be equally long lists of text"
            raise UserError(f"{path}:{line}: {problem}, the tags by name, such as B-PER")
        for tag in tags:
            _check_tag(f"{path}:{line}", tag, names)
        yield words, tags


def _read_columns(path: Path, names: list[str] | None) -> list[Sentence]:
    sentences: list[list[list[str]]] = [[]]  # the columns of each line
    for line, text in read_lines(path):
        columns = [c.strip(" \r\n") for c in re.split("\t+" if "\t" in text else " +", text)]
        columns = [column for column in columns if column]
        if not columns or columns[0] == "-DOCSTART-":
            sentences.append([])
        elif columns[0] == "#" and not TAG.fullmatch(columns[-1]):
            continue  # a comment
        elif len(columns) == 1:
            raise UserError(f"{path}:{line}: one column; a word and its tag are needed")
        else:
            _check_tag(f"{path}:{line}", columns[-1], names)
            sentences[-1].append(columns)
    numbered = (pair for sentence in sentences for pair in enumerate(sentence, 1))
    # as in CoNLL-U, where the second column is the word
    has_numbers = all(len(columns) > 2 and columns[0] == str(i) for i, columns in numbered)
    return [([c[has_numbers] for c in lines], [c[-1] for c in lines]) for lines in sentences]


# ---------------------------------------------------------------------- tokens and entities


def encode_words(
    sentences: list[list[str]], tokenizer: Tokenizer, max_len: int
) -> tuple[list[np.ndarray], list[list[list[int]]], int]:
    """Tokenize sentences that are split into words; a sentence that is too long loses its end.

    Returns:
        rows: (tokens, 2) int64 of each sentence, as `labels.encode` gives them.
        first_pieces: Of each word of each sentence, where in its row the units of the word begin;
            [] where the row has nothing of it.
        n_cut: The number of sentences that were longer than `max_len` tokens.
    """
    special = special_ids(tokenizer)
    spans = {word: word_spans(word, tokenizer) for word in set(itertools.chain(*sentences))}
    units = [[word[a:b] for word in words for a, b in spans[word]] for words in sentences]
    encodings = tokenizer.encode_batch(units, is_pretokenized=True, add_special_tokens=False)
    rows = []
    first_pieces = []
    n_cut = 0
    for words, encoding in zip(sentences, encodings, strict=True):
        encoding.truncate(max_len - 2)
        n_cut += bool(encoding.overflowing)
        ids = [special["cls"], *encoding.ids, special["sep"]]
        rows.append(np.array([ids, [0] * len(ids)]).T)
        word_of_unit = np.repeat(np.arange(len(words)), [len(spans[word]) for word in words])
        first: list[list[int]] = [[] for _ in words]
        for unit, position in zip(*np.unique(encoding.word_ids, return_index=True), strict=True):
            first[word_of_unit[unit]].append(int(position) + 1)
        first_pieces.append(first)
    return rows, first_pieces, n_cut


def token_targets(
    rows: list[np.ndarray], first_pieces: list[list[list[int]]], dataset: TaggedDataset
) -> list[np.ndarray]:
    """(tokens,) of each row: the tag of a unit at its first piece, NOT_SCORED elsewhere.

    The first unit of a word has the word's tag; the others continue it.
    """
    numbers = {name: i for i, name in enumerate(dataset.names)}
    targets = []
    for row, first, tags in zip(rows, first_pieces, dataset.targets, strict=True):
        target = np.full(len(row), NOT_SCORED)
        for places, tag in zip(first, tags, strict=True):
            continued = tag if tag == OUTSIDE else f"I{tag[1:]}"
            target[places] = numbers.get(continued, NOT_SCORED)
            target[places[:1]] = numbers[tag]
        targets.append(target)
    return targets


def word_tags(token_tags: np.ndarray, first_pieces: list[list[int]], names: list[str]) -> list[str]:
    """The tag of each word, from those of its row's tokens; a word without a token is OUTSIDE."""
    return [names[token_tags[first[0]]] if first else OUTSIDE for first in first_pieces]


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
    spans = [word_spans(text, tokenizer) for text in texts]
    words = [[text[a:b] for a, b in s] for text, s in zip(texts, spans, strict=True)]
    rows, first_pieces, n_cut = encode_words(words, tokenizer, model.config.max_len)
    device = next(model.parameters()).device
    _, inputs = next(batches(rows, np.arange(len(rows)), len(rows), device))
    token_tags = model(*inputs).argmax(1).cpu().numpy()
    row_ends = np.cumsum([len(row) for row in rows])
    answers: list[list[dict[str, Any]]] = [[] for _ in texts]
    for i, tags in enumerate(np.split(token_tags, row_ends)[: len(rows)]):
        for kind, first, last in entities_of(word_tags(tags, first_pieces[i], names)):
            start, end = spans[i][first][0], spans[i][last][1]
            entity = {"type": kind, "text": texts[i][start:end], "start": start, "end": end}
            answers[i].append(entity)
    return answers, n_cut


def word_spans(text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Where the units of a text begin and end.

    They are the tokenizer's words, without the space that byte-level BPE counts to a word, which
    are split at punctuation, and the single characters of scripts that are written without spaces.
    No word begins with a combining mark, although byte-level BPE cuts Hindi there.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = [encoding.word_to_chars(i)[0] for i in dict.fromkeys(encoding.word_ids)]
    starts = [start for start in starts if text[start] not in MARKS]
    words = itertools.pairwise([*starts, len(text)])
    return [unit.span() for start, end in words for unit in UNIT.finditer(text, start, end)]


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
    for words, tags in zip(train.words, train.targets, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return [[best.get(word, OUTSIDE) for word in words] for words in sentences]
