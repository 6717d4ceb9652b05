"""Confidence intervals, paired differences and advice for the methods compared.

Axes: D draws of the labels, N test examples, B bootstrap samples of them.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

N_BOOTSTRAP = 4000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over draws and test examples with its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """A metric of one method: its value for each draw (D,), and the mean of the draws for each
    bootstrap sample of the test examples (B,). Differences are paired in both."""

    by_draw: np.ndarray
    by_sample: np.ndarray

    def __sub__(self, other: "Score") -> "Score":
        return Score(self.by_draw - other.by_draw, self.by_sample - other.by_sample)

    @property
    def mean(self) -> float:
        return float(self.by_draw.mean())

    def estimate(self, maximum: float = math.inf) -> Estimate:
        """The mean and a bootstrap interval over test examples and draws, whose deviations add up.

        The deviations of D draws are widened by sqrt(D / (D - 1)) for the biased variance and by
        the ratio of Student's to normal quantiles for its uncertainty (Hesterberg 2015, "What
        Teachers Should Know About the Bootstrap", section 3.2). With one draw, the interval covers
        the test examples alone. It ends at the `maximum` of the metric.
        """
        n_draws = len(self.by_draw)
        deviations = self.by_sample - self.mean

        if n_draws > 1:
            rng = np.random.default_rng(0)
            drawn = rng.integers(n_draws, size=(len(deviations), n_draws))
            quantile = (1 + CONFIDENCE) / 2
            student_to_normal = special.stdtrit(n_draws - 1, quantile) / special.ndtri(quantile)
            widening = math.sqrt(n_draws / (n_draws - 1)) * student_to_normal
            deviations = deviations + widening * (self.by_draw[drawn].mean(1) - self.mean)

        low, high = np.quantile(deviations, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return Estimate(self.mean, self.mean + float(low), min(self.mean + float(high), maximum))


@functools.lru_cache(2)
def bootstrap_counts(n_examples: int) -> np.ndarray:
    """How often each bootstrap sample contains each example, (B, N) float32; the same samples for
    every method, so that differences are paired."""
    rng = np.random.default_rng(0)
    uniform = np.full(n_examples, 1 / n_examples)
    return rng.multinomial(n_examples, uniform, N_BOOTSTRAP).astype(np.float32)


def mean_score(values: np.ndarray, counts: np.ndarray) -> Score:
    """The score of a metric that is the mean of `values` (D, N) over the examples, for accuracy 1
    where the prediction is right and 0 elsewhere; `counts` are `bootstrap_counts`."""
    return Score(values.mean(1), counts @ values.mean(0, dtype=np.float32) / values.shape[1])


def compare(one: str, other: str, difference: Score) -> str:
    """The sentence that the interval of the score of `one` minus that of `other` allows."""
    estimate = difference.estimate()
    if estimate.low <= 0 <= estimate.high:
        n_draws = len(difference.by_draw)
        draws = "1 draw" if n_draws == 1 else f"{n_draws} draws"
        return f"{one} and {other} do not differ significantly with {draws}: {estimate}"
    return f"{one} is {'better' if estimate.low > 0 else 'worse'} than {other}: {estimate}"


def advise(
    scores: dict[str, dict[int, Score]], milliseconds: dict[str, float], n: int
) -> list[str]:
    """Which method to use with n labels, and what each faster one costs.

    The first sentence names the fastest of the methods that are not significantly worse than the
    best one, of scores {method: {number of labels: score}} and times per prediction.
    """
    candidates = {method: cells[n] for method, cells in scores.items() if n in cells}
    best = max(candidates.values(), key=lambda score: score.mean)
    tied = [name for name, score in candidates.items() if (best - score).estimate().low <= 0]
    chosen = min(tied, key=milliseconds.get)
    limit = milliseconds[chosen]
    sentences = [f"With {n:,} labels use {chosen} ({limit:.2g} ms per text)."]
    for name, score in sorted(candidates.items(), key=lambda item: -item[1].mean):
        if milliseconds[name] < limit:
            loss = (candidates[chosen] - score).estimate()
            faster = f"{name} ({milliseconds[name]:.2g} ms)"
            sentences.append(f"If {limit:.2g} ms is too slow, {faster} loses {loss}.")
            limit = milliseconds[name]
    return sentences
