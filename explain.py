"""Explain a classifier's answer by its words: python explain.py "A film to remember."

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) on the straight path from a text
of [MASK] tokens to the text: the attribution of a token is its change of embedding times the mean
gradient along the path. The attributions add up to the difference between the scores of the two
texts; a score is the log-odds of a class, or the predicted number.

Axes: L tokens of a text, S texts, P points of the path, C classes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import labels
from analysis.html_page import attention_maps, html_report, section, split_into_pieces
from analysis.removal import compare_removals, print_check, sample_texts
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import UserError, write_file
from files.model_folder import open_model
from files.tokenizer import special_ids
from model import Classifier

# The number of points is doubled until the attributions miss their exact sum by less than MAX_GAP,
# as a share of the sum of their absolute values.
MIN_POINTS, MAX_POINTS = 32, 512
MAX_GAP = 0.02
TOKENS_PER_BATCH = 8192


class Explanation(NamedTuple):
    """The attributions of the words of a text."""

    text: str
    row: np.ndarray  # (L, 2) token ids and types, as `labels.encode` returns them
    spans: list[tuple[int, int]]  # of each word: its first character, and the one after its last
    tokens: list[np.ndarray]  # of each word: the positions of its tokens in `row`
    attributions: np.ndarray  # (words,)
    class_index: int | None  # the class that is explained; None for a number
    answer: str  # that class and its probability, or the number
    gap: float  # how far the sum of the attributions is from its exact value, see MAX_GAP


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Show how much each word contributes to a classifier's answer.")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="a text to explain")
    add("--model", type=Path, default=Path("runs/finetune"), help="folder of finetune.py")
    add("--class", dest="class_name", metavar="NAME", help="by default the most probable class")
    add("--html", type=Path, metavar="FILE", help="write a page, with the attention of each head")
    add("--check", action="store_true", help="test whether the attributions find important words")
    add("--data", choices=("mr", "imdb"), default="mr", help="test texts for --check")
    add("--file", type=Path, help="lines of your own for --check")
    add("--sentences", type=number(int, 2), default=200, help="texts that --check samples")
    add("--seed", type=number(int, 0), default=0, help="of this sample and of the random words")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.check == bool(args.texts):
        parser.error("give texts, or --check")
    return args


# -------------------------------------------------------------------------------- attributions


def find_words(text: str, tokenizer: Tokenizer, n_tokens: int) -> tuple[list, list[np.ndarray]]:
    """The `spans` and `tokens` of an Explanation, where `labels.encode` left `n_tokens` tokens."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    positions = np.arange(len(encoding))  # a long text loses its middle
    n_head, n_tail = n_tokens - n_tokens // 2, n_tokens // 2
    positions = np.concatenate((positions[:n_head], positions[len(positions) - n_tail :]))
    words: dict[int, list[int]] = {}
    for i, position in enumerate(positions, 1):  # token 0 is [CLS]
        word = encoding.word_ids[position]  # None of a special token that is written in the text
        words.setdefault(-i if word is None else word, []).append(i)
    spans = []
    for tokens in words.values():
        first, last = positions[tokens[0] - 1], positions[tokens[-1] - 1]
        spans.append((encoding.offsets[first][0], encoding.offsets[last][1]))
    return spans, [np.array(tokens) for tokens in words.values()]


def score(model: Classifier, logits: Tensor, class_index: int | None) -> Tensor:
    """The log-odds of a class, or the predicted number: (S, C) to (S,)."""
    if class_index is None:
        return logits[:, 0]
    if model.threshold is not None:  # the labels do not exclude each other
        return logits[:, class_index]
    others = [i for i in range(logits.shape[1]) if i != class_index]
    return logits[:, class_index] - logits[:, others].logsumexp(1)


def mean_gradient(
    model: Classifier, row: Tensor, baseline: Tensor, class_index: int | None, n_points: int
) -> Tensor:
    """The mean gradient of the score along the path, in the middles of `n_points` pieces of it.

    The path leads from `baseline` (L, d_model) to the embeddings of `row`; so is the result.
    """
    embedding = model.model.embeddings.tok_embeddings
    length = len(row)
    end = embedding(row[:, 0]).detach()  # (L, d_model)
    total = torch.zeros_like(baseline)
    alphas = (torch.arange(n_points, device=row.device) + 0.5) / n_points
    for alpha in alphas.split(max(1, TOKENS_PER_BATCH // length)):
        points = baseline + alpha[:, None, None] * (end - baseline)  # (P, L, d_model)
        points = points.flatten(0, 1).requires_grad_()  # (P * L, d_model)
        hook = embedding.register_forward_hook(lambda *_, points=points: points)
        cu_seqlens = torch.arange(len(alpha) + 1, dtype=torch.int32, device=row.device) * length
        ids, types = row.repeat(len(alpha), 1).T
        logits = model(ids, cu_seqlens, length, types)  # (P, C)
        hook.remove()
        (gradient,) = torch.autograd.grad(score(model, logits, class_index).sum(), points)
        total += gradient.view(len(alpha), length, -1).sum(0)
    return total / n_points


def explain(
    model: Classifier,
    tokenizer: Tokenizer,
    names: list[str] | None,
    text: str,
    class_index: int | None = None,
) -> Explanation:
    """Compute the attributions of a text's words.

    Args:
        model, tokenizer, names: As `open_model` returns them.
        text: The text.
        class_index: The class to explain; None is the most probable one.
    """
    device = next(model.parameters()).device
    embedding = model.model.embeddings.tok_embeddings
    dataset = labels.LabeledDataset([text], None, np.zeros(1), names)
    (encoded,), _ = labels.encode(dataset, tokenizer, model.config.max_len)
    row = torch.from_numpy(encoded).to(device)
    masked = row.clone()
    masked[1:-1, 0] = special_ids(tokenizer)["mask"]

    with torch.no_grad():
        ids, types = torch.cat((row, masked)).T
        cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32, device=device) * len(row)
        logits = model(ids, cu_seqlens, len(row), types)  # (2, C)
        if model.ngrams:  # they are those of the text along the whole path of the network
            ngram_logits = model.ngrams(ids, cu_seqlens)
            logits[1] += ngram_logits[0] - ngram_logits[1]
        if names and class_index is None:
            class_index = int(logits[0].argmax())
        score_of_text, score_of_masked = score(model, logits, class_index).tolist()
        end, baseline = embedding(row[:, 0]), embedding(masked[:, 0])  # (L, d_model) each

    n_points, gap = MIN_POINTS // 2, np.inf
    while gap > MAX_GAP and n_points < MAX_POINTS:
        n_points *= 2
        gradient = mean_gradient(model, row, baseline, class_index, n_points)
        of_tokens = ((end - baseline) * gradient).sum(1).cpu().numpy()  # (L,)
        error = abs(of_tokens.sum() - (score_of_text - score_of_masked))
        gap = float(error / max(1e-9, np.abs(of_tokens).sum()))

    if model.ngrams:  # from a text without n-grams, of which the network reads only the masks
        network = (logits[1] - ngram_logits[0]).cpu()
        text_ends = torch.tensor([0, len(row)], dtype=torch.int32)
        of_ngrams = model.ngrams.attributions(
            row[:, 0], text_ends, lambda logits: score(model, network + logits, class_index)
        )
        of_tokens += of_ngrams.numpy()
    spans, tokens = find_words(text, tokenizer, len(encoded) - 2)
    attributions = np.array([of_tokens[members].sum() for members in tokens])
    answer = f"{logits[0, 0]:.4g}"
    if names:
        answer = f"{names[class_index]} {model.probabilities(logits[0])[class_index]:.3f}"
    return Explanation(text, encoded, spans, tokens, attributions, class_index, answer, gap)


# -------------------------------------------------------------------------------------- output


def to_line(explanation: Explanation) -> str:
    words = zip(explanation.spans, explanation.attributions, strict=True)
    columns = [f"{explanation.text[start:stop]} {value:+.2f}" for (start, stop), value in words]
    return f"{explanation.answer}\t{'  '.join(columns)}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print explanations, or a check of them, and return them."""
    args = parse_args(argv)
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, names = open_model(args.model, device)
    if not isinstance(model, Classifier):
        raise UserError(f"{args.model}: not a classifier; finetune.py makes one")
    if names is None and (args.check or args.class_name):
        raise UserError(f"{args.model}: it predicts a number; --check and --class need classes")
    if args.class_name and args.class_name not in names:
        raise UserError(f"--class {args.class_name}: the classes are {', '.join(names)}")

    if args.check:
        texts = tqdm(sample_texts(args), "explaining", disable=None, leave=False)
        explanations = [explain(model, tokenizer, names, text) for text in texts]
        results = compare_removals(model, explanations, args.seed)
        print_check(results)
        return results

    class_index = names.index(args.class_name) if args.class_name else None
    explanations = []
    sections = []
    for i, text in enumerate(args.texts, 1):
        if not text.strip():
            raise UserError(f"text {i}: no text")
        explanation = explain(model, tokenizer, names, text, class_index)
        explanations.append(explanation)
        print(to_line(explanation), flush=True)
        if explanation.gap > MAX_GAP:
            problem = f"attributions miss their exact sum by {explanation.gap:.1%}"
            print(f"explain.py: text {i}: {problem}", file=sys.stderr)
        if args.html:
            tokens = [tokenizer.id_to_token(token) for token in explanation.row[:, 0]]
            maps = attention_maps(model, explanation.row)
            words = split_into_pieces(explanation)
            sections.append(section(explanation.answer, words, explanation.gap, tokens, maps))
    if args.html:
        write_file(args.html, html_report(sections).encode())
    return {"explanations": explanations}


if __name__ == "__main__":
    run_script(main)
