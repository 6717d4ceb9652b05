"""Token cache to masked batches: windows, order, masks, and the spectral embedding.

Axes: T tokens of a micro-batch (a row of an epoch), S its sequences, N masked, V vocabulary.

A batch is a pure function of (seed, step, micro-batch): a resumed run needs no state of an
iterator, and ranks share the work without communicating. files/token_cache.py turns text into the
tokens that are read here.
"""

import bisect
import hashlib
import inspect
import itertools
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from tokenizers import Tokenizer
from torch import Tensor

from files import streams
from files.disk import UserError, using_cache
from files.token_cache import token_dtype
from files.tokenizer import begins_word, ends_word, special_ids
from kernels.graphs import pad_sequences

VALIDATION_SHARE = 0.01  # of the tokens of each part of the corpus
VALIDATION_TOKENS = 65_536
VALIDATION_CHUNK = 8192  # tokens of a validation batch, whatever --micro-batch-tokens is
VALIDATION_MASK_RATE = 0.15  # evenly drawn: not comparable with the loss of --mask rare
RARE_FREQUENCY = 1e-4  # words below this frequency all count as equally rare
LONGEST_WORD = 16  # tokens masked together; scripts without spaces make "words" of a whole line
COOCCURRENCE_SAMPLE = 2 * 10**7  # tokens that the spectral embedding is counted on
COOCCURRENCE_REACH = 8  # tokens to each side
CONTEXT_POWER = 0.75  # smooths context counts (Levy, Goldberg & Dagan 2015, section 3.2)


class Batch(NamedTuple):
    """One micro-batch of unpadded windows, derived from `key`.

    Randomness inside a loss comes from `generator`, so that a resumed run repeats it.
    """

    ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S + 1,) int32, where each window starts
    max_seqlen: int  # at least the length of the longest window
    masked: Tensor  # (N,) positions to predict
    targets: Tensor  # (N,) the tokens that stood there
    key: tuple[int, ...] = ()  # seed, stream (files/streams.py), number of the batch

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. On CUDA empty sequences follow: a loss per sequence drops them."""
        batch = self
        pins = device.type == "cuda"  # memory that the GPU reads while Python goes on
        if pins:
            batch = self._replace(cu_seqlens=pad_sequences(self.cu_seqlens))
            batch = Batch(*(x.pin_memory() if isinstance(x, Tensor) else x for x in batch))
        moved = (x.to(device, non_blocking=pins) if isinstance(x, Tensor) else x for x in batch)
        return Batch(*moved)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A random generator that depends only on seed, step and micro-batch."""
        state = np.random.SeedSequence([*self.key, streams.LOSS]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(state[0] >> 1))


@dataclass
class Windows:
    """Pieces of documents: the first token and the number of tokens of each."""

    start: np.ndarray
    length: np.ndarray

    def __getitem__(self, index: Any) -> "Windows":
        return Windows(self.start[index], self.length[index])

    def __len__(self) -> int:
        return len(self.start)


class Corpus:
    """The windows of a tokenized corpus, and the batches made of them.

    Documents are cut evenly into windows of at most `max_len` tokens, [CLS] and [SEP] included.

    Args:
        folder: what `prepare` returned.
        max_len: tokens of a window.
        micro_batch_tokens: T, the exact number of tokens of every training batch.
        seed: of the order of windows and of the masks.
        mask: "rare" masks whole words, rare ones more often; "even" masks all tokens alike.

    Raises:
        UserError: the token cache is damaged, the text is shorter than one batch, or words are to
            be masked and the tokenizer does not mark where they begin.
    """

    def __init__(
        self, folder: Path, max_len: int, micro_batch_tokens: int, seed: int, mask: str = "rare"
    ):
        self.folder = folder
        self.max_len = max_len
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.vocab_size = self.tokenizer.get_vocab_size()
            dtype = token_dtype(self.vocab_size)
            self.tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
            lengths = np.fromfile(folder / "lengths.bin", dtype=np.int32)
            self.counts = np.load(folder / "counts.npy")
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            part_ends = about["part_ends"]
            is_whole = len(self.tokens) == lengths.sum() == self.counts.sum() == about["n_tokens"]
        except Exception:  # each file is read by another library
            is_whole = False
        if not is_whole:
            problem = "this token cache is damaged or of another version"
            raise UserError(f"{folder}: {problem}; delete the folder, and it is written again")
        self.special = special_ids(self.tokenizer)
        self.is_special = np.isin(np.arange(self.vocab_size), list(self.special.values()))
        self.document_ends = np.cumsum(lengths, dtype=np.int64)
        windows = self._cut_documents()
        is_held_out = _last_of_each_part(windows, part_ends)
        if is_held_out.all():
            advice = "give it more text, or a lower --max-len"
            raise UserError(f"the corpus is a single window: {advice}")
        self.train = windows[~is_held_out]
        self.held_out = windows[is_held_out]
        n_tokens = int(self.train.length.sum()) + 2 * len(self.train)
        if n_tokens < micro_batch_tokens:
            raise UserError(
                f"the corpus has {n_tokens:,} tokens to train on, fewer than one batch of "
                f"{micro_batch_tokens:,}: give it more text, or a smaller --micro-batch-tokens"
            )

        if mask not in ("rare", "even"):
            raise ValueError(f"mask {mask!r} is neither rare nor even")
        self.rarity = None  # of each token of the vocabulary; None masks all tokens alike
        if mask == "rare":
            frequency = self.counts / len(self.tokens)
            self.rarity = np.minimum(1, np.sqrt(RARE_FREQUENCY / np.maximum(frequency, 1e-12)))
            try:
                self.begins_word = begins_word(self.tokenizer)
            except ValueError as error:
                raise UserError(f"--mask rare: {error}; use --mask even") from None
            self.ends_word = ends_word(self.tokenizer)
        self.first_rows = [0]  # the number of the first row of each epoch
        self.epoch = -1  # the epoch of `order` and `cuts`; none yet

    def _cut_documents(self) -> Windows:
        """Cut documents evenly into windows."""
        starts = np.concatenate(([0], self.document_ends[:-1]))
        lengths = self.document_ends - starts
        n_windows = -(-lengths // (self.max_len - 2))
        which, i = _ranges(np.zeros_like(n_windows), n_windows)  # window i of document `which`
        begin = i * lengths[which] // n_windows[which]
        end = (i + 1) * lengths[which] // n_windows[which]
        return Windows(starts[which] + begin, (end - begin).astype(np.int32))

    def _start_epoch(self, epoch: int) -> int:
        """Shuffle the windows and cut them into rows of T tokens; returns the number of rows."""
        if self.epoch != epoch:
            self.epoch = epoch
            rng = np.random.default_rng([self.seed, streams.WINDOW_ORDER, epoch])
            self.order = rng.permutation(len(self.train))
            ends = np.cumsum(self.train.length[self.order] + 2, dtype=np.int64)
            self.cuts = [0]
            row_start = 0
            while True:
                last = int(np.searchsorted(ends, row_start + self.micro_batch_tokens))
                if last >= len(ends):  # what is left of the epoch does not fill a row
                    break
                row_start = ends[last]
                self.cuts.append(last + 1)
        return len(self.cuts) - 1

    def batch(self, step: int, micro: int, n_micro: int, mask_rate: float) -> Batch:
        """A training batch: a pure function of its arguments, the seed and the text.

        Args:
            step: from 0.
            micro: number of the micro-batch in the step, over all ranks.
            n_micro: micro-batches of each step, over all ranks; a constant.
            mask_rate: share of the tokens that are masked.
        """
        row = step * n_micro + micro
        while row >= self.first_rows[-1]:
            n_rows = self._start_epoch(len(self.first_rows) - 1)
            self.first_rows.append(self.first_rows[-1] + n_rows)
        epoch = bisect.bisect_right(self.first_rows, row) - 1
        self._start_epoch(epoch)
        row -= self.first_rows[epoch]
        windows = self.train[self.order[self.cuts[row] : self.cuts[row + 1]]]

        # the last window of this copy is shortened so that the row has exactly T tokens
        windows.length[-1] -= windows.length.sum() + 2 * len(windows) - self.micro_batch_tokens
        while windows.length[-1] < 1:  # no room for a token between [CLS] and [SEP]
            longest = int(windows.length.argmax())
            if windows.length[longest] < 2:
                problem = "nearly every document is one token"
                raise UserError(f"{problem}; join lines into longer documents")
            windows.length[longest] -= 1
            windows.length[-1] += 1
        key = (self.seed, streams.TRAINING_MASKS, step, micro)
        return self._assemble(windows, key, mask_rate, self.rarity)

    def validation_batches(self) -> list[Batch]:
        """Fixed windows from all parts of the corpus with fixed, evenly drawn masks.

        They are the same for every run on the corpus with the same `max_len`, whatever its seed,
        --mask, --mask-rate and --micro-batch-tokens. metrics.json has their hash.
        """
        order = np.random.default_rng(0).permutation(len(self.held_out))
        windows = self.held_out[order]
        chunk = np.cumsum(windows.length + 2, dtype=np.int64) // VALIDATION_CHUNK
        key = (0, streams.VALIDATION_MASKS)
        return [
            self._assemble(windows[chunk == i], (*key, int(i)), VALIDATION_MASK_RATE, None)
            for i in np.unique(chunk)[: VALIDATION_TOKENS // VALIDATION_CHUNK]
        ]

    def _assemble(
        self, windows: Windows, key: tuple[int, ...], mask_rate: float, rarity: np.ndarray | None
    ) -> Batch:
        """Lay windows end to end, and mask them."""
        rng = np.random.default_rng(key)
        cu_seqlens = np.concatenate(([0], np.cumsum(windows.length + 2)))
        # the tokens before and after each window give their places to [CLS] and [SEP]
        _, positions = _ranges(windows.start - 1, windows.length + 2)
        ids = self.tokens[np.clip(positions, 0, len(self.tokens) - 1)].astype(np.int64)  # (T,)
        ids[cu_seqlens[:-1]] = self.special["cls"]
        ids[cu_seqlens[1:] - 1] = self.special["sep"]

        n_masked = max(1, int(mask_rate * len(ids)))
        candidates = np.flatnonzero(~self.is_special[ids])
        if rarity is None:
            masked = rng.permutation(candidates)[:n_masked]
        else:
            masked = self._draw_words(ids, candidates, rarity, rng)[:n_masked]
            # words are together, the rarest first, and only some will become [MASK]
            masked = rng.permutation(masked)
        targets = ids[masked]  # copied before anything is replaced

        # 80% become [MASK], 10% a random token, 10% stay (Devlin et al. 2018, section 3.1)
        n_mask = round(0.8 * len(masked))
        n_random = round(0.1 * len(masked))
        ids[masked[:n_mask]] = self.special["mask"]
        ordinary = np.flatnonzero(~self.is_special)
        ids[masked[n_mask : n_mask + n_random]] = rng.choice(ordinary, n_random)
        return Batch(
            ids=torch.from_numpy(ids),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=self.max_len,
            masked=torch.from_numpy(masked),
            targets=torch.from_numpy(targets),
            key=key,
        )

    def _draw_words(
        self, ids: np.ndarray, candidates: np.ndarray, rarity: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """All candidates in a random order that keeps words together and favours rare words.

        Words are drawn without replacement, by weights: each waits an exponential time of rate
        `weight`, and the shortest come first (Efraimidis & Spirakis 2006). A word is as rare as its
        rarest token.
        """
        starts = word_starts(ids, self.begins_word, self.ends_word)
        weights = np.maximum.reduceat(rarity[ids], starts)  # (words,)
        times = rng.exponential(size=len(starts)) / weights
        times = np.repeat(times, np.diff(starts, append=len(ids)))  # (T,)
        return candidates[np.argsort(times[candidates], kind="stable")]

    def sample_texts(self, n_windows: int, seed: int) -> list[str]:
        """Decode windows of the training text, drawn with the seed."""
        rng = np.random.default_rng([seed, streams.TEXT_SAMPLE])
        sample = rng.permutation(len(self.train))[:n_windows]
        windows = self.train[np.sort(sample)]
        ends = windows.start + windows.length
        spans = zip(windows.start.tolist(), ends.tolist(), strict=True)
        return self.tokenizer.decode_batch([self.tokens[a:b].tolist() for a, b in spans])

    # ------------------------------------------------------------------------- spectral embedding

    def cooccurrence(self) -> scipy.sparse.csr_array:
        """How often two tokens stand near each other in a window, (V, V), symmetric.

        Each pair counts 1 / distance, up to COOCCURRENCE_REACH, on an even sample of the windows.
        """
        counts = scipy.sparse.csr_array((self.vocab_size, self.vocab_size), dtype=np.float32)
        n_chunks = math.ceil(self.train.length.sum() / 2**20)
        every = math.ceil(n_chunks * 2**20 / COOCCURRENCE_SAMPLE)
        for chunk in np.array_split(np.arange(len(self.train)), n_chunks)[::every]:
            windows = self.train[chunk]
            which, positions = _ranges(windows.start, windows.length)
            tokens = self.tokens[positions].astype(np.int32)
            for distance in range(1, COOCCURRENCE_REACH + 1):
                same = which[distance:] == which[:-distance]  # window
                pairs = (tokens[:-distance][same], tokens[distance:][same])
                weights = np.full(len(pairs[0]), 1 / distance, dtype=np.float32)
                counts += scipy.sparse.coo_array((weights, pairs), shape=counts.shape).tocsr()
        return counts + counts.T

    def initial_embedding(self, d_model: int, std: float, seed: int) -> tuple[Tensor, Tensor]:
        """The spectral embedding, rotated and scaled to be the embedding of a new model.

        The rotation is random, so that no dimension holds a leading component.

        Returns:
            vectors (V, d_model) of standard deviation `std`, and which tokens occur, (V,) bool;
            the vectors of the others are zero.
        """
        vectors = torch.from_numpy(self.spectral_embedding(d_model))
        occurs = vectors.norm(dim=1) > 0
        generator = torch.Generator().manual_seed(seed)
        rotation, _ = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))
        return vectors @ rotation * (std / vectors[occurs].std()), occurs

    @using_cache()
    def spectral_embedding(self, d_model: int) -> np.ndarray:
        """Word vectors from the co-occurrences of the corpus, (V, d_model) float32.

        They are the leading singular vectors of the positive pointwise mutual information of
        tokens and contexts, times the square root of the singular values (Levy & Goldberg 2014:
        what word2vec converges to). Columns that the vocabulary is too small for are zero, and so
        are the rows of tokens that never occurred. Cached beside the tokens, under a name that
        changes with the windows, the constants and the code of the factorization.
        """
        source = inspect.getsource(Corpus.cooccurrence) + inspect.getsource(spectral_vectors)
        constants = (d_model, COOCCURRENCE_SAMPLE, COOCCURRENCE_REACH, CONTEXT_POWER)
        key = hashlib.sha256(f"{source} {constants}".encode())
        key.update(self.train.start.tobytes() + self.train.length.tobytes())
        path = self.folder / f"spectral-{key.hexdigest()[:16]}.npy"
        if not path.exists():
            print("counting co-occurrences for the spectral embedding", flush=True)
            vectors = spectral_vectors(self.cooccurrence(), d_model)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                np.save(file, vectors)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
        return np.load(path)


def _last_of_each_part(windows: Windows, part_ends: list[int]) -> np.ndarray:
    """Which windows are for validation, (windows,) bool: the last VALIDATION_SHARE of the tokens
    of each part, at least one window; `part_ends` are in tokens."""
    is_last = np.zeros(len(windows), dtype=bool)
    for start, end in itertools.pairwise([0, *part_ends]):
        if start == end:  # an empty file
            continue
        in_part = slice(*np.searchsorted(windows.start, [start, end]))
        n_left = np.cumsum(windows.length[in_part][::-1])[::-1]  # tokens from a window on
        is_last[in_part] = n_left <= max(n_left[-1], VALIDATION_SHARE * n_left[0])
    return is_last


def spectral_vectors(counts: scipy.sparse.csr_array, d_model: int) -> np.ndarray:
    """Factor the positive pointwise mutual information of co-occurrence counts (V, V)."""
    from sklearn.utils.extmath import randomized_svd  # a second to import, needed once per corpus

    counts = counts.tocoo()
    n_words = counts.shape[0]
    words = np.asarray(counts.sum(1)).ravel()
    contexts = np.asarray(counts.sum(0)).ravel() ** CONTEXT_POWER
    contexts = contexts / contexts.sum()
    pmi = np.log(counts.data / (words[counts.row] * contexts[counts.col]))
    positive = scipy.sparse.csr_array((np.maximum(pmi, 0), (counts.row, counts.col)), counts.shape)

    rank = min(d_model, n_words - 1)
    u, s, _ = randomized_svd(positive, rank, n_iter=4, random_state=0)
    vectors = np.zeros((n_words, d_model), dtype=np.float32)
    vectors[:, :rank] = u * np.sqrt(s)
    vectors[words == 0] = 0  # the SVD leaves rounding errors there
    return vectors


def word_starts(ids: np.ndarray, begins_word: np.ndarray, ends_word: np.ndarray) -> np.ndarray:
    """The positions in a row of tokens at which words begin.

    The rest of a word at the start of a window is not joined to [CLS]. Words longer than
    LONGEST_WORD are cut.

    Args:
        ids: (T,).
        begins_word: (V,) bool.
        ends_word: (V,) bool, true of special tokens.
    """
    starts = begins_word[ids]
    starts[1:] |= ends_word[ids[:-1]]
    starts[0] = True
    position = np.arange(len(ids))
    start_of_word = np.maximum.accumulate(np.where(starts, position, 0))  # (T,)
    return np.flatnonzero((position - start_of_word) % LONGEST_WORD == 0)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, starts[i] + j) for every i and every j < lengths[i], laid end to end."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    within = np.arange(len(which)) - np.repeat(first, lengths)
    return which, starts[which] + within
