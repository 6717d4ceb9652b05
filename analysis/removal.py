"""The check of explain.py: do attributed words matter more than random words?"""

import argparse
import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from analysis.evaluation import forward_all
from analysis.statistics import Blocks, Score
from files import streams
from files.disk import UserError
from files.readers import read_lines
from files.reviews import load_reviews
from model import Classifier

SHARES = (0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of a text's words that are removed
N_RANDOM_ORDERS = 5


def sample_texts(args: argparse.Namespace) -> list[str]:
    """The texts for --check, of at least two words each."""
    if args.file:
        lines = [text for _, text in read_lines(args.file)]
    else:
        lines = [text for text, _ in load_reviews()[args.data]["test"]]
    texts = [text for text in lines if len(text.split()) > 1]
    if len(texts) < 2:
        raise UserError(f"{args.file}: at least 2 texts of at least two words are needed")
    rng = np.random.default_rng([args.seed, streams.CHECKED_TEXTS])
    sample = rng.permutation(len(texts))[: args.sentences]
    return [texts[i] for i in np.sort(sample)]


def compare_removals(model: Classifier, explanations: list, seed: int) -> dict[str, Any]:
    """Remove the words with the highest attributions from texts, and as many random words.

    Args:
        explanations: An `explain.Explanation` of each text.
        seed: Of the random words.

    Returns:
        shares: SHARES.
        attributed, random: The mean probability of the answers at each share.
        difference: By how much removing attributed words lowers the probability more than removing
            random words, as a mean over the texts and over the shares above 0.
        interval: Its 95% confidence interval over the texts.
    """
    rng = np.random.default_rng([seed, streams.WORD_REMOVAL])
    rows = []
    for explanation in explanations:
        n_words = len(explanation.tokens)
        orders = [np.argsort(-explanation.attributions, kind="stable")]
        orders += [rng.permutation(n_words) for _ in range(N_RANDOM_ORDERS)]
        for order, share in itertools.product(orders, SHARES):
            removed = [explanation.tokens[i] for i in order[: round(share * n_words)]]
            rows.append(np.delete(explanation.row, np.concatenate([[], *removed]).astype(int), 0))

    outputs = forward_all(model, rows, np.arange(len(rows)), contextlib.nullcontext(), model)
    probabilities = model.probabilities(torch.from_numpy(outputs)).numpy()
    shape = (len(explanations), 1 + N_RANDOM_ORDERS, len(SHARES), -1)
    of_texts = zip(probabilities.reshape(shape), explanations, strict=True)
    probabilities = np.stack([p[..., explanation.class_index] for p, explanation in of_texts])

    attributed = probabilities[:, 0]  # (texts, shares)
    random = probabilities[:, 1:].mean(1)
    differences = (random - attributed)[:, 1:].mean(1)  # (texts,)
    texts = Blocks([np.arange(len(differences))], length=1)
    mean, *interval = Score(differences[None, None], texts).estimate()
    return {
        "shares": list(SHARES),
        "attributed": attributed.mean(0).tolist(),
        "random": random.mean(0).tolist(),
        "difference": mean,
        "interval": interval,
    }


def print_check(results: dict[str, Any]) -> None:
    """Print what `compare_removals` returned."""
    print("probability of the answer without a share of the words")
    print("removed     " + "".join(f"{share:7.0%}" for share in results["shares"]))
    for method in ("attributed", "random"):
        print(f"{method:12}" + "".join(f"{p:7.3f}" for p in results[method]))
    low, high = results["interval"]
    change = f"lowers the probability by {results['difference']:.3f} more"
    interval = f"(95% CI {low:.3f} to {high:.3f})"
    print(f"Removing attributed words {change} than removing random words {interval}.")
