"""A corpus as one row of token ids on disk, tokenized once.

A folder of the cache is named by a hash of the text and the tokenizer, and holds tokenizer.json,
tokens.bin (all documents end to end), lengths.bin (tokens of each document), counts.npy (how often
each token occurs) and about.json.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from files.disk import CACHE, UserError, to_json, write_file
from files.readers import LONGEST_DOCUMENT, find_files, read_documents, text_suffix
from files.reviews import fetch_reviews, load_reviews
from files.tokenizer import train_tokenizer

TOKENIZER_SAMPLE = 10**8  # bytes the tokenizer is trained on; more do not change its vocabulary
VALIDATION_SHARE = 0.01  # of the documents of each part of the corpus
CACHE_FORMAT = "4"  # part of every key: raised when the layout of the cache changes

Documents = Callable[[], Iterator[str]]  # starts a new pass over the documents of one part


def prepare(
    paths: list[str],
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    allow_smaller: bool = True,
) -> Path:
    """Tokenize a corpus once.

    Args:
        paths: files, folders, "-" for standard input; empty for the training part of the default
            corpus.
        vocab_size: of a tokenizer that is trained on the text.
        tokenizer: that of an earlier model, used instead of a new one.
        allow_smaller: accept a smaller vocabulary where the text does not fill `vocab_size`.

    Returns:
        A folder of the cache, with tokenizer.json, tokens.bin, lengths.bin, counts.npy and
        about.json.

    Raises:
        UserError: the text cannot be read, is empty, or cannot fill the vocabulary.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    is_new = tokenizer is None
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        if "-" in paths:  # a corpus is read more than once, so it has to be a file
            stdin_file = Path(work) / "stdin.txt"
            with open(stdin_file, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            paths = [str(stdin_file) if path == "-" else path for path in paths]
        files = find_files(paths)

        # a fork that trains another tokenizer must not find the tokens of the old one
        source = f"{vocab_size} {inspect.getsource(train_tokenizer)}"
        if tokenizer:
            source = tokenizer.to_str()
        folder = CACHE / f"tokens-{_digest(files or [fetch_reviews()], source)}"
        if not folder.exists():
            parts = [lambda: _read_all(files)] if files else _review_parts()
            if tokenizer is None:
                tokenizer = _train_on_sample(parts, files, vocab_size)
            _write_tokens(Path(work) / "new", parts, tokenizer)
            with contextlib.suppress(OSError):  # another process wrote the same content first
                os.rename(Path(work) / "new", folder)

    n_pieces = json.loads((folder / "about.json").read_text())["vocab_size"]
    if is_new and n_pieces < vocab_size:
        if not allow_smaller:
            raise UserError(
                f"--vocab-size {vocab_size}: the text fills only {n_pieces}; "
                "ask for that or leave it"
            )
        print(
            f"vocabulary: {n_pieces:,} word pieces, all that this text fills of {vocab_size:,}",
            flush=True,
        )
    return folder


def _digest(files: list[Path], source: str) -> str:
    """A hash of everything that decides what is cached."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {source}".encode())
    for file in files:
        try:
            with open(file, "rb") as handle:
                content = hashlib.file_digest(handle, "sha256").digest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        digest.update(text_suffix(file).encode() + content)
    return digest.hexdigest()[:16]


def _read_all(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield from read_documents(file)


def _review_parts() -> list[Documents]:
    """The training part of the default corpus, one part per collection and class."""
    texts: dict[tuple[str, str], list[str]] = {}
    for name, splits in load_reviews().items():
        for text, label in splits["train"]:
            texts.setdefault((name, label), []).append(text)
    return [lambda part=part: iter(part) for part in texts.values()]


def _train_on_sample(parts: list[Documents], files: list[Path], vocab_size: int) -> Tokenizer:
    print(f"training a tokenizer of {vocab_size:,} word pieces", flush=True)
    n_bytes = sum(file.stat().st_size for file in files)
    share = min(1.0, TOKENIZER_SAMPLE / max(1, n_bytes))
    rng = np.random.default_rng(0)
    sample = (text for part in parts for text in part() if rng.random() < share)
    return train_tokenizer(sample, vocab_size)


def _write_tokens(folder: Path, parts: list[Documents], tokenizer: Tokenizer) -> None:
    """Write the token ids of all documents end to end, and the length of each document.

    The last documents of each part are for validation, so that every part is validated on.
    """
    folder.mkdir()
    vocab_size = tokenizer.get_vocab_size()
    dtype = token_dtype(vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    n_documents = 0
    bounds = []  # of each part: its first document, its first validation document, its end
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "lengths.bin", "wb") as lengths:
        for part in parts:
            first = n_documents
            batches = tqdm(
                _batches(part()), "tokenizing", unit=" batches", disable=None, leave=False
            )
            for texts in batches:
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                documents = [np.array(e.ids, dtype=dtype) for e in encodings if e.ids]
                for document in documents:
                    document.tofile(tokens)
                    counts += np.bincount(document, minlength=vocab_size)
                np.array([len(d) for d in documents], dtype=np.int32).tofile(lengths)
                n_documents += len(documents)
            n_in_part = n_documents - first
            n_validation = math.ceil(VALIDATION_SHARE * n_in_part) if n_in_part > 1 else 0
            bounds.append([first, n_documents - n_validation, n_documents])
        for file in (tokens, lengths):  # on the disk before the folder gets its name
            file.flush()
            os.fsync(file.fileno())

    n_tokens = int(counts.sum())
    if not n_tokens:
        raise UserError("the corpus has no text")
    np.save(folder / "counts.npy", counts)
    write_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    about = {"vocab_size": vocab_size, "n_tokens": n_tokens, "parts": bounds}
    write_file(folder / "about.json", to_json(about))
    print(f"{n_tokens:,} tokens in {n_documents:,} documents", flush=True)


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents for the tokenizer, bounded in number and in characters."""
    batch: list[str] = []
    n_characters = 0
    for text in documents:
        batch.append(text)
        n_characters += len(text)
        if len(batch) == 1024 or n_characters > LONGEST_DOCUMENT:
            yield batch
            batch = []
            n_characters = 0
    yield batch
