"""The tokenizer: how one is trained, its special tokens, and where its words begin and end.

Axes: V vocabulary.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing

from files.disk import read_json

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# Scripts that are written without spaces: Thai and Lao, Burmese, Khmer, kana, ideographs.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
ROBERTA_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}


def train_tokenizer(documents: Iterable[str], vocab_size: int, cased: bool = False) -> Tokenizer:
    """Train a WordPiece tokenizer; its vocabulary is smaller if the text is small.

    Accents and combining marks stay, because stripping them breaks Indic scripts. CJK characters
    are words of their own.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    options = {"clean_text": False, "strip_accents": False, "lowercase": not cased}
    bert_normalizer = normalizers.BertNormalizer(**options)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), bert_normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(SPECIAL_TOKENS.values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        limit_alphabet=(vocab_size - len(special)) // 2,  # each letter is both `x` and `##x`
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)

    # the trainer numbers its pieces in the order of a hash table, which differs between runs
    pieces = sorted(tokenizer.get_vocab().keys() - set(special))
    vocab = {piece: i for i, piece in enumerate([*special, *pieces])}
    tokenizer.model = models.WordPiece(
        vocab, unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=200
    )
    return add_cls_and_sep(tokenizer)


def train_bpe(documents: Iterable[str], vocab_size: int, cased: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer, to which nothing is unknown: it has all 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([] if cased else [normalizers.Lowercase()])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return add_cls_and_sep(tokenizer)


TRAINERS = {"wordpiece": train_tokenizer, "bpe": train_bpe}


def add_cls_and_sep(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer with BERT's special tokens put each text between [CLS] and [SEP]."""
    tokens = [SPECIAL_TOKENS[role] for role in ("sep", "cls")]
    tokenizer.post_processor = BertProcessing(*((t, tokenizer.token_to_id(t)) for t in tokens))
    return tokenizer


def read_vocabulary(path: str) -> Tokenizer:
    """Build the tokenizer of BERT's vocab.txt, or of RoBERTa's vocab.json and merges.txt.

    A BERT whose tokenizer_config.json is missing, as in Google's folders, is lower-cased unless
    its vocabulary has capital letters. `transformers` would lower-case it always.
    """
    settings = read_json(Path(path).with_name("tokenizer_config.json"))
    if path.endswith(".txt"):
        # [UNK] and its like have capital letters in every vocabulary
        is_cased = re.search(r"^[^[\n]*[A-Z]", Path(path).read_text("utf-8"), re.MULTILINE)
        tokenizer = BertWordPieceTokenizer(
            path,
            lowercase=settings.get("do_lower_case", not is_cased),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        return Tokenizer.from_str(tokenizer.to_str())

    merges = Path(path).with_name("merges.txt")
    if not merges.is_file():
        raise ValueError("merges.txt is missing")
    spaces = {"add_prefix_space": settings.get("add_prefix_space", False)}
    tokenizer = ByteLevelBPETokenizer.from_file(path, str(merges), **spaces)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokens = special_tokens(tokenizer)
    tokenizer.add_special_tokens(list(tokens.values()))
    sep, cls = ((tokens[role], tokenizer.token_to_id(tokens[role])) for role in ("sep", "cls"))
    tokenizer.post_processor = RobertaProcessing(sep, cls, **spaces)
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by role ("pad", "unk", "cls", "sep", "mask"): those that
    files/other_tokenizers.py has saved in a post-processor, or else BERT's or RoBERTa's.

    ValueError if one is missing.
    """
    if isinstance(tokenizer.post_processor, TemplateProcessing):
        saved = json.loads(tokenizer.post_processor.__getstate__())["special_tokens"]
        if SPECIAL_TOKENS.keys() <= saved.keys():
            return {role: saved[role]["tokens"][0] for role in SPECIAL_TOKENS}
    is_roberta = tokenizer.token_to_id(ROBERTA_TOKENS["cls"]) is not None
    tokens = ROBERTA_TOKENS if is_roberta else SPECIAL_TOKENS
    for token in tokens.values():
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"no token {token}")
    return tokens


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens by role; ValueError if one is missing."""
    return {role: tokenizer.token_to_id(t) for role, t in special_tokens(tokenizer).items()}


def begins_word(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens of the vocabulary begin a word, (V,) bool.

    WordPiece marks continuations ("##ing"); byte-level BPE ("Ġword") and SentencePiece ("▁word")
    mark beginnings, and here punctuation begins a word of its own, as it does in BERT. In
    byte-level BPE the first word of a line belongs to the line break before it ("Ċ"). ValueError
    if the tokenizer marks neither.
    """
    pieces = _pieces(tokenizer)
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "WordLevel":
        return np.ones(len(pieces), dtype=bool)
    if model.get("end_of_word_suffix"):  # `ends_word` knows them
        return np.zeros(len(pieces), dtype=bool)
    if prefix := model.get("continuing_subword_prefix"):
        return np.array([not piece.startswith(prefix) for piece in pieces])
    for marks in (("▁",), ("Ġ", "Ċ", "ĉ", "č")):  # space, line feed, tab, carriage return
        if any(piece.startswith(marks[0]) for piece in pieces):
            return np.array([piece.startswith(marks) or _is_symbol(piece[:1]) for piece in pieces])
    raise ValueError("the tokenizer does not mark where words begin")


def ends_word(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens no word goes on after, (V,) bool: punctuation, and so the special tokens, and
    those with the mark of an end ("word</w>")."""
    suffix = json.loads(tokenizer.to_str())["model"].get("end_of_word_suffix") or "\0"
    pieces = _pieces(tokenizer)
    return np.array([_is_symbol(piece[-1:]) or piece.endswith(suffix) for piece in pieces])


def _pieces(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]


def _is_symbol(character: str) -> bool:
    """ASCII punctuation; other bytes of byte-level BPE may be parts of letters."""
    return character.isascii() and not character.isalnum()
