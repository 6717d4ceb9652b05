"""Token labels: files of tagged words, their tokens, and the entities that tags make.

Tags are IOB2 (Ramshaw & Marcus 1995, cmp-lg/9505040, with B- at each beginning): B-X begins an entity of type
X, I-X goes on with it, O is outside of any.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from files.tokenizer import special_ids
from files.disk import UserError
from files.readers import read_lines, read_table, text_suffix
from labels import TEST_SHARE, batches
from model import Tagger

WORD_NAMES, TAG_NAMES = (
    ("words", "tokens"),
    ("tags", "labels", "ner_tags"),
)  # of the fields of a .jsonl
OUTSIDE = "O"
NOT_SCORED = -100  # the target of a token that no one reads: cross_entropy's ignore_index
# What CoNLL's files call a word, in text that has not been cut into words.
WORD = re.compile(r"\w+(?:[-.'\u2019]\w+)*|[^\w\s]")

Entity = tuple[str, int, int]  # type, first word, last word


@dataclass(frozen=True)
class TaggedDataset:
    """Sentences of words, and the tags of them as numbers that index `names`."""

    words: list[list[str]]
    tags: list[np.ndarray]
    names: list[str]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, which: np.ndarray) -> "TaggedDataset":
        return TaggedDataset(
            [self.words[i] for i in which], [self.tags[i] for i in which], self.names
        )


def load(train: Path, test: Path | None) -> tuple[TaggedDataset, TaggedDataset]:
    """(train, test); without a test file, the last fifth of the sentences. Raises UserError for bad files."""
    found = read_sentences(train)
    names = [OUTSIDE, *sorted({tag for _, _, tags in found for tag in tags} - {OUTSIDE})]
    if len(names) < 2:
        raise UserError(f"{train}: every word is tagged {OUTSIDE}; there is nothing to learn")
    types = sorted({name.partition("-")[2] for name in names[1:]})
    print(f"{train}: {len(found):,} sentences; entities of {', '.join(types)}")
    if test is None:
        n_test = max(1, int(TEST_SHARE * len(found)))
        if len(found) < 4:
            raise UserError(
                f"{train}: {len(found)} sentences; at least 4 are needed without a --test file"
            )
        print(f"no test file: the last fifth is held out, {n_test:,} sentences")
        return _numbered(found[:-n_test], names), _numbered(found[-n_test:], names)
    tested = read_sentences(test)
    for lines, _, tags in tested:
        for line, tag in zip(lines, tags, strict=True):
            if tag not in names:
                raise UserError(
                    f"{test}:{line}: tag {tag!r} is none of those in {train}: {', '.join(names)}"
                )
    return _numbered(found, names), _numbered(tested, names)


def _numbered(sentences: list, names: list[str]) -> TaggedDataset:
    words = [words for _, words, _ in sentences]
    return TaggedDataset(
        words, [np.array([names.index(tag) for tag in tags]) for *_, tags in sentences], names
    )


def read_sentences(path: Path) -> list[tuple[list[int], list[str], list[str]]]:
    """(lines, words, tags) of each sentence: of a .jsonl with lists of words and tags, or of CoNLL's columns,
    the word first and the tag last, with a blank line between sentences. Raises UserError."""
    sentences: list[tuple[list[int], list[str], list[str]]] = []
    if text_suffix(path) == ".jsonl":
        for line, row in read_table(path):
            words, tags = (
                next((row[name] for name in names if name in row), None)
                for names in (WORD_NAMES, TAG_NAMES)
            )
            if not (_are_texts(words) and _are_texts(tags)):
                wanted = f"lists of text {' or '.join(WORD_NAMES)} and {' or '.join(TAG_NAMES)}"
                raise UserError(f"{path}:{line}: it needs {wanted}")
            if len(words) != len(tags):
                raise UserError(f"{path}:{line}: {len(words)} words, but {len(tags)} tags")
            sentences.append(([line] * len(words), words, tags))
    else:
        begins = True
        for line, text in read_lines(path):
            columns = text.split()
            if not columns or columns[0] == "-DOCSTART-":
                begins = True
            elif len(columns) < 2:
                raise UserError(f"{path}:{line}: one column, but a word and its tag are wanted")
            else:
                if begins:
                    sentences.append(([], [], []))
                begins = False
                for column, value in zip(
                    sentences[-1], (line, columns[0], columns[-1]), strict=True
                ):
                    column.append(value)
    sentences = [sentence for sentence in sentences if sentence[1]]
    if not sentences:
        raise UserError(f"{path}: no sentences in it")
    for lines, _, tags in sentences:
        for line, before, tag in zip(lines, [OUTSIDE, *tags], tags, strict=False):
            if not re.fullmatch(f"{OUTSIDE}|[BI]-.+", tag):
                raise UserError(
                    f"{path}:{line}: tag {tag!r} is none of {OUTSIDE}, B-TYPE and I-TYPE"
                )
            if tag[0] == "I" and before[2:] != tag[2:]:
                raise UserError(
                    f"{path}:{line}: {tag} after {before}: an entity begins with B-{tag[2:]}"
                )
    return sentences


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)


def encode_words(
    sentences: list[list[str]], tokenizer: Tokenizer, max_len: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """(rows (tokens, 2) of ids and types; of each word the place of its first piece in its row, or 0 where it
    has none; how many sentences were cut to `max_len`)."""
    special, rows, places, n_cut = special_ids(tokenizer), [], [], 0
    for words, encoding in zip(
        sentences,
        tokenizer.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False),
        strict=True,
    ):
        ids, room = encoding.ids, max_len - 2
        first = np.zeros(len(words), dtype=np.int64)
        for place in range(
            min(len(ids), room), 0, -1
        ):  # backwards, so that the first piece of a word stays
            first[encoding.word_ids[place - 1]] = place
        row = np.array([special["cls"], *ids[:room], special["sep"]])
        rows.append(np.stack((row, np.zeros_like(row)), axis=1))
        places.append(first)
        n_cut += len(ids) > room
    return rows, places, n_cut


def token_targets(
    rows: list[np.ndarray], places: list[np.ndarray], tags: list[np.ndarray]
) -> list[np.ndarray]:
    """The tag of each word at its first piece, NOT_SCORED elsewhere: (tokens,) of each row."""
    targets = [np.full(len(row), NOT_SCORED) for row in rows]
    for target, first, tag in zip(targets, places, tags, strict=True):
        target[first] = tag
        target[0] = NOT_SCORED
    return targets


def word_tags(of_tokens: np.ndarray, places: np.ndarray, names: list[str]) -> list[str]:
    """The tags of words from those of a row's tokens; a word without a token is outside."""
    return [names[of_tokens[place]] if place else OUTSIDE for place in places]


def entities(tags: list[str]) -> list[Entity]:
    """The entities of a sentence. Where a model's tags are illegal, I-X begins one, as in CoNLL's script."""
    found: list[Entity] = []
    for i, tag in enumerate(tags):
        kind = tag[2:]
        if tag[0] == "I" and found and found[-1][0] == kind and found[-1][2] == i - 1:
            found[-1] = (kind, found[-1][1], i)
        elif tag != OUTSIDE:
            found.append((kind, i, i))
    return found


def predict_entities(
    model: Tagger, tokenizer: Tokenizer, names: list[str], texts: list[str]
) -> tuple[list[list[dict]], int]:
    """(the entities of each text, with their places in it; how many texts were cut)."""
    words = [list(WORD.finditer(text)) for text in texts]
    given = [[word.group() for word in found] for found in words]
    rows, places, n_cut = encode_words(given, tokenizer, model.config.max_len)
    _, inputs = next(
        batches(rows, np.arange(len(rows)), len(rows), next(model.parameters()).device)
    )
    best = model(*inputs).argmax(1).tolist()
    answers = []
    for text, found, row, first in zip(texts, words, rows, places, strict=True):
        tags = word_tags(best[: len(row)], first, names)
        best = best[len(row) :]
        spans = [(kind, found[a].start(), found[b].end()) for kind, a, b in entities(tags)]
        answers.append([{"type": k, "text": text[a:b], "start": a, "end": b} for k, a, b in spans])
    return answers, n_cut


def measure(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities: right is one of the same type, beginning and end."""
    sides = [
        {(i, *e) for i, tags in enumerate(side) for e in entities(tags)}
        for side in (truth, predicted)
    ]
    right = len(sides[0] & sides[1])
    precision, recall = (right / len(side) if side else 0.0 for side in (sides[1], sides[0]))
    return {
        "f1": 2 * right / max(1, sum(map(len, sides))),
        "precision": precision,
        "recall": recall,
    }


def most_frequent(train: TaggedDataset, sentences: list[list[str]]) -> list[list[str]]:
    """The rival: each word's most frequent tag in training; a word that was not there is outside."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for words, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(words, tags.tolist(), strict=True):
            counts[word][tag] += 1
    best = {word: train.names[tags.most_common(1)[0][0]] for word, tags in counts.items()}
    return [[best.get(word, OUTSIDE) for word in words] for words in sentences]
