"""Sequences that were never text: items, events, nucleotides, picture patches.

A sequence is a document whose tokens are already tokens: each item, followed by SEPARATOR. As such
it passes through all that reads text; its tokenizer splits at SEPARATOR, and every item is a word.

Two kinds of tables hold sequences, recognized by the first row, whatever the name of the file:

    lists         {"items": ["a", "b"]} or {"ids": [3, 17]}, a sequence in each row
    interactions  the columns user, item and perhaps time, a sequence for each user
"""

import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from files.disk import UserError, print_once
from files.tokenizer import SPECIAL_TOKENS, add_cls_and_sep

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
    `column` is --text-column: that of the lists, or USER,ITEM or USER,ITEM,TIME; None: guessed.
    `report` is called for each row that is broken; `may_mask` allows the item [MASK].
    """
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    column = None if column == "text" else column
    name = _find_list(first[1], column)
    if not name and (columns := _find_interactions(path, list(first[1]), column)):
        rows = _group_interactions(path, rows, columns, report)
        name = columns[1]
    if not name:
        yield from rows
        return
    for line, row in rows:
        items = row.pop(name, None)
        try:
            if name in LISTS and not row.keys().isdisjoint(LISTS):
                raise ValueError("both 'items' and 'ids' in one file")
            if not items or not isinstance(items, list):
                raise ValueError(f"no list of items in field {name!r}")
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
    if column is None and (usual := _usual_columns(plain)):
        column = ",".join(usual)
        order = "by time" if len(usual) == 3 else "in the order of the file"
        print_once(f"{path}: the items of each user {order}; guessed: --text-column {column}")
    if not column or column in names or "," not in column:
        return None
    chosen = [plain.get(name.strip(), name.strip()) for name in column.split(",")]
    if len(chosen) not in (2, 3) or not set(chosen) <= set(names):
        problem = f"not USER,ITEM or USER,ITEM,TIME of the columns {', '.join(map(repr, plain))}"
        raise UserError(f"{path}: --text-column {column}: {problem}")
    return chosen


def _usual_columns(names: Iterable[str]) -> list[str]:
    """Those of user, item and perhaps time, by their usual names; of other tables none."""
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in names}
    user, item, time, text = (
        [plain[name] for name in kind if name in plain][:1] for kind in (USERS, ITEMS, TIMES, TEXTS)
    )
    return user + item + time if user and item and not text else []


def is_interactions(head: str) -> bool:
    """Whether a file that begins so is a table of interactions, whatever its name."""
    header = re.split("[\n\r]", head, maxsplit=1)[0]
    rows = (header.split(delimiter) for delimiter in "\t,;")
    return any(_usual_columns(RECBOLE_TYPE.sub("", n.strip(' "')) for n in row) for row in rows)


def _group_interactions(
    path: Path, rows: Iterator[Row], columns: list[str], report: Report
) -> Iterator[Row]:
    """A row for each user, with the items by time; equal times stay in the order of the file."""
    user, item, *time = columns
    users: dict[str, tuple] = {}  # (first line, columns that never change, [(time, item), ...])
    for line, row in rows:
        try:
            key = _check_item(row.get(user), may_mask=True)
            moment = _to_time(row.get(time[0])) if time else 0
            event = (moment, _check_item(row.get(item), may_mask=True))
        except ValueError as error:
            report(UserError(f"{path}:{line}: {error}"))
            continue
        rest = {name: value for name, value in row.items() if name not in columns}
        first_line, constant, events = users.get(key, (line, rest, []))
        events.append(event)
        constant = {name: value for name, value in constant.items() if rest.get(name) == value}
        users[key] = (first_line, constant, events)
    for key, (line, constant, events) in users.items():
        times, items = zip(*sorted(events, key=itemgetter(0)), strict=True)
        yield line, constant | {"user": key, "times": times, item: list(items)}


def _to_time(value: Any) -> int | float:
    """Whole numbers stay whole: float32 would make most seconds of our epoch equal."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(str(value))
            if math.isfinite(number):
                return number
    raise ValueError(f"the time {value!r} is no number")


def _check_item(item: Any, may_mask: bool) -> str:
    """The name of an item; ValueError if it cannot be one."""
    if type(item) is int and 0 <= item <= LARGEST_ID:
        return str(item)
    special = [token for token in SPECIAL_TOKENS.values() if token in str(item)]
    if not isinstance(item, str):
        problem = f"no text and no whole number from 0 to {LARGEST_ID}"
    elif not item.strip() or SEPARATOR in item or len(item) > LONGEST_ITEM:
        problem = f"blank, longer than {LONGEST_ITEM} characters, or has the character U+001F"
    elif special and not (may_mask and special == [SPECIAL_TOKENS["mask"]]):
        problem = f"named like the special token {special[0]}"
    else:
        return item
    raise ValueError(f"the item {str(item)[:50]!r} is {problem}")


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
    by_count = sorted(counts, key=lambda item: (-counts[item], item))
    items = [item for item in by_count[: vocab_size - len(special)] if counts[item] >= min_count]
    if not items:
        raise UserError(f"no item occurs {min_count} times: choose a lower --min-count")
    n_rare = len(counts) - len(items)
    share = 1 - sum(counts[item] for item in items) / counts.total()
    rule = f"beyond the {vocab_size:,} of --vocab-size or rarer than --min-count {min_count}"
    print(f"{len(items):,} items; {n_rare:,} others, {share:.1%} of all tokens, are {rule}")
    vocab = {token: i for i, token in enumerate([*special, *items])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    tokenizer.decoder = decoders.Replace(Regex(r"\z"), SEPARATOR)  # after each item
    return add_cls_and_sep(tokenizer)
