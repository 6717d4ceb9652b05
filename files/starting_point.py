"""What a run of train.py starts from: shape of the model, corpus, and the model at step 0."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import torch

from data import Corpus
from files import hub_names, model_folder
from files.machine import Ranks
from files.model_folder import SavedModel, choose_max_len
from files.other_tokenizers import open_tokenizer
from files.token_cache import prepare
from model import Config, MaskedLM, preset


def build_config(args: Namespace, initial: SavedModel | None) -> Config:
    """The shape of the model: that of --model, or the preset's with the flags; sets --max-len."""
    if initial:
        config = initial.config
        config, args.max_len = choose_max_len(config, args.max_len, config.max_len, args.model)
        return config
    sizes = {"n_layers": args.layers, "d_model": args.d_model, "max_len": args.max_len}
    config = preset(args.preset, family=args.family, vocab_size=args.vocab_size, **sizes)
    args.max_len = config.max_len
    return config


def load_corpus(
    args: Namespace, config: Config, initial: SavedModel | None, ranks: Ranks
) -> Corpus:
    """Tokenize the text on the first rank of each machine, and open it on all."""

    def tokenize() -> Path:
        tokenizer = initial.tokenizer if initial else None
        if args.tokenizer:
            tokenizer = open_tokenizer(args.tokenizer)
        kind = args.tokenizer_kind or "wordpiece"
        settings = (args.text_column, args.min_count, kind, args.cased)
        return prepare(args.corpus, config.vocab_size, tokenizer, *settings)

    folder = ranks.from_first(tokenize, of_machine=True)
    return Corpus(folder, args.max_len, args.micro_batch_tokens, args.seed, args.mask)


def build_model(
    args: Namespace, config: Config, corpus: Corpus, initial: SavedModel | None, ranks: Ranks
) -> MaskedLM:
    """The model at step 0: that of --model, or a new one with a spectral embedding."""
    torch.manual_seed(args.seed)
    model = MaskedLM(dataclasses.replace(config, vocab_size=corpus.vocab_size))
    model.model.dropout.p = args.dropout
    # a setting that could not be saved fails here, and not at the first checkpoint
    hub_names.config_to_json(model.config, model.task, corpus.special)
    if initial:
        # a classifier has no decoder, and a bare encoder no head
        missing = ("decoder.bias", "head", "pooler")
        model_folder.load_weights(model, initial.weights, args.model, allow_missing=missing)
        # of a later classifier: sentence-transformers trains one that reads the mean
        model.pooling = None if config.is_modern else initial.raw.get("classifier_pooling")
    elif args.start == "spectral":
        # the first rank of a machine computes it, the others read it from the cache
        ranks.from_first(lambda: corpus.spectral_embedding(config.d_model).shape, of_machine=True)
        vectors, occurs = corpus.initial_embedding(config.d_model, config.init_std, args.seed)
        model.model.embeddings.tok_embeddings.weight.data[occurs] = vectors[occurs]
    return model
