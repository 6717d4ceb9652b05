"""Confidence intervals of scores and of their paired differences.

Axes: S pretraining seeds, D draws of the labels, N test examples.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds, draws and test examples with its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Blocks:
    """Test examples in blocks of neighbours, whose errors are alike: reviews of one film, say."""

    classes: list[np.ndarray]  # the examples of each class, in the order of the file
    length: int

    def variance_of_mean(self, values: np.ndarray) -> float:
        """The variance of the mean of values (N,) over other test examples.

        Within a class it is the variance of the circular block bootstrap (Politis & Romano 1992),
        which needs no resampling: the mean square of the sums of all blocks, corrected for the
        estimated mean. The shares of the classes vary as in a random sample.
        """
        total = 0.0
        for members in self.classes:
            n = len(members)
            length = min(self.length, max(1, n // 4))
            center = values[members].mean()
            deviations = values[members] - center
            sums = np.cumsum(np.concatenate((deviations, deviations[:length])))
            of_blocks = sums[length:] - sums[:-length]
            total += of_blocks @ of_blocks / length * n / max(1, n - length)
            total += n * (center - values.mean()) ** 2
        return total / len(values) ** 2


def choose_blocks(errors: list[np.ndarray], targets: np.ndarray) -> Blocks:
    """Blocks four times as long as the errors of neighbours are correlated: blocks of length L
    give the correlation at lag k only the weight 1 - k / L.

    Its range is the initial positive sequence of Geyer (1992, "Practical Markov Chain Monte
    Carlo", section 3.3): it ends where the autocorrelations of two successive lags add up to zero
    or less. This also finds correlations that are too weak to be significant at any single lag.

    Args:
        errors: (N,) of each method, whose autocorrelations are averaged.
        targets: (N,) classes, or numbers.
    """
    classes = [np.arange(len(targets))]
    if targets.dtype.kind == "i":
        classes = [np.flatnonzero(targets == label) for label in np.unique(targets)]
    deviations = [[x[members] - x[members].mean() for members in classes] for x in errors]

    def autocorrelation(lag: int) -> float:
        products = [sum(x[:-lag] @ x[lag:] for x in parts) for parts in deviations]
        squares = [sum(x @ x for x in parts) for parts in deviations]
        return sum(p / max(s, 1e-12) for p, s in zip(products, squares, strict=True))

    lag = 1
    longest = max(map(len, classes)) // 16
    while lag + 2 <= longest and autocorrelation(lag + 1) + autocorrelation(lag + 2) > 0:
        lag += 2
    return Blocks(classes, 4 * lag)


@dataclass(frozen=True)
class Score:
    """A metric of one method for each seed, draw and test example. Differences are paired in the
    draws and examples; methods without pretraining have one seed."""

    values: np.ndarray  # (S, D, N)
    blocks: Blocks

    def __sub__(self, other: "Score") -> "Score":
        return Score(self.values - other.values, self.blocks)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def estimate(self, maximum: float = math.inf, n_intervals: int = 1) -> Estimate:
        """The mean and its interval over seeds, draws and test examples, which are crossed.

        The variance of the mean is the sum of a component of each. That of the seeds (and of the
        draws) is the variance of their means, less what the finite test set explains of it. The
        interval is Student's with the degrees of freedom of Satterthwaite (1946, "An Approximate
        Distribution of Estimates of Variance Components"). A single seed or draw has no component:
        the interval then holds for this seed or draw.

        Args:
            maximum: That of the metric, at which the interval ends.
            n_intervals: From how many comparisons this one was selected by its result: all of
                them then hold at once (Bonferroni).
        """
        n_blocks = self.values.shape[2] / self.blocks.length
        variance = self.blocks.variance_of_mean(self.values.mean((0, 1)))
        squares = variance**2 / n_blocks
        for axis in (1, 0):  # the means of each seed, (S, N), and of each draw, (D, N)
            means = self.values.mean(axis)
            n = len(means)
            if n > 1:
                deviations = means - means.mean(0)
                observed = (deviations.mean(1) ** 2).sum() / (n - 1) / n
                explained = sum(map(self.blocks.variance_of_mean, deviations)) / (n - 1) / n
                component = max(0.0, observed - explained)
                variance += component
                squares += component**2 / (n - 1)

        if variance == 0:
            return Estimate(self.mean, self.mean, self.mean)
        quantile = 1 - (1 - CONFIDENCE) / 2 / n_intervals
        half = float(special.stdtrit(variance**2 / squares, quantile)) * math.sqrt(variance)
        return Estimate(self.mean, self.mean - half, min(self.mean + half, maximum))
