"""Why it said so: python explain.py "A film to remember." Attributions of a classifier's answer to the words.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from a text of [MASK]s to the text: what a
token adds is the mean gradient along the way times its way; all sum to the difference of the two answers.
`--html` draws them beside the attention of each head; `--check` removes the words that they name.

Axes: L tokens of a text, P points of the path, H heads.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import labels
from analysis.html_page import AGAINST, FOR, attention_maps, page, section
from files import disk, model_folder
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import UserError
from files.readers import read_lines
from files.tokenizer import special_ids
from model import Classifier

FEWEST_POINTS, MOST_POINTS = 32, 512
LARGEST_GAP = 0.02  # of the sum to the difference that it should be, in the summed absolute attributions
POINT_TOKENS = 8192  # computed at a time
REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of a sentence's words
RANDOM_ORDERS = 5
RESAMPLES = 10_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser("Tell which words made a classifier say what it said.")
    add = flags.add_argument
    add("texts", nargs="*", metavar="TEXT", help="a text to explain")
    add("--model", type=Path, default=Path("runs/finetune"), help="folder of finetune.py")
    add("--class", dest="wanted", metavar="NAME", help="explain this class; by default the likeliest")
    add("--html", type=Path, metavar="FILE", help="write a page, with the attention of each head")
    add("--check", action="store_true", help="remove words by their attribution, and others at random")
    add("--data", choices=("mr", "imdb"), default="mr", help="whose test texts --check takes")
    add("--file", type=Path, help="lines of your own for --check")
    add("--sentences", type=number(int, 2), default=200, help="texts that --check draws: enough to tell")
    add("--seed", type=number(int, 0), default=0, help="of that draw, and of the random orders")
    flags.add_device()
    args = flags.parse_args(argv)
    if args.check == bool(args.texts):
        flags.error("give texts, or --check")
    return args


# -------------------------------------------------------------------------------------------- attributions


class Explained(NamedTuple):
    """A text's words with what each added to the log-odds of the class (or to the number); `spans` are their
    places in the text. `gap` is how far the sum is from what it should be, as a share."""

    text: str
    row: np.ndarray  # (L, 2) ids and types, as labels.encode gives them
    spans: list[tuple[int, int]]
    values: np.ndarray
    tokens: list[np.ndarray]  # which of the row each word is
    wanted: int | None  # the class; None explains a number
    answer: str  # the class and its probability, or the number
    gap: float


def words_of(text: str, tokenizer: Tokenizer, n_kept: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """(where each word stands in the text, which tokens of the row it is) of the tokens that were kept."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    places = np.arange(len(encoding))
    places = np.concatenate((places[: n_kept - n_kept // 2], places[len(places) - n_kept // 2 :]))
    words: dict[int, list[int]] = {}
    for token, place in enumerate(places, 1):  # token 0 is [CLS]
        word = encoding.word_ids[place]  # None for a special token that stands in the text
        words.setdefault(-token if word is None else word, []).append(token)
    spans = [[encoding.offsets[places[token - 1]] for token in tokens] for tokens in words.values()]
    return [(parts[0][0], parts[-1][1]) for parts in spans], [np.array(t) for t in words.values()]


def score(logits: Tensor, wanted: int | None) -> Tensor:
    """The log-odds of a class, (S, n_labels) to (S,); or the number that was predicted."""
    if wanted is None:
        return logits[:, 0]
    others = [i for i in range(logits.shape[1]) if i != wanted]
    return logits[:, wanted] - logits[:, others].logsumexp(1)


def path_gradient(model: Classifier, row: Tensor, base: Tensor, wanted: int | None, n_points: int) -> Tensor:
    """The mean gradient of the score to the embeddings, at the midpoints of n_points pieces of the straight
    way from base (L, d_model) to the row's own: (L, d_model)."""
    embed, length = model.model.embeddings.tok_embeddings, len(row)
    end, total = embed(row[:, 0]).detach(), torch.zeros_like(base)
    at_once = max(1, POINT_TOKENS // length)
    for alphas in ((torch.arange(n_points, device=row.device) + 0.5) / n_points).split(at_once):
        points = base + alphas[:, None, None] * (end - base)  # (P, L, d_model)
        points = points.flatten(0, 1).requires_grad_()
        handle = embed.register_forward_hook(lambda *_, points=points: points)
        starts = torch.arange(len(alphas) + 1, dtype=torch.int32, device=row.device) * length
        ids, types = row.repeat(len(alphas), 1).T
        logits = model(ids, starts, length, types)
        handle.remove()
        (gradient,) = torch.autograd.grad(score(logits, wanted).sum(), points)
        total += gradient.view(len(alphas), length, -1).sum(0)
    return total / n_points


def explain(
    model: Classifier, tokenizer: Tokenizer, names: list[str] | None, text: str, wanted: int | None = None
) -> Explained:
    """Attributions of one text, by ever more points until they sum up."""
    device, embed = next(model.parameters()).device, model.model.embeddings.tok_embeddings
    example = labels.LabeledDataset([text], None, np.zeros(1), names)
    (coded,), _ = labels.encode(example, tokenizer, model.config.max_len)
    row, ends = torch.from_numpy(coded).to(device), torch.tensor([0, len(coded)], dtype=torch.int32)
    masked = row.clone()
    masked[1:-1, 0] = special_ids(tokenizer)["mask"]
    with torch.no_grad():
        logits, blank = (model(x[:, 0], ends.to(device), len(x), x[:, 1]) for x in (row, masked))
    if names and wanted is None:
        wanted = int(logits.argmax())
    base, difference = embed(masked[:, 0]).detach(), float(score(logits, wanted) - score(blank, wanted))
    n_points, gap = FEWEST_POINTS // 2, np.inf
    while gap > LARGEST_GAP and n_points < MOST_POINTS:
        n_points *= 2
        gradient = path_gradient(model, row, base, wanted, n_points)
        of_tokens = ((embed(row[:, 0]).detach() - base) * gradient).sum(1).cpu().numpy()  # (L,)
        gap = abs(of_tokens.sum() - difference) / max(1e-9, np.abs(of_tokens).sum())
    spans, members = words_of(text, tokenizer, len(coded) - 2)
    values = np.array([of_tokens[m].sum() for m in members])
    number = f"{logits[0, 0]:.4g}"
    answer = f"{names[wanted]} {logits.softmax(-1)[0, wanted]:.3f}" if names else number
    return Explained(text, coded, spans, values, members, wanted, answer, float(gap))


# --------------------------------------------------------------------------------------------------- shown


def pieces(found: Explained) -> list[tuple[str, float]]:
    """The whole text in pieces with their strength, from -1 to 1; 0 between words."""
    strongest, shown, end = max(1e-9, float(np.abs(found.values).max(initial=0))), [], 0
    for (first, last), value in zip(found.spans, found.values, strict=True):
        shown += [(found.text[end:first], 0.0), (found.text[first:last], float(value) / strongest)]
        end = last
    return [*shown, (found.text[end:], 0.0)]


def as_text(found: Explained, coloured: bool) -> str:
    """The coloured text, or where there are no colours its words with their attributions."""
    if not coloured:
        words = zip(found.spans, found.values, strict=True)
        shown = "  ".join(f"{found.text[first:last]} {value:+.2f}" for (first, last), value in words)
        return f"{found.answer}\t{shown}"
    out = ""
    for text, strength in pieces(found):
        shade = [round(c * abs(strength)) for c in (FOR if strength > 0 else AGAINST)]
        painted = f"\x1b[48;2;{shade[0]};{shade[1]};{shade[2]};38;2;255;255;255m{text}\x1b[0m"
        out += painted if abs(strength) > 0.05 else text
    return f"{found.answer}\t{out}"


# --------------------------------------------------------------------------------------------------- check


def check(
    model: Classifier, tokenizer: Tokenizer, names: list[str], texts: list[str], seed: int
) -> dict[str, Any]:
    """Remove the words with the highest attributions, or as many at random, and see what becomes of the
    probability: {shares, named, random: its mean at each; difference, interval: of the mean over the shares,
    random less named, paired, with the 95% of it by a bootstrap over the texts}."""
    rng, rows, classes = np.random.default_rng([seed, 7]), [], []
    for text in tqdm(texts, "explaining", disable=None, leave=False):
        found = explain(model, tokenizer, names, text)
        orders = [np.argsort(-found.values, kind="stable")]
        orders += [rng.permutation(len(found.values)) for _ in range(RANDOM_ORDERS)]
        classes.append(found.wanted)
        for order, share in itertools.product(orders, (0, *REMOVED)):
            gone = [found.tokens[i] for i in order[: round(share * len(order))]]
            rows.append(np.delete(found.row, np.concatenate(gone) if gone else [], axis=0))
    logits, device = [], next(model.parameters()).device
    for which, inputs in labels.batches(rows, np.arange(len(rows)), 64, device):
        with torch.no_grad():
            logits.append(model(*inputs)[: len(which)].softmax(-1).cpu())
    probabilities = torch.cat(logits).view(len(texts), 1 + RANDOM_ORDERS, 1 + len(REMOVED), -1)
    of_class = torch.stack([p[..., c] for p, c in zip(probabilities, classes, strict=True)]).numpy()
    named, at_random = of_class[:, 0], of_class[:, 1:].mean(1)  # (texts, shares)
    differences = (at_random - named)[:, 1:].mean(1)
    resampled = differences[rng.integers(len(texts), size=(RESAMPLES, len(texts)))].mean(1)
    curves = {"named": named.mean(0).tolist(), "random": at_random.mean(0).tolist()}
    interval = np.quantile(resampled, (0.025, 0.975)).tolist()
    return {"shares": [0, *REMOVED], **curves, "difference": float(differences.mean()), "interval": interval}


def texts_to_check(args: argparse.Namespace) -> list[str]:
    """Texts of at least two words, drawn with the seed."""
    texts = [text for _, text in read_lines(args.file)] if args.file else labels.load(args.data)[1].texts
    texts = [text for text in texts if len(text.split()) > 1]
    if len(texts) < 2:
        raise UserError(f"{args.file}: too few texts of two words and more to compare on")
    chosen = np.random.default_rng([args.seed, 8]).permutation(len(texts))[: args.sentences]
    return [texts[i] for i in np.sort(chosen)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print explanations, or the check of them, and return them."""
    args = parse(argv)
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, names = model_folder.open_model(args.model, device)
    if not isinstance(model, Classifier):
        raise UserError(f"{args.model}: it fills masks; a classifier, of finetune.py, is wanted")
    if names is None and (args.check or args.wanted):
        raise UserError(f"{args.model}: it predicts a number; --check and --class are for classes")
    if args.wanted and args.wanted not in names:
        raise UserError(f"--class {args.wanted}: the classes are {', '.join(names)}")
    if args.check:
        texts = texts_to_check(args)
        found = check(model, tokenizer, names, texts, args.seed)
        print(f"probability of the answer to {len(texts)} texts without a share of their words")
        print("removed   " + "".join(f"{share:7.0%}" for share in found["shares"]))
        for kind in ("named", "random"):
            print(f"{kind:10}" + "".join(f"{p:7.3f}" for p in found[kind]))
        low, high = found["interval"]
        told = "they name the words that count" if low > 0 else "no better than chance can be shown"
        print(f"random less named {found['difference']:.3f}, 95% of it {low:.3f} to {high:.3f}: {told}")
        return found
    wanted = names.index(args.wanted) if args.wanted else None
    answers, sections = [], []
    for i, text in enumerate(args.texts, 1):
        if not text.strip():
            raise UserError(f"text {i}: no text")
        answers.append(found := explain(model, tokenizer, names, text, wanted))
        if found.gap > LARGEST_GAP:
            wrong = f"after {MOST_POINTS} points the attributions miss their sum by {found.gap:.1%}"
            print(f"explain.py: text {i}: {wrong}", file=sys.stderr)
        print(as_text(found, sys.stdout.isatty()), flush=True)
        if args.html:
            tokens = [tokenizer.id_to_token(i) for i in found.row[:, 0]]
            shown = (found.answer, pieces(found), found.gap, tokens)
            sections.append(section(*shown, attention_maps(model, found.row)))
    if args.html:
        disk.write_file(args.html, page(sections).encode())
    return {"answers": answers}


if __name__ == "__main__":
    run_script(main)
