"""A corpus as one row of token ids on disk, tokenized once.

A folder of the cache is named by a hash of the text and the tokenizer, and holds tokenizer.json,
tokens.bin (all documents end to end), lengths.bin (tokens of each document), counts.npy (how often
each token occurs) and about.json.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from files.disk import CACHE, UserError, to_json, using_cache, write_file
from files.readers import TABLES, find_files, open_bytes, read_documents, table_format
from files.reviews import fetch_reviews, load_reviews
from files.sequences import is_sequence, make_item_tokenizer, reads_items
from files.tokenizer import TRAINERS

TOKENIZER_SAMPLE = 10**8  # bytes the tokenizer is trained on; more do not change its vocabulary
BATCH = 64  # documents that are tokenized at once; a longest one takes 20 MB
CACHE_FORMAT = "5"  # part of every key: raised when the layout of the cache changes


@using_cache()
def prepare(
    paths: list[str],
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    text_column: str | None = None,
    min_count: int = 1,
    kind: str = "wordpiece",
    cased: bool = False,
) -> Path:
    """Tokenize a corpus once, and return its folder of the cache.

    Args:
        paths: files, folders, "-" for standard input; empty for the default corpus.
        vocab_size: of a tokenizer that is trained on the text, if the text fills it.
        tokenizer: that of an earlier model, used instead of a new one.
        text_column: of the tables among the files, see `read_documents`.
        min_count: how often an item of sequences must occur to be in the vocabulary.
        kind, cased: of a new tokenizer of text, a key of TRAINERS, and whether it keeps capitals.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    if "-" in paths:  # a corpus is read more than once, so it has to be a file
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            stdin_file = Path(work) / "stdin.txt"
            with open(stdin_file, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            paths = [str(stdin_file) if path == "-" else path for path in paths]
            return prepare(paths, vocab_size, tokenizer, text_column, min_count, kind, cased)

    files = find_files(paths)
    if text_column and not any(map(table_format, files)):
        raise UserError(f"--text-column {text_column}: it belongs to a --corpus of {TABLES}")

    # a fork that trains another tokenizer must not find the tokens of the old one
    trainers = (TRAINERS[kind], make_item_tokenizer)
    source = tokenizer.to_str() if tokenizer else "".join(map(inspect.getsource, trainers))
    settings = f"{vocab_size} {text_column} {min_count} {cased} {source}"
    key = _digest(files or [fetch_reviews()], settings)
    folder = CACHE / f"tokens-{key}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            if tokenizer is None:
                documents = itertools.chain.from_iterable(_read_parts(files, text_column))
                share = TOKENIZER_SAMPLE / max(1, sum(file.stat().st_size for file in files))
                train = functools.partial(TRAINERS[kind], vocab_size=vocab_size, cased=cased)
                tokenizer = _new_tokenizer(documents, share, train, vocab_size, min_count)
            _write_tokens(Path(work) / "new", _read_parts(files, text_column), tokenizer)
            with contextlib.suppress(OSError):  # another process wrote the same content first
                os.rename(Path(work) / "new", folder)
    return folder


def _digest(files: list[Path], source: str) -> str:
    """A hash of everything that decides what is cached."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {source}".encode())
    for file in files:
        digest.update(str(table_format(file)).encode())  # not its name: it may be renamed
        with open_bytes(file) as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _read_parts(files: list[Path], text_column: str | None) -> list[Iterable[str]]:
    """All documents of files; without files, those of each collection and class of the reviews."""
    if files:
        return [itertools.chain.from_iterable(read_documents(f, text_column) for f in files)]
    texts: dict[tuple[str, str], list[str]] = {}
    for name, splits in load_reviews().items():
        for text, label in splits["train"]:
            texts.setdefault((name, label), []).append(text)
    return list(texts.values())


def _new_tokenizer(
    documents: Iterator[str], share: float, train: Callable, vocab_size: int, min_count: int
) -> Tokenizer:
    """The items of sequences, or what `train` makes of a share of the documents."""
    first = next(documents, "")
    documents = itertools.chain([first], documents)
    if is_sequence(first):
        return make_item_tokenizer(documents, vocab_size, min_count)
    print(f"training a tokenizer of up to {vocab_size:,} word pieces", flush=True)
    rng = np.random.default_rng(0)
    return train(text for text in documents if rng.random() < share)


def _write_tokens(folder: Path, parts: list[Iterable[str]], tokenizer: Tokenizer) -> None:
    folder.mkdir()
    vocab_size = tokenizer.get_vocab_size()
    of_items = reads_items(tokenizer)
    counts = np.zeros(vocab_size, dtype=np.int64)
    n_documents = 0
    part_ends = []  # in tokens
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "lengths.bin", "wb") as lengths:
        for part in parts:
            documents = iter(tqdm(part, "tokenizing", unit=" documents", disable=None, leave=False))
            while texts := list(itertools.islice(documents, BATCH)):
                if any(is_sequence(text) != of_items for text in texts):
                    raise UserError("the corpus, or it and --model, mix text and sequences")
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                rows = [encoding.ids for encoding in encodings if encoding.ids]
                ids = np.array(list(itertools.chain(*rows)), token_dtype(vocab_size))
                tokens.write(ids)
                lengths.write(np.array([len(row) for row in rows], dtype=np.int32))
                counts += np.bincount(ids, minlength=vocab_size)
                n_documents += len(rows)
            part_ends.append(int(counts.sum()))
        for file in (tokens, lengths):  # on the disk before the folder gets its name
            file.flush()
            os.fsync(file.fileno())

    n_tokens = int(counts.sum())
    if not n_tokens:
        raise UserError("the corpus has no text")
    np.save(folder / "counts.npy", counts)
    write_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_file(folder / "about.json", to_json({"n_tokens": n_tokens, "part_ends": part_ends}))
    sizes = f"{n_tokens:,} tokens in {n_documents:,} documents"
    kind = "items" if of_items else "word pieces"
    print(f"{sizes}; vocabulary: {vocab_size:,} {kind}", flush=True)


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
