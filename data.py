"""Tokens to masked batches: tokenizer, token cache, windows, masking, co-occurrence.

Axes: T tokens of a micro-batch, S its sequences, N its masked tokens.

A corpus is tokenized once and kept as one memory-mapped row of token ids, in a cache folder that is named by
a hash of the text and the tokenizer. A batch is a pure function of (seed, step, micro-batch), so a run can be
resumed without any state of an iterator, and ranks need not talk to share the work.
"""

import bisect
import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from files.disk import CACHE, UserError
from files.readers import LONGEST_DOCUMENT, find_files, read_documents, text_suffix
from files.reviews import fetch_reviews, load_reviews

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
TOKENIZER_SAMPLE = 10**8  # bytes of text that the tokenizer is trained on; more does not change its pieces
COOCCURRENCE_SAMPLE = 2 * 10**7  # tokens that the spectral start is counted on
COOCCURRENCE_REACH = 8  # tokens to each side
BAG_REACH = 1024  # tokens to each side of a window that count as its document, so that a book is no bag
VALIDATION_SHARE = 0.01
VALIDATION_MASKED = 0.15
CACHE_FORMAT = "3"  # part of every key: raised when the layout of the cache changes


# ----------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Lower-cased WordPiece. Accents and combining marks stay (stripping them wrecks Indic scripts); CJK
    characters are words of their own. The vocabulary may come out smaller where the text does not fill it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    characters = normalizers.BertNormalizer(clean_text=False, strip_accents=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), characters])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        limit_alphabet=(vocab_size - len(SPECIAL_TOKENS)) // 2,  # each letter comes as `x` and as `##x`
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # the trainer numbers its pieces in the order of a hash table, which differs from run to run
    pieces = sorted(tokenizer.get_vocab().keys() - set(SPECIAL_TOKENS.values()))
    vocab = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS.values(), *pieces])}
    tokenizer.model = models.WordPiece(vocab, unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=200)
    ends = [(token, tokenizer.token_to_id(token)) for token in (SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"])]
    tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of the special tokens, BERT's or RoBERTa's. Raises ValueError where one is missing."""
    is_roberta = tokenizer.token_to_id(ROBERTA_TOKENS["cls"]) is not None
    names = ROBERTA_TOKENS if is_roberta else SPECIAL_TOKENS
    if missing := [token for token in names.values() if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"no token {missing[0]}")
    return names


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of pad, unk, cls, sep and mask. Raises ValueError where the tokenizer lacks one."""
    return {name: tokenizer.token_to_id(token) for name, token in special_tokens(tokenizer).items()}


# ----------------------------------------------------------------------------------------- the token cache


def prepare(
    paths: list[str], vocab_size: int, explicit: bool = False, tokenizer: Tokenizer | None = None
) -> Path:
    """Tokenize a corpus once, into a folder of the cache with tokenizer.json, tokens.bin, lengths.bin,
    counts.npy and about.json.

    paths: files, folders, `-` for standard input; none for the training blocks of the default corpus.
    `explicit`: the user asked for this vocabulary size, so one that the text cannot fill is refused instead
    of shrunk. `tokenizer`: an earlier model's, by default one is trained on the text.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        if "-" in paths:  # read twice below, so it has to become a file
            with open(Path(work) / "stdin.txt", "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        digest = hashlib.sha256(f"{CACHE_FORMAT} {tokenizer.to_str() if tokenizer else vocab_size}".encode())
        files = find_files(str(Path(work) / "stdin.txt") if path == "-" else path for path in paths)
        for file in files or [fetch_reviews()]:
            try:
                with open(file, "rb") as handle:
                    digest.update(text_suffix(file).encode() + hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        folder = CACHE / f"tokens-{digest.hexdigest()[:16]}"
        if not folder.exists():
            documents = [lambda: (text for file in files for text in read_documents(file))]
            blocks = documents if files else _review_blocks()
            sample = min(1.0, TOKENIZER_SAMPLE / max(1, sum(file.stat().st_size for file in files)))
            _tokenize(Path(work) / "new", blocks, tokenizer or vocab_size, sample)
            os.sync()  # else a loss of power could leave a folder with a name and half of its files
            with contextlib.suppress(OSError):  # another process was first with the same content
                os.rename(Path(work) / "new", folder)
    size = json.loads((folder / "about.json").read_text())["vocab_size"]
    if explicit and size < vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: the text fills only {size}; ask for that or leave it")
    if size < vocab_size and tokenizer is None:
        print(f"vocabulary: {size:,} word pieces, all that this text fills of {vocab_size:,}", flush=True)
    return folder


def _review_blocks() -> list:
    blocks: dict[tuple[str, str], list[str]] = {}
    for name, split in load_reviews().items():
        for text, label in split["train"]:
            blocks.setdefault((name, label), []).append(text)
    return [lambda block=block: iter(block) for block in blocks.values()]


def _tokenize(folder: Path, blocks: list, tokenizer: Tokenizer | int, sample: float) -> None:
    """Two passes over the text: one trains the tokenizer on a sample of it, where only the size of its
    vocabulary is given, one writes the tokens."""
    folder.mkdir()
    if isinstance(tokenizer, int):
        print(f"training a tokenizer of {tokenizer:,} word pieces", flush=True)
        rng = np.random.default_rng(0)
        sampled = (text for block in blocks for text in block() if rng.random() < sample)
        tokenizer = train_tokenizer(sampled, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size, n_tokens, n_documents, bounds = tokenizer.get_vocab_size(), 0, 0, []
    counts = np.zeros(vocab_size, dtype=np.int64)
    dtype = token_dtype(vocab_size)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "lengths.bin", "wb") as lengths:
        for block in blocks:
            first = n_documents
            for text in tqdm(_batches(block()), "tokenizing", unit=" batches", disable=None, leave=False):
                encodings = tokenizer.encode_batch_fast(text, add_special_tokens=False)
                rows = [np.array(encoding.ids, dtype=dtype) for encoding in encodings if encoding.ids]
                if rows:
                    np.array([len(row) for row in rows], dtype=np.int32).tofile(lengths)
                    (row := np.concatenate(rows)).tofile(tokens)
                    counts += np.bincount(row, minlength=vocab_size)
                    n_tokens, n_documents = n_tokens + len(row), n_documents + len(rows)
            share = VALIDATION_SHARE if n_documents > first + 1 else 0
            n_validation = math.ceil(share * (n_documents - first))
            bounds.append([first, n_documents - n_validation, n_documents])
    if not n_tokens:
        raise UserError("the corpus has no text")
    np.save(folder / "counts.npy", counts)
    about = {"vocab_size": vocab_size, "n_tokens": n_tokens, "n_documents": n_documents, "blocks": bounds}
    (folder / "about.json").write_text(json.dumps(about))
    print(f"{n_tokens:,} tokens in {n_documents:,} documents", flush=True)


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == 1024 or size > LONGEST_DOCUMENT:
            yield batch
            batch, size = [], 0
    yield batch


# ------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """ids (T,) int64, cu_seqlens (S + 1,) int32; masked (N,) are the places to predict and targets (N,) what
    stood there; bag i, if there are any, is bag_ids[cu_bags[i] : cu_bags[i + 1]], its weights sum to 1."""

    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked: Tensor
    targets: Tensor
    bag_ids: Tensor | None = None
    bag_weights: Tensor | None = None
    cu_bags: Tensor | None = None
    key: list | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


@dataclass
class Windows:
    """Where each window stands in the row of tokens: its first token, its number of tokens, its document."""

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray

    def __getitem__(self, which) -> "Windows":
        return Windows(self.start[which], self.length[which], self.document[which])


class Corpus:
    """The windows of a prepared folder, and the batches made of them.

    Documents are cut evenly into windows of at most `max_len` tokens, [CLS] and [SEP] included. A micro-batch
    has exactly `row_tokens`: windows in the order of the epoch, the last one shortened. Raises
    UserError where the text is too short for one.
    """

    def __init__(self, folder: Path, max_len: int, row_tokens: int, seed: int, with_bags=False, rare=True):
        self.folder, self.max_len, self.row_tokens, self.seed = folder, max_len, row_tokens, seed
        self.with_bags = with_bags
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.special = special_ids(self.tokenizer)
        self.is_special = np.isin(np.arange(self.vocab_size), list(self.special.values()))
        self.tokens = np.memmap(folder / "tokens.bin", dtype=token_dtype(self.vocab_size), mode="r")
        self.document_ends = np.cumsum(np.fromfile(folder / "lengths.bin", dtype=np.int32), dtype=np.int64)
        about = json.loads((folder / "about.json").read_text())
        if not len(self.tokens) == self.document_ends[-1:].sum() == about["n_tokens"]:
            raise UserError(f"{folder}: it lacks some of its tokens; delete it, and it is made anew")
        self.train = self._cut(np.concatenate([np.arange(first, cut) for first, cut, _ in about["blocks"]]))
        self.held_out = self._cut(np.concatenate([np.arange(cut, last) for _, cut, last in about["blocks"]]))
        if not len(self.held_out.start):  # a single document: hold out its end
            cut = math.floor((1 - VALIDATION_SHARE) * len(self.train.start))
            self.train, self.held_out = self.train[:cut], self.train[cut:]
        n_tokens = int(self.train.length.sum()) + 2 * len(self.train.length)
        if n_tokens < row_tokens:
            raise UserError(
                f"the corpus has {n_tokens:,} tokens to train on, fewer than one batch of {row_tokens:,}: "
                "give it more text, or a smaller --micro-batch-tokens"
            )
        frequency = np.load(folder / "counts.npy") / len(self.tokens)
        # rare words say more about a document than frequent ones (design, section 4)
        self.word_weights = np.minimum(1, np.sqrt(1e-4 / np.maximum(frequency, 1e-12))).astype(np.float32)
        pieces = map(self.tokenizer.id_to_token, range(self.vocab_size))
        self.rare, self.begins_word = rare, np.array([not f"{piece}".startswith("##") for piece in pieces])
        self.first_rows, self.epoch = [0], (-1, None, None)

    def _cut(self, documents: np.ndarray) -> Windows:
        parts = []
        n_parts = math.ceil(len(documents) / 2**18) or 1  # to save memory
        for some in np.array_split(documents, n_parts):
            ends, starts = self.document_ends[some], np.where(some > 0, self.document_ends[some - 1], 0)
            n_pieces = -((starts - ends) // (self.max_len - 2))
            which, piece = _ranges(np.zeros_like(n_pieces), n_pieces)
            cut, after = (p * (ends - starts)[which] // n_pieces[which] for p in (piece, piece + 1))
            parts.append((starts[which] + cut, (after - cut).astype(np.int32), some[which].astype(np.int32)))
        return Windows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The order of the windows in an epoch, and where in it each row of `row_tokens` begins."""
        if self.epoch[0] != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.train.start))
            ends, begin, cuts = np.cumsum(self.train.length[order] + 2, dtype=np.int64), 0, [0]
            while (last := int(np.searchsorted(ends, begin + self.row_tokens))) < len(ends):
                begin = ends[last]
                cuts.append(last + 1)
            self.epoch = (epoch, order, cuts)
        return self.epoch[1:]

    def batch(self, step: int, micro: int, n_micro: int, mask_rate: float) -> Batch:
        """Micro-batch `micro` of the `n_micro` of a step: a pure function of these, the seed and the text."""
        row = step * n_micro + micro
        while row >= self.first_rows[-1]:
            self.first_rows.append(self.first_rows[-1] + len(self._epoch(len(self.first_rows) - 1)[1]) - 1)
        epoch = bisect.bisect_right(self.first_rows, row) - 1
        order, cuts = self._epoch(epoch)
        row -= self.first_rows[epoch]
        windows = self.train[order[cuts[row] : cuts[row + 1]]]
        windows.length[-1] -= windows.length.sum() + 2 * len(windows.length) - self.row_tokens
        while windows.length[-1] < 1:  # no room for a word between [CLS] and [SEP]: the longest makes some
            longest = int(windows.length.argmax())
            if windows.length[longest] < 2:
                raise UserError("nearly every document is one token: join lines to longer documents")
            windows.length[longest] -= 1
            windows.length[-1] += 1
        return self._assemble(windows, [self.seed, 1, step, micro], mask_rate, self.rare)

    def validation(self, n_batches: int) -> list[Batch]:
        """Fixed windows with fixed masks, evenly drawn, whatever the seed, so that curves of different runs
        can be compared."""
        rows = np.cumsum(self.held_out.length + 2) // self.row_tokens
        return [
            self._assemble(self.held_out[rows == row], [0, 2, row], VALIDATION_MASKED, False)
            for row in np.unique(rows)[:n_batches]
        ]

    def _assemble(self, windows: Windows, key: list[int], mask_rate: float, rare: bool) -> Batch:
        rng = np.random.default_rng(key)
        cu_seqlens = np.concatenate(([0], np.cumsum(windows.length + 2)))
        _, places = _ranges(windows.start - 1, windows.length + 2)
        ids = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        ids[cu_seqlens[:-1]], ids[cu_seqlens[1:] - 1] = self.special["cls"], self.special["sep"]

        # what is drawn: each token alike, or words by their rarest piece, of unspaced scripts a few pieces
        begins = np.flatnonzero(self.begins_word[ids] | (np.arange(len(ids)) % 16 == 0) | (not rare))
        rarity = np.maximum.reduceat(self.word_weights[ids], begins) if rare else 1
        # by weight: exponential times of these rates, the first ones (Efraimidis & Spirakis 2006)
        times = np.repeat(rng.exponential(size=len(begins)) / rarity, np.diff(begins, append=len(ids)))
        candidates = np.flatnonzero(~self.is_special[ids])
        drawn = candidates[np.argsort(times[candidates], kind="stable")]
        masked = rng.permutation(drawn[: max(1, int(mask_rate * len(ids)))])
        targets = ids[masked]  # copied, before anything is replaced
        n_mask, n_random = round(0.8 * len(masked)), round(0.1 * len(masked))
        ids[masked[:n_mask]] = self.special["mask"]
        ids[masked[n_mask : n_mask + n_random]] = rng.choice(np.flatnonzero(~self.is_special), n_random)

        return Batch(
            ids=torch.from_numpy(ids),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=self.max_len,
            masked=torch.from_numpy(masked),
            targets=torch.from_numpy(targets),
            **(self._bags(windows) if self.with_bags else {}),
        )

    def _bags(self, windows: Windows) -> dict[str, Tensor]:
        first = np.where(windows.document > 0, self.document_ends[windows.document - 1], 0)
        first = np.maximum(first, windows.start - BAG_REACH)
        last = np.minimum(self.document_ends[windows.document], windows.start + windows.length + BAG_REACH)
        of_window, words = _ranges(first, last - first)
        bag_ids = self.tokens[words].astype(np.int64)
        bag_weights = self.word_weights[bag_ids]
        bag_weights /= np.bincount(of_window, bag_weights)[of_window]
        cu_bags = np.concatenate(([0], np.cumsum(last - first)))
        parts = {"bag_ids": bag_ids, "bag_weights": bag_weights, "cu_bags": cu_bags}
        return {name: torch.from_numpy(part) for name, part in parts.items()}

    def cooccurrence(self) -> scipy.sparse.csr_array:
        """How often two tokens stand within COOCCURRENCE_REACH of each other in a document, weighted by
        1/distance: (vocab_size, vocab_size), symmetric, counted on an even sample of the training windows."""
        counts = scipy.sparse.csr_array((self.vocab_size, self.vocab_size), dtype=np.float32)
        chunks = np.array_split(np.arange(len(self.train.start)), math.ceil(self.train.length.sum() / 2**20))
        for chunk in chunks[:: math.ceil(len(chunks) * 2**20 / COOCCURRENCE_SAMPLE)]:
            windows = self.train[chunk]
            which, places = _ranges(windows.start, windows.length)
            tokens, document = self.tokens[places].astype(np.int32), windows.document[which]
            for distance in range(1, COOCCURRENCE_REACH + 1):
                same = document[distance:] == document[:-distance]
                pair = (tokens[:-distance][same], tokens[distance:][same])
                weight = np.full(len(pair[0]), 1 / distance, dtype=np.float32)
                counts += scipy.sparse.coo_array((weight, pair), shape=counts.shape).tocsr()
        return counts + counts.T

    def spectral_embedding(self, d_model: int) -> np.ndarray:
        """(vocab_size, d_model) float32: the first components of the positive pointwise mutual information of
        words and their contexts, times the square root of the singular values; cached beside the tokens.

        Levy & Goldberg 2014 (what word2vec converges to); context counts to the power .75 as in Levy,
        Goldberg & Dagan 2015, section 3.2. Columns that the vocabulary is too small for are zero.
        """
        path = self.folder / f"spectral-{d_model}.npy"
        if not path.exists():
            from sklearn.utils.extmath import randomized_svd  # takes a second to import, needed once a corpus

            print("counting co-occurrences for the spectral start", flush=True)
            counts = self.cooccurrence().tocoo()
            words, contexts = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
            contexts = contexts**0.75 / (contexts**0.75).sum()
            pmi = np.log(counts.data / (words[counts.row] * contexts[counts.col]))
            matrix = scipy.sparse.csr_array((np.maximum(pmi, 0), (counts.row, counts.col)), counts.shape)
            rank = min(d_model, self.vocab_size - 1)
            u, s, _ = randomized_svd(matrix, rank, n_iter=4, random_state=0)
            embedding = np.zeros((self.vocab_size, d_model), dtype=np.float32)
            embedding[:, :rank] = u * np.sqrt(s)
            embedding[words == 0] = 0  # of tokens that never occurred the SVD leaves rounding errors
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                np.save(file, embedding)
            os.sync()  # as in `prepare`
            os.replace(file.name, path)
        return np.load(path)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, starts[i] + j) for every i and every j < lengths[i], laid end to end."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(which)) - np.repeat(np.cumsum(lengths, dtype=np.int64) - lengths, lengths)
    return which, starts[which] + within
