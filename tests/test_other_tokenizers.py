"""Tokenizers of other kinds and of others: special tokens by role, whole words, and equal ids."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import SMALL, sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import finetune
import predict
import train
from data import Corpus
from files import model_folder
from files.disk import UserError
from files.other_tokenizers import open_tokenizer
from files.token_cache import prepare
from files.tokenizer import begins_word, ends_word, special_ids, special_tokens

SCRIPTS = {  # Latin, Greek, Cyrillic, Arabic, Devanagari, Thai, Han, Hangul
    *("0041-024f", "0386-03ff", "0400-045f", "0620-0660", "0904-0963", "0e01-0e5b"),
    *("4e00-4f00", "ac00-ad00"),
}


def lines_of_all_scripts(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    lines = []
    for script in sorted(SCRIPTS):
        low, high = (int(code, 16) for code in script.split("-"))
        letters = [chr(i) for i in range(low, high) if unicodedata.category(chr(i))[0] in "LMN"]
        for _ in range(n // len(SCRIPTS)):
            words = ["".join(rng.choice(letters, rng.integers(1, 7))) for _ in range(8)]
            extra = rng.choice(["", "!", "  x", "\U0001f600", "[MASK]", "</s>", "\tIf (x==1):"])
            lines.append(" ".join(words) + str(extra))
    return lines


def check_equal_ids(folder, lines):
    from transformers import AutoTokenizer

    tokenizer = model_folder.read_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for line, encoding in zip(lines, tokenizer.encode_batch(lines), strict=True):
        assert encoding.ids == theirs(line).input_ids, line
    ids = special_ids(tokenizer)
    assert {role: getattr(theirs, f"{role}_token_id") for role in ids} == ids
    return tokenizer


def train_on(corpus_file, out, *flags):
    small = ["--steps", "1", "--layers", "1", "--d-model", "64", "--dtype", "float32", *SMALL]
    train.main(["--corpus", str(corpus_file), "--out", str(out), *small, *map(str, flags)])
    return out


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(lines_of_all_scripts(160) + sentences(300, 5)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ("wordpiece", "bpe"))
def test_a_new_tokenizer_of_each_kind(kind, texts, tmp_path):
    flags = ["--tokenizer-kind", kind, "--vocab-size", "600", "--cased"]
    folder = train_on(texts, tmp_path / "out", *flags)
    tokenizer = check_equal_ids(folder, lines_of_all_scripts(80))
    assert tokenizer.encode("Ab", add_special_tokens=False).ids != tokenizer.encode("ab").ids[1:-1]
    unknown = tokenizer.encode("\N{CUNEIFORM SIGN A} \u0000\U0001f9ff").tokens[1:-1]
    assert ("[UNK]" in unknown) == (kind == "wordpiece")
    assert begins_word(tokenizer).any()


def write_foreign(folder, name):
    """A tokenizer as others save it, with fewer special tokens, or of other names."""
    folder.mkdir()
    lines = sentences(200, 3)
    settings = {}
    if name == "unigram":  # as T5
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        settings = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": {"content": "<unk>"}}
    elif name == "endoftext":  # as GPT-2
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    else:  # as XLM
        tokenizer = Tokenizer(models.BPE(unk_token="<a>", end_of_word_suffix="</w>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["<a>", "<b>", "<c>", "<d>", "<hole>"]
        trainer = trainers.BpeTrainer(
            vocab_size=45, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        )
        roles = dict(zip(("unk", "pad", "cls", "sep", "mask"), special, strict=True))
        settings = {f"{role}_token": token for role, token in roles.items()}
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("name", "expected", "added"),
    [
        (
            "unigram",
            ("<pad>", "<unk>", "[CLS]", "</s>", "[MASK]"),
            "added [CLS] as cls, [MASK] as mask",
        ),
        (
            "endoftext",
            ("[PAD]", *["<|endoftext|>"] * 3, "[MASK]"),
            "added [PAD] as pad, [MASK] as mask",
        ),
        ("suffix", ("<b>", "<a>", "<c>", "<d>", "<hole>"), ""),
    ],
)
def test_a_tokenizer_of_others(name, expected, added, corpus_file, topics, tmp_path, capsys):
    source = write_foreign(tmp_path / name, name)
    out = train_on(corpus_file, tmp_path / "out", "--tokenizer", source)
    assert added in capsys.readouterr().out
    tokenizer = check_equal_ids(out, [*sentences(20, 9), "Dom <hole> </s>[MASK]"])
    assert (
        tuple(special_tokens(tokenizer)[r] for r in ("pad", "unk", "cls", "sep", "mask"))
        == expected
    )
    old = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    assert old.items() <= tokenizer.get_vocab().items()

    flags = ["--model", str(out), "--labels", "20", "--methods", "pretrained", "--epochs", "1"]
    tuned = tmp_path / "tuned"
    finetune.main([*flags, "--train", str(topics[0]), "--out", str(tuned), "--max-len", "16"])
    assert predict.predict_texts(tuned, ["bal dom"])


def test_words_that_end_with_a_mark_are_masked_together(corpus_file, tmp_path):
    tokenizer = open_tokenizer(str(write_foreign(tmp_path / "suffix", "suffix")))
    corpus = Corpus(prepare([str(corpus_file)], 100, tokenizer), 32, 512, seed=0)
    pieces = np.array([tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())])
    assert not begins_word(tokenizer).any()
    ends = ends_word(tokenizer)
    assert all(ends[i] for i, piece in enumerate(pieces) if piece.endswith("</w>"))
    batch = corpus.batch(0, 0, 1, 0.3)
    is_masked = np.isin(np.arange(512), batch.masked)
    ids = batch.ids.numpy().copy()
    ids[batch.masked] = batch.targets
    inside = ~ends[ids[:-1]] & ~np.isin(ids[:-1], list(corpus.special.values()))
    assert np.mean(is_masked[1:][inside] == is_masked[:-1][inside]) > 0.95  # the last may be cut


def test_berts_own_tokenizer_stays_as_it_is(pretrained):
    """Pairs and their token types too."""
    ours = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    tokenizer = open_tokenizer(str(pretrained / "tokenizer.json"))
    assert tokenizer.get_vocab() == ours.get_vocab()
    for pair in (["bal dom"], ["bal dom", "kist"]):
        encodings = [t.encode(*pair) for t in (ours, tokenizer)]
        assert encodings[0].ids == encodings[1].ids
        assert encodings[0].type_ids == encodings[1].type_ids
    assert special_tokens(tokenizer) == special_tokens(ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "EOF while parsing"),
        (None, "no such folder"),
        (
            '{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":9},"unk_token":"a"}}',
            "gaps",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        open_tokenizer(str(path))


@pytest.mark.parametrize(
    "flags", (["--model", "a", "--tokenizer", "b"], ["--tokenizer", "b", "--cased"])
)
def test_flags_that_exclude_each_other(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert "brings its own" in capsys.readouterr().err
