"""Sequences that were never text: items, events, nucleotides, picture patches.

A sequence is a document whose tokens are already tokens: each item, followed by SEPARATOR. As such
it passes through all that reads text; its tokenizer splits at SEPARATOR, and every item is a word.

Two kinds of tables hold sequences, recognized by the first row, whatever the name of the file:

    lists         {"items": ["a", "b"]} or {"ids": [3, 17]}, a sequence in each row
    interactions  the columns user, item and perhaps time, a sequence for each user
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import BertProcessing

from files.disk import UserError, print_once
from files.tokenizer import SPECIAL_TOKENS

SEPARATOR = "\x1f"  # ASCII's unit separator
LISTS = ("items", "ids")
# Usual column names, compared in small letters and without punctuation.
USERS = ("user", "userid", "uid", "session", "sessionid", "customer", "customerid", "visitorid")
ITEMS = ("item", "itemid", "iid", "movie", "movieid", "product", "productid", "asin", "track")
ITEMS += ("trackid", "song", "songid", "article", "articleid", "event", "eventid")
TIMES = ("timestamp", "time", "datetime", "date", "unixreviewtime", "eventtime", "ts")
TEXTS = ("text", "sentence", "review", "content", "document", "body", "message")  # no interactions
RECBOLE_TYPE = re.compile(r":(token|float)(_seq)?$")
LARGEST_ID = 2**31 - 1
LONGEST_ITEM = 1000  # characters
MOST_ITEMS = 2**22  # different ones, which take half a gigabyte

Row = tuple[int, dict[str, Any]]  # line number, {column: value}
Report = Callable[[UserError], None]


def as_sequences(
    path: Path, rows: Iterator[Row], column: str | None, report: Report, may_mask: bool
) -> Iterator[Row]:
    """Turn the sequences of a table into texts; the rows of any other table stay as they are.

    The text is in the column `column`, by default "text"; the other columns are those of the row.
    Of interactions they are "user", "times", and what is the same in all rows of the user.

    Args:
        column: the flag --text-column: the list, or USER,ITEM or USER,ITEM,TIME; None: guessed.
        report: called for each row that is broken.
        may_mask: whether an item may be [MASK].
    """
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    column = None if column == "text" else column
    names = list(first[1])
    if name := _find_list(first[1], column):
        sequences = _read_lists(path, rows, name, report)
    elif columns := _find_interactions(path, names, column):
        sequences = _read_interactions(path, rows, columns, report)
    else:
        yield from rows
        return
    for line, row, items in sequences:
        try:
            text = "".join(_check_item(item, may_mask) + SEPARATOR for item in items)
        except ValueError as error:
            report(UserError(f"{path}:{line}: {error}"))
        else:
            yield line, row | {column or "text": text}


def _find_list(row: dict[str, Any], column: str | None) -> str | None:
    if not column and isinstance(row.get("text"), str):
        return None
    names = (column,) if column else LISTS
    return next((name for name in names if isinstance(row.get(name), list)), None)


def _find_interactions(path: Path, names: list[str], column: str | None) -> list[str] | None:
    """The columns of user, item and perhaps time; None if the table holds something else."""
    plain = {RECBOLE_TYPE.sub("", name): name for name in names}
    if column in names or (column and "," not in column):
        return None
    if column:
        chosen = [name.strip() for name in column.split(",")]
        if len(chosen) not in (2, 3) or not all(name in names or name in plain for name in chosen):
            choices = ", ".join(map(repr, plain))
            problem = f"not USER,ITEM or USER,ITEM,TIME of the columns {choices}"
            raise UserError(f"{path}: --text-column {column}: {problem}")
        return [plain.get(name, name) for name in chosen]
    chosen = _usual_columns(names)
    if chosen:
        user, item, *time = (RECBOLE_TYPE.sub("", name) for name in chosen)
        order = f"in the order of {time[0]!r}" if time else "in the order of the file"
        guess = f"sequences of {item!r} by {user!r} {order}"
        print_once(f"{path}: {guess}; otherwise --text-column USER,ITEM,TIME")
    return chosen


def _usual_columns(names: Iterable[str]) -> list[str] | None:
    """Those of user, item and perhaps time, by their usual names."""
    plain = {re.sub(r"[\W_]", "", RECBOLE_TYPE.sub("", name)).lower(): name for name in names}
    user, item, time, text = (
        next((plain[name] for name in kind if name in plain), None)
        for kind in (USERS, ITEMS, TIMES, TEXTS)
    )
    if text or not user or not item:
        return None
    return [user, item, time] if time else [user, item]


def is_interactions(head: str) -> bool:
    """Whether a file that begins so is a table of interactions, whatever its name."""
    header = re.split("[\n\r]", head, maxsplit=1)[0]
    rows = (header.split(delimiter) for delimiter in "\t,;")
    return any(_usual_columns(name.strip(' "') for name in names) for names in rows)


def _read_lists(
    path: Path, rows: Iterator[Row], name: str, report: Report
) -> Iterator[tuple[int, dict[str, Any], list]]:
    [other] = set(LISTS) - {name} if name in LISTS else [None]
    for line, row in rows:
        items = row.pop(name, None)
        if other in row:
            problem = f"both {name!r} and {other!r} in one file"
        elif not isinstance(items, list):
            problem = f"no list in field {name!r}"
        elif not items:
            problem = f"the list in field {name!r} is empty"
        else:
            yield line, row, items
            continue
        report(UserError(f"{path}:{line}: {problem}"))


def _read_interactions(
    path: Path, rows: Iterator[Row], columns: list[str], report: Report
) -> Iterator[tuple[int, dict[str, Any], list]]:
    """The items of each user by time; those of equal times stay in the order of the file."""
    user, item, *time = columns
    events: dict[Any, list[tuple]] = {}  # (time, item) of each user
    constant: dict[Any, Row] = {}  # the first line, and the columns that never change
    for line, row in rows:
        try:
            key = _check_item(row.get(user), may_mask=True)
            moment = _to_time(row.get(time[0])) if time else 0
            event = (moment, _check_item(row.get(item), may_mask=True))
        except ValueError as error:
            report(UserError(f"{path}:{line}: {error}"))
            continue
        rest = {name: value for name, value in row.items() if name not in columns}
        events.setdefault(key, []).append(event)
        number, old = constant.setdefault(key, (line, rest))
        constant[key] = (number, {n: v for n, v in old.items() if rest.get(n) == v})
    for key, (line, row) in constant.items():
        ordered = sorted(events[key], key=lambda event: event[0])
        times, items = zip(*ordered, strict=True)
        yield line, row | {"user": key, "times": times}, items


def _to_time(value: Any) -> int | float:
    """Integers stay integers: float32 would make most seconds of our epoch equal."""
    try:
        return int(value) if isinstance(value, (int, str)) else _finite(value)
    except ValueError:
        return _finite(value)


def _finite(value: Any) -> float:
    try:
        if math.isfinite(number := float(value)):
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"the time {value!r} is no number")


def _check_item(item: Any, may_mask: bool) -> str:
    """The name of an item; ValueError if it cannot be one."""
    if type(item) is int:
        if not 0 <= item <= LARGEST_ID:
            raise ValueError(f"the id {item} is not between 0 and {LARGEST_ID}")
        return str(item)
    if not isinstance(item, str):
        raise ValueError(f"{str(item)[:50]!r} is no item: items are texts or whole numbers")
    if not item.strip() or SEPARATOR in item or len(item) > LONGEST_ITEM:
        problem = f"blank, longer than {LONGEST_ITEM} characters, or has the character U+001F"
        raise ValueError(f"the item {item[:50]!r} is {problem}")
    special = set(SPECIAL_TOKENS.values()) - ({SPECIAL_TOKENS["mask"]} if may_mask else set())
    if named := [token for token in special if token in item]:
        raise ValueError(f"the item {item[:50]!r} is named like the special token {named[0]}")
    return item


# ---------------------------------------------------------------------------------- the tokenizer


def is_sequence(text: str) -> bool:
    """Whether a document is a sequence of items."""
    return text.endswith(SEPARATOR)


def split_items(text: str) -> list[str]:
    return text.removesuffix(SEPARATOR).split(SEPARATOR)


def reads_items(tokenizer: Tokenizer) -> bool:
    """Whether the words of a tokenizer are the items of sequences."""
    splitter = tokenizer.pre_tokenizer
    words = splitter.pre_tokenize_str(f"a b{SEPARATOR}c") if splitter else []
    return [word for word, _ in words] == ["a b", "c"]


def make_item_tokenizer(sequences: Iterable[str], vocab_size: int, min_count: int) -> Tokenizer:
    """A vocabulary of the most frequent items, and [UNK] for the others.

    Args:
        vocab_size: the largest number of tokens, the five special ones included.
        min_count: how often an item must occur.
    """
    counts: Counter[str] = Counter()
    for text in sequences:
        counts.update(split_items(text))
        if len(counts) > MOST_ITEMS:
            raise UserError(f"the corpus has more than {MOST_ITEMS:,} different items")
    special = list(SPECIAL_TOKENS.values())
    frequent = sorted(counts, key=lambda item: (-counts[item], item))[: vocab_size - len(special)]
    items = [item for item in frequent if counts[item] >= min_count]
    n_rare = len(counts) - len(items)
    share = 1 - sum(counts[item] for item in items) / max(1, counts.total())
    rule = f"beyond the {vocab_size:,} of --vocab-size or rarer than --min-count {min_count}"
    print(f"{len(items):,} items; {n_rare:,} others, {share:.1%} of all tokens, are {rule}")
    if not items:
        raise UserError(f"no item occurs {min_count} times: choose a lower --min-count")

    vocab = {token: i for i, token in enumerate([*special, *items])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    tokenizer.decoder = decoders.Replace(Regex(r"\z"), SEPARATOR)  # after each item
    sep, cls = ((SPECIAL_TOKENS[role], vocab[SPECIAL_TOKENS[role]]) for role in ("sep", "cls"))
    tokenizer.post_processor = BertProcessing(sep, cls)
    return tokenizer
