"""Figures that a reader can trust: intervals, comparisons, label equivalents, calibration, advice.

Axes: D draws, N test examples, B resamples of them, K classes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

N_SAMPLES = 4000
LEVEL = 0.95
N_BINS = 15  # of confidence: Guo et al. 2017's


@dataclass(frozen=True)
class Estimate:
    """A mean over draws and test examples, and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """One figure of a row: of each draw (D,), and of each resample of the test examples, the mean of the
    draws (B,). Differences of two scores are paired, in draws and in examples."""

    by_draw: np.ndarray
    by_sample: np.ndarray

    def __sub__(self, other: "Score") -> "Score":
        return Score(self.by_draw - other.by_draw, self.by_sample - other.by_sample)

    def estimate(self) -> Estimate:
        """Bootstrap over examples and over draws, whose deviations add up. Those of few draws are widened, by
        sqrt(D / (D - 1)) for the spread and by t over normal quantiles for not knowing it (Hesterberg 2015,
        'What teachers should know about the bootstrap', section 3.2); one draw has none, and the interval
        then speaks of the examples alone."""
        n_draws, mean = len(self.by_draw), float(self.by_draw.mean())
        deviations = self.by_sample - mean
        if n_draws > 1:
            rng, quantile = np.random.default_rng(0), (1 + LEVEL) / 2
            chosen = rng.integers(n_draws, size=(len(deviations), n_draws))
            widened = math.sqrt(n_draws / (n_draws - 1)) * special.stdtrit(n_draws - 1, quantile)
            drawn = self.by_draw[chosen].mean(1) - mean
            deviations = deviations + drawn * widened / special.ndtri(quantile)
        low, high = np.quantile(deviations, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Estimate(mean, mean + float(low), mean + float(high))

    def level(self) -> Estimate:
        """The estimate of a score that is at most 1, which draws that differ widely may forget."""
        found = self.estimate()
        return Estimate(found.mean, found.low, min(found.high, 1.0))


@functools.lru_cache(2)
def resamples(n_examples: int) -> np.ndarray:
    """How often each of B resamples holds each example, (B, N); the same for every row, so that they pair."""
    rng = np.random.default_rng(0)
    return rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), N_SAMPLES).astype(np.float32)


def mean_score(values: np.ndarray, weights: np.ndarray) -> Score:
    """The score that is a mean of what each example has, (D, N): of its being right, or of 1 - its squared
    error over the variance, whose mean is R squared."""
    return Score(values.mean(1), weights @ values.mean(0) / values.shape[1])


def macro_f1(predictions: np.ndarray, targets: np.ndarray, n_classes: int, weights: np.ndarray) -> Score:
    """F1 of each class, their mean over the classes that occur or are predicted, as scikit-learn has it."""

    def f1(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:  # (..., K) to (...)
        there = (predicted + true) > 0
        return np.sum(2 * hits / np.maximum(predicted + true, 1), -1) / there.sum(-1)

    one_hot = np.eye(n_classes, dtype=np.float32)
    true, by_draw, by_sample = one_hot[targets], [], []
    for predicted in one_hot[predictions]:  # (N, K) of each draw
        parts = (predicted * true, predicted, true)
        by_draw.append(f1(*(part.sum(0) for part in parts)))
        by_sample.append(f1(*(weights @ part for part in parts)))
    return Score(np.array(by_draw), np.mean(by_sample, 0))


def verdict(one: str, other: str, difference: Score) -> str:
    """The sentence that the interval of `one` less `other` allows."""
    found, n_draws = difference.estimate(), len(difference.by_draw)
    if found.low <= 0 <= found.high:
        draws = f"{n_draws} draw{'s' if n_draws > 1 else ''}"
        return f"{one} and {other}: no difference that {draws} can show, {found}"
    return f"{one} is {'ahead of' if found.low > 0 else 'behind'} {other}: {found}"


def label_equivalent(budgets: Sequence[int], means: Sequence[float], wanted: float) -> str:
    """How many labels a row with these means needs for the `wanted` one, interpolated between budgets on a
    logarithmic scale."""
    if means[0] >= wanted:
        return f"at most {budgets[0]:,}"
    for (n, low), (after, high) in zip(
        zip(budgets, means, strict=True), zip(budgets[1:], means[1:], strict=True), strict=False
    ):
        if low < wanted <= high:
            found = n * (after / n) ** ((wanted - low) / (high - low))
            digits = 1 - math.floor(math.log10(found))  # two that count: more would pretend
            return f"about {round(found, digits):,.0f}"
    return f"more than the {budgets[-1]:,} there are"


def calibration(probabilities: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Expected calibration error of the likeliest class (Guo et al. 2017, arXiv 1706.04599, equation 5), and
    (mean confidence, accuracy, share of the examples) of each bin that has any, (bins, 3)."""
    confidence, right = probabilities.max(-1).ravel(), (probabilities.argmax(-1) == targets).ravel()
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    counts = np.bincount(bins, minlength=N_BINS)
    sums = np.stack([np.bincount(bins, weights=x, minlength=N_BINS) for x in (confidence, right)])
    some = counts > 0
    confident, accurate = sums[:, some] / counts[some]
    share = counts[some] / counts.sum()
    error = float(np.sum(share * np.abs(confident - accurate)))
    return error, np.stack((confident, accurate, share), axis=1)


def advise(
    budgets: Sequence[int], scores: dict[str, dict[int, Score]], milliseconds: dict[str, float]
) -> list[str]:
    """Which row to take: of those that the best one is not shown to be ahead of, the one that answers
    soonest; by the number of labels, and by the time that an answer may take."""

    def mean(row: str, budget: int) -> float:
        return float(scores[row][budget].by_draw.mean())

    takes: list[str] = []
    for budget in budgets:
        there = [row for row in scores if budget in scores[row]]
        best = max(there, key=lambda row, budget=budget: mean(row, budget))
        behind = {row: (scores[best][budget] - scores[row][budget]).estimate() for row in there}
        tied = [row for row in there if row == best or behind[row].low <= 0]
        takes.append(min(tied, key=lambda row, budget=budget: (milliseconds[row], -mean(row, budget))))
    sentences, first = [], 0
    for i, row in enumerate(takes):
        if i + 1 == len(takes) or takes[i + 1] != row:
            where = f"{budgets[first]:,} to {budgets[i]:,}" if i > first else f"{budgets[i]:,}"
            sentences.append(f"With {where} labels take {row}: {milliseconds[row]:.2g} ms a text.")
            first = i + 1
    most, chosen = budgets[-1], takes[-1]
    limit = milliseconds[chosen]
    faster = [row for row in scores if most in scores[row] and milliseconds[row] < limit]
    for row in sorted(faster, key=lambda row: (-mean(row, most), milliseconds[row])):
        if milliseconds[row] < limit:
            lost = (scores[chosen][most] - scores[row][most]).estimate()
            spent = f"{row} ({milliseconds[row]:.2g} ms), which costs {lost} with {most:,} labels"
            sentences.append(f"Where an answer must come within {limit:.2g} ms, take {spent}.")
            limit = milliseconds[row]
    return sentences
