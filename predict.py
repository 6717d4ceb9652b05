"""Use a model: python predict.py "A film to remember." One line of output a text, in their order.

A folder of finetune.py tells the class of a text, its number or its entities; one of train.py fills each
[MASK]. Texts are arguments, the lines of a file or of standard input, or the rows of a table, read and
answered as a stream.

Axes: T tokens of a batch, S texts of it, M masks.
"""

import argparse
import itertools
import json
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from files import model_folder
from files.cli import Parser, choose_hardware, number, run_script
from files.columns import LABEL_NAMES, choose_texts
from files.disk import UserError
from files.entities import predict_entities
from files.readers import TABLE_SUFFIXES, Report, read_lines, read_table, text_suffix
from files.tokenizer import special_ids, special_tokens
from labels import LabeledDataset, batches, encode
from model import MaskedLM, Tagger

GUESSED_ON = 200  # rows of a table in which the column of the text is looked for


class Item(NamedTuple):
    """A text to answer, with its second text if it is a pair; `place` is where it stood."""

    place: str
    text: str
    pair: str | None


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser("Classify texts, or fill their [MASK]s.")
    add, positive = flags.add_argument, number(int, 1)
    add("texts", nargs="*", metavar="TEXT", help="a text; or - alone for the lines of standard input")
    add("--model", type=Path, default=Path("runs/finetune"), help="folder of finetune.py or train.py")
    add("--file", type=Path, help="lines of text, or .csv, .tsv, .jsonl with a column of texts; .gz of each")
    add("--text-column", help="guessed where it is not given")
    add("--pair-column", help="column of a second text, for pairs")
    add("--top", type=positive, metavar="K", help="best answers of each text; by default 1 class, 5 words")
    add("--json", action="store_true", help="one JSON object a line, with every class unless --top is given")
    add("--batch-size", type=positive, default=64, help="texts at a time: fewer are sooner, more are faster")
    flags.add_device()
    flags.add_dtype()
    args = flags.parse_args(argv)
    if bool(args.texts) == bool(args.file):
        flags.error("give texts, or --file FILE, or - for standard input")
    if "-" in args.texts:
        if len(args.texts) > 1:
            flags.error("-: standard input stands alone, without other texts")
        args.file = Path("-")
    is_table = args.file and text_suffix(args.file) in TABLE_SUFFIXES
    if (args.text_column or args.pair_column) and not is_table:
        flags.error(f"--text-column and --pair-column belong to a --file of {', '.join(TABLE_SUFFIXES)}")
    return args


# ------------------------------------------------------------------------------------------------- texts


def read_items(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    """The texts in their order. What is broken goes to `report`, and the rest is still served, also of a file
    that breaks off; raises UserError where not even one can be read."""
    n_read = 0
    try:
        for item in _all_items(args, report):
            n_read += 1
            whole = [item.text, *([] if item.pair is None else [item.pair])]
            if not all(isinstance(part, str) and part.strip() for part in whole):
                report(UserError(f"{item.place}: no text"))
            elif any("\ud800" <= character <= "\udfff" for part in whole for character in part):
                report(UserError(f"{item.place}: not UTF-8 text"))
            else:
                yield item
    except UserError as error:
        if not n_read:
            raise
        report(error)


def _all_items(args: argparse.Namespace, report: Report) -> Iterator[Item]:
    path = args.file
    if path is None:
        for i, text in enumerate(args.texts, 1):
            yield Item(f"text {i}", text, None)
    elif text_suffix(path) not in TABLE_SUFFIXES:
        for line, text in read_lines(path, report=report):
            if text.strip():
                yield Item(f"{path}:{line}", text.strip(), None)
    else:
        rows = read_table(path, report)
        first = list(itertools.islice(rows, GUESSED_ON))
        if not first:
            return
        label = next((name for name in first[0][1] if name.lower() in LABEL_NAMES), None)
        text, pair = choose_texts(path, first, args.text_column, args.pair_column, label)
        second = f" with {pair!r}" if pair else ""
        print(f"{path}: text {text!r}{second}", file=sys.stderr)
        for line, row in itertools.chain(first, rows):
            yield Item(f"{path}:{line}", row.get(text), (row.get(pair) or "") if pair else None)


# ----------------------------------------------------------------------------------------------- answers

Answer = list[tuple[str, float]]  # the best first: class or word, probability


def best(probabilities: torch.Tensor, names: Callable[[int], str], k: int) -> Answer:
    values, which = probabilities.topk(min(k, len(probabilities)))
    return [(names(i), p) for i, p in zip(which.tolist(), values.tolist(), strict=True)]


def fill_masks(
    model: MaskedLM,
    tokenizer: Tokenizer,
    inputs: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor],
    k: int,
) -> list[list[Answer]]:
    """For each sequence the answers for each of its masks."""
    ids, cu_seqlens, *_ = inputs
    masks = (ids == special_ids(tokenizer)["mask"]).nonzero()[:, 0]  # (M,)
    states = model.model(*inputs).index_select(0, masks)
    logits = model.decoder(model.head(states)).float()  # (M, vocab_size)
    sequences = torch.bucketize(masks, cu_seqlens[1:], right=True).tolist()
    found: list[list[Answer]] = [[] for _ in range(len(cu_seqlens) - 1)]
    for sequence, probabilities in zip(sequences, logits.softmax(-1), strict=True):
        found[sequence].append(best(probabilities, tokenizer.id_to_token, k))
    return found


def as_line(item: Item, answer: Any) -> str:
    """Tabs between answers and text: cut and awk part them."""
    if isinstance(answer, float):
        shown = f"{answer:.4g}"
    elif not answer or isinstance(answer[0], dict):
        shown = "\t".join(f"{found['type']} {found['text']}" for found in answer) or "-"
    else:
        groups = answer if isinstance(answer[0], list) else [answer]
        shown = "\t/\t".join("\t".join(f"{name} {p:.3f}" for name, p in group) for group in groups)
    return "\t".join([shown, *(" ".join(part.split()) for part in item[1:] if part is not None)])


def as_json(item: Item, answer: Any) -> str:
    record: dict[str, Any] = {"place": item.place, "text": item.text}
    if item.pair is not None:
        record["pair"] = item.pair
    if isinstance(answer, float):
        record["value"] = answer
    elif not answer or isinstance(answer[0], dict):
        record["entities"] = answer
    elif isinstance(answer[0], list):
        record["masks"] = [[{"token": name, "probability": p} for name, p in group] for group in answer]
    else:
        record["answers"] = [{"label": name, "probability": p} for name, p in answer]
    return json.dumps(record, ensure_ascii=False)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Print the answers, and return how many there were and how many texts were broken."""
    args = parse(argv)
    device, dtype = choose_hardware(args.device, args.dtype)
    model, tokenizer, names = model_folder.open_model(args.model, device)
    fills, mask = isinstance(model, MaskedLM), special_tokens(tokenizer)["mask"]
    mask_id = tokenizer.token_to_id(mask)
    k = args.top or (5 if fills else len(names or [""]) if args.json else 1)
    counts, counting = {"answered": 0, "broken": 0, "cut": 0}, threading.Lock()

    def report(error: UserError) -> None:
        with counting:
            counts["broken"] += 1
        print(f"predict.py: {error}", file=sys.stderr)

    @torch.no_grad()
    def answer(some: list[Item], before: Future | None) -> None:
        """Print the answers of a batch once those of the batch `before` it are printed."""
        texts, pairs = ([item[i] for item in some] for i in (1, 2))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if isinstance(model, Tagger):
                found, n_cut = predict_entities(model, tokenizer, names, texts)
            else:
                pairs = pairs if pairs[0] is not None else None
                rows, n_cut = encode(
                    LabeledDataset(texts, pairs, np.zeros(len(some)), None), tokenizer, model.config.max_len
                )
                if fills:
                    has_mask = [mask_id in row[:, 0] for row in rows]
                    for item in itertools.compress(some, map(operator.not_, has_mask)):
                        report(UserError(f"{item.place}: no {mask} among the tokens of it that are read"))
                    some, rows = (list(itertools.compress(x, has_mask)) for x in (some, rows))
                found = []
                for _, inputs in batches(rows, np.arange(len(rows)), args.batch_size, device):
                    if fills:
                        found = fill_masks(model, tokenizer, inputs, k)
                    elif names is None:
                        found = model(*inputs).float()[:, 0].tolist()
                    else:
                        probabilities = model(*inputs).float().softmax(-1)  # (S, n_labels)
                        found = [best(p, names.__getitem__, k) for p in probabilities]
        if before:
            before.result()
        for item, found_one in zip(some, found, strict=False):  # the last sequence may be a filler
            print(as_json(item, found_one) if args.json else as_line(item, found_one))
        sys.stdout.flush()
        counts["answered"] += len(some)
        counts["cut"] += n_cut

    # Two batches at once, each on half of the cores: products as small as these share them badly.
    items, last, n_threads = read_items(args, report), None, torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(2, n_threads), "", torch.set_num_threads, [-(-n_threads // 2)]) as pool:
            while some := list(itertools.islice(items, args.batch_size)):
                before, last = last, pool.submit(answer, some, last)
                if before:
                    before.result()  # so memory does not grow, and what fails ends the reading
        if last:
            last.result()
    finally:
        torch.set_num_threads(n_threads)
    if not counts["answered"] + counts["broken"]:
        raise UserError(f"{args.file}: no texts in it")
    if counts["cut"]:
        print(f"{counts['cut']:,} texts cut to {model.config.max_len} tokens", file=sys.stderr)
    return counts


if __name__ == "__main__":
    try:
        sys.exit(2 if run_script(main)["broken"] else 0)
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
