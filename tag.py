"""Fine-tune for token labels: finetune.py --task tokens --train FILE. Entities, by their types and places.

    most_frequent  each word's most frequent tag in training: the rival
    scratch        the same network from random weights
    pretrained     the network from the folder --model

The rates are chosen inside the labels as in finetune.py, whose training loop this is.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch

from files import disk, entities, model_folder
from files.cli import choose_hardware, flags_to_json
from files.disk import UserError
from finetune import CHOOSING, N_FOLDS, choose_length, choose_splits, fit_network
from journal import as_bytes, begin_journal, keep, recall
from labels import LabeledDataset, batches
from model import Tagger

RATES = {"scratch": (5e-4, 1e-3, 2e-3), "pretrained": (3e-4, 1e-3, 2e-3)}
EPOCHS = 10
BATCH = 64


@torch.no_grad()
def token_tags(model: Tagger, rows: list[np.ndarray], which: np.ndarray, autocast) -> list[np.ndarray]:
    """The likeliest tag of each token of the chosen rows, (tokens,) each."""
    model.eval()
    found: list[np.ndarray] = []
    for members, inputs in batches(rows, which, BATCH, next(model.parameters()).device):
        with autocast:
            best = model(*inputs).argmax(1).cpu()
        lengths = [len(rows[i]) for i in members]
        found += [part.numpy() for part in best[: sum(lengths)].split(lengths)]
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the rows, and return what OUT/metrics.json says."""
    columns = (args.text_column, args.pair_column, args.label_column)
    if any(columns) or args.head:
        raise UserError("--task tokens: it takes no columns and no --head")
    device, dtype = choose_hardware(args.device, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    config, weights, tokenizer, _ = model_folder.load_model(args.model)
    config, max_len = choose_length(config, args.max_len, args.model)
    train, test = entities.load(args.train, args.test)
    if args.labels:
        if args.labels > len(train):
            raise UserError(f"--labels {args.labels}: there are only {len(train)} sentences to train on")
        train = train[np.sort(np.random.default_rng([args.seed, 3]).permutation(len(train))[: args.labels])]
    if len(train) < N_FOLDS:
        raise UserError(f"{len(train)} sentences to train on; at least {N_FOLDS} are needed")
    flags, n_train = flags_to_json(args), len(train)
    rows, places, n_cut = entities.encode_words(train.words + test.words, tokenizer, max_len)
    targets = entities.token_targets(rows, places, train.tags + test.tags)
    all_train, all_test = np.arange(n_train), n_train + np.arange(len(test))
    truth = [[train.names[i] for i in tags] for tags in train.tags + test.tags]
    splits, how = choose_splits(LabeledDataset(train.words, None, np.zeros(n_train), None))
    read = [*rows, *targets, *as_bytes(weights)]
    journal = begin_journal(args.out, flags, read, args.resume, device)
    args.epochs = args.epochs or EPOCHS
    print(f"{n_train:,} sentences, {len(test):,} to test on; choices by {how}; {args.epochs} epochs")
    print(f"{n_cut:,} sentences cut to {max_len} tokens; products in {dtype} on {device}", flush=True)

    def fit(name: str, rate: float, on: np.ndarray, unseen: np.ndarray) -> tuple[dict[str, float], Tagger]:
        torch.manual_seed(args.seed)
        model = Tagger(config, len(train.names)).to(device)
        model.dropout.p = args.dropout
        if name == "pretrained":
            model_folder.load_weights(model, weights, args.model, allow_missing=("classifier", "head"))
        fit_network(model, rows, targets, on, rate, args, autocast)
        tagged = token_tags(model, rows, unseen, autocast)
        words = [entities.word_tags(t, places[i], train.names) for i, t in zip(unseen, tagged, strict=True)]
        return entities.measure([truth[i] for i in unseen], words), model

    results, choices = {}, {}
    for name in ("most_frequent", *(row for row in args.rows if row in RATES)):
        if kept := recall(journal / name):
            results[name], choice, line = kept[0]
            choices |= {} if choice is None else {name: choice}
            print(line, flush=True)
            continue
        begun, note = time.time(), ""
        if name == "most_frequent":
            results[name] = entities.measure(truth[n_train:], entities.most_frequent(train, test.words))
        else:
            rates = RATES[name] if args.lr is None else (args.lr,)
            rng, tried = np.random.default_rng([args.seed, 6]), {rate: [] for rate in rates}
            for fold, (on, held_out) in enumerate(splits if len(rates) > 1 else []):
                some = np.sort(rng.permutation(on)[:CHOOSING])
                for rate in rates:
                    place = journal / f"{name}-{fold}-{rate!r}"
                    if not (kept := recall(place)):
                        kept = (fit(name, rate, some, held_out)[0]["f1"], None)
                        keep(place, kept[0])
                    tried[rate].append(kept[0])
            choices[name] = max(rates, key=lambda rate, tried=tried: float(np.mean(tried[rate] or [0])))
            results[name], model = fit(name, choices[name], all_train, all_test)
            note = f"  chose {choices[name]}"
        if name == "pretrained":
            tags = dict(enumerate(train.names))
            extra = {"id2label": tags, "label2id": {tag: i for i, tag in tags.items()}}
            model_folder.save_model(args.out, model, tokenizer, extra)
        shown = "  ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        results[name]["seconds"] = time.time() - begun
        line = f"{name:<13} {shown}  {results[name]['seconds']:4.0f} s{note}"
        keep(journal / name, (results[name], choices.get(name), line))
        print(line, flush=True)
    metrics = {"test": results, "choices": choices, "names": train.names, "n_train": n_train}
    metrics |= {"n_test": len(test), "n_cut": n_cut, "dtype": str(dtype).removeprefix("torch.")}
    disk.write_file(args.out / "metrics.json", disk.to_json(metrics))
    return metrics
