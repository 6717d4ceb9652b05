"""Use a model: python predict.py "A film to remember."

A model of finetune.py answers with a class, a number or entities, a model of train.py with a word
for each [MASK]: one line per text, in order. Memory does not grow with the number of texts.
--embeddings writes a vector per text instead, the mean of the final states of its tokens.

Axes: T tokens of a batch, S texts of a batch, M masks of a batch, C classes or words.
"""

import argparse
import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from files.cli import Parser, choose_hardware, number, run_script
from files.columns import Item
from files.disk import UserError
from files.entities import predict_entities
from files.model_folder import open_encoder, open_model
from files.texts import Answer, npy_rows, read_items, to_json, to_line
from files.threads import answer_in_order
from files.tokenizer import special_ids, special_tokens
from labels import LabeledDataset, batches, encode
from model import Classifier, Encoder, MaskedLM, Tagger, mean_pool

Answers = tuple[list[Answer], int]  # of a batch, and how many of its texts were cut


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Classify texts, or fill their [MASK]s.")
    add, positive = parser.add_argument, number(int, 1)
    add("texts", nargs="*", metavar="TEXT", help="a text; - alone reads lines of standard input")
    add("--model", type=Path, default=Path("runs/finetune"), help="folder of finetune or train.py")
    add("--file", type=Path, help="lines of text, a .csv, .tsv, .jsonl or .parquet, or hf:...")
    add("--text-column", help="column of the text; guessed by default")
    add("--pair-column", help="column of the second text of a pair; guessed by default")
    tops = "answers per text; by default 1 class, 5 words, or the labels above their threshold"
    add("--top", type=positive, metavar="K", help=tops)
    add("--json", action="store_true", help="one JSON object per text, by default with all classes")
    vectors = "write no answers but a float32 vector per text, in order: the mean of its states"
    add("--embeddings", type=Path, metavar="OUT.npy", help=vectors)
    add("--batch-size", type=positive, default=64, help="texts per batch; 1 answers each at once")
    parser.add_device()
    parser.add_dtype()
    args = parser.parse_args(argv)
    if bool(args.texts) == bool(args.file):
        parser.error("give texts, or --file FILE, or - for standard input")
    if args.embeddings and (args.json or args.top):
        parser.error("--embeddings takes no --json and no --top")
    if not all(text.strip() for text in args.texts):
        parser.error("a TEXT is blank")
    if "-" in args.texts:
        if len(args.texts) > 1:
            parser.error("-: standard input stands alone, without other texts")
        args.file = Path("-")
    return args


# -------------------------------------------------------------------------------------- answers


def answer_batch(
    model: nn.Module, tokenizer: Tokenizer, names: list[str] | None, top: int, items: list[Item]
) -> Answers:
    """Answer a batch of texts with any kind of model; `top` 0: the labels above the threshold."""
    texts = [item.text for item in items]
    if isinstance(model, Tagger):
        entities, n_cut = predict_entities(model, tokenizer, names, texts)
        return [{"entities": entities_of_text} for entities_of_text in entities], n_cut

    pairs = None if items[0].pair is None else [item.pair for item in items]
    dataset = LabeledDataset(texts, pairs, np.zeros(len(items)), None)
    rows, n_cut = encode(dataset, tokenizer, model.config.max_len)
    device = next(model.parameters()).device
    _, inputs = next(batches(rows, np.arange(len(rows)), len(rows), device))
    if isinstance(model, Encoder):
        return list(mean_pool(model(*inputs), inputs[1])[: len(items)].cpu().numpy()), n_cut
    if isinstance(model, MaskedLM):
        masks = fill_masks(model, tokenizer, top, inputs, len(items))
        return [{"masks": masks_of_text} for masks_of_text in masks], n_cut
    outputs = model(*inputs)[: len(items)]  # (S, C), without the padding
    if names is None:
        return [{"value": value} for value in outputs[:, 0].tolist()], n_cut
    classes = best(model.probabilities(outputs), "label", names.__getitem__, top or len(names))
    least = 0 if top else model.threshold
    return [{"answers": [c for c in row if c["probability"] >= least]} for row in classes], n_cut


def best(probabilities: Tensor, key: str, name_of: Callable, top: int) -> list[list[dict]]:
    """The `top` classes or words of each row of (S or M, C), the most probable first."""
    values, indices = probabilities.topk(min(top, probabilities.shape[-1]))
    return [
        [{key: name_of(i), "probability": p} for i, p in zip(*row, strict=True)]
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def fill_masks(
    model: MaskedLM, tokenizer: Tokenizer, top: int, inputs: tuple, n_texts: int
) -> list[list[list[dict]]]:
    """The best words for each mask of each text."""
    ids, cu_seqlens, *_ = inputs
    n_tokens = cu_seqlens[n_texts]  # of the texts; the rest is padding
    masks = (ids[:n_tokens] == special_ids(tokenizer)["mask"]).nonzero()[:, 0]  # (M,)
    states = model.model(*inputs, rows=masks)  # (M, d_model)
    probabilities = model.decoder(model.head(states)).softmax(-1)  # (M, C)
    words = best(probabilities, "token", tokenizer.id_to_token, top)
    words_of_texts: list[list[list[dict]]] = [[] for _ in range(n_texts)]
    text_of_mask = torch.bucketize(masks, cu_seqlens[1:], right=True).tolist()
    for i, words_of_mask in zip(text_of_mask, words, strict=True):
        words_of_texts[i].append(words_of_mask)
    return words_of_texts


def make_answer(
    model: nn.Module, tokenizer: Tokenizer, names: list[str] | None, top: int, dtype: torch.dtype
) -> Callable[[list[Item]], Answers]:
    """The function that answers a batch of texts with this model at this precision.

    The layer named decoder or classifier computes in float32: in bfloat16 different words get equal
    probabilities.
    """
    device = next(model.parameters()).device
    last_layer = getattr(model, "decoder", None) or getattr(model, "classifier", nn.Identity())
    forward = last_layer.forward

    def forward_in_float32(x: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return forward(x.float())

    last_layer.forward = forward_in_float32

    @torch.no_grad()
    def answer(items: list[Item]) -> Answers:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return answer_batch(model, tokenizer, names, top, items)

    return answer


def predict_texts(folder: str | Path, texts: list[str]) -> list[Any]:
    """Classify texts from Python.

    Returns:
        Of each text (most probable class, its probability); of a model of several labels, a list of
        such pairs for those above its threshold; of a model of numbers, a float.

    Raises:
        UserError: `folder` holds no classifier of finetune.py.
    """
    device, dtype = choose_hardware(None, "auto")
    model, tokenizer, names = open_model(Path(folder), device)
    if not isinstance(model, Classifier):
        raise UserError(f"{folder}: not a classifier; finetune.py makes one")
    is_multilabel = model.threshold is not None
    answer = make_answer(model, tokenizer, names, 0 if is_multilabel else 1, dtype)
    items = (Item("", text) for text in texts)
    predictions: list[Answer] = []
    answer_in_order(items, answer, lambda _, answers: predictions.extend(answers[0]))
    if names is None:
        return [prediction["value"] for prediction in predictions]
    pairs = [[tuple(c.values()) for c in prediction["answers"]] for prediction in predictions]
    return pairs if is_multilabel else [pair for [pair] in pairs]


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Print the answers; returns how many texts were answered, broken, and cut."""
    args = parse_args(argv)
    device, dtype = choose_hardware(args.device, args.dtype)
    open_any = open_encoder if args.embeddings else open_model
    model, tokenizer, names = open_any(args.model, device)
    default_top = len(names or []) if args.json else 1
    if isinstance(model, MaskedLM):
        default_top = 5
    elif getattr(model, "threshold", None) is not None:
        default_top = 0
    answer = make_answer(model, tokenizer, names, args.top or default_top, dtype)
    mask = special_tokens(tokenizer)["mask"]
    counts = {"answered": 0, "broken": 0, "cut": 0}
    lock = threading.Lock()  # a text may turn out to be broken on each of the threads

    def report(error: UserError) -> None:
        with lock:
            counts["broken"] += 1
        print(f"predict.py: {error}", file=sys.stderr)

    def write(items: list[Item], answers: Answers) -> None:
        for item, result in zip(items, answers[0], strict=True):
            if args.embeddings:
                append(result)
            elif result.get("masks") == []:
                report(UserError(f"{item.source}: no {mask} among the tokens that are read"))
                continue
            else:
                print(to_json(item, result) if args.json else to_line(item, result))
            counts["answered"] += 1
        sys.stdout.flush()
        counts["cut"] += answers[1]

    vectors = contextlib.nullcontext()
    if args.embeddings:
        vectors = npy_rows(args.embeddings, model.config.d_model)
    with vectors as append:
        answer_in_order(read_items(args, report), answer, write, args.batch_size)
    if counts["cut"]:
        print(f"{counts['cut']:,} texts cut to {model.config.max_len} tokens", file=sys.stderr)
    return counts


if __name__ == "__main__":
    sys.exit(2 if run_script(main)["broken"] else 0)
