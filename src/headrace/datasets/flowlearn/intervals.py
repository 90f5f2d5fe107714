"""Intervals for shares, means and paired differences. Plain numpy; every random draw has a seed.

Sources: Wilson 1927 (score interval); Efron 1979 (percentile bootstrap); McNemar 1947 with the exact binomial test.
"""

import math
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """Two-sided 95 % interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """B minus A on the same questions.

    Attributes:
        difference: Mean of B minus mean of A.
        interval: Percentile bootstrap over questions (or clusters of them), 95 %.
        better, worse: Questions on which B scores higher, lower.
        p_value: Exact two-sided sign test on `better` and `worse` (McNemar's for 0/1 scores).
        count: Number of pairs.
    """

    difference: float
    interval: Interval
    better: int
    worse: int
    p_value: float
    count: int  # type: ignore[assignment]


def wilson(successes: float, count: int) -> Interval:
    """Wilson's score interval for a share; (0, 1) when nothing was counted."""
    if count == 0:
        return Interval(0.0, 1.0)
    share, z2 = successes / count, Z95 * Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def bootstrap_mean(values: list[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean; the value itself when there is one, (0, 1) when there is none."""
    if not values:
        return Interval(0.0, 1.0)
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(draws)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))


def mean_interval(values: list[float]) -> Interval:
    """Wilson's interval for 0/1 values, the bootstrap's for others."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(sum(values), len(values))
    return bootstrap_mean(values)


def sign_test(better: int, worse: int) -> float:
    """Exact two-sided p-value that `better` and `worse` are equally likely; 1 when both are 0."""
    count, k = better + worse, min(better, worse)
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, i) for i in range(k + 1)) / 2**count
    return min(1.0, 2 * tail)


def paired_difference(
    a: list[float], b: list[float], *, clusters: list[str] | None = None, draws: int = 4000, seed: int = 0
) -> PairedDifference:
    """Compare two runs on the same questions.

    Args:
        a, b: Scores in the same order.
        clusters: A name per question, such as its picture; questions of one cluster are drawn together, because
            answers on one picture are not independent.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: The lists differ in length or are empty.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired runs need the same questions, got {len(a)} and {len(b)} scores")
    gap = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    names = clusters if clusters is not None else [str(i) for i in range(len(a))]
    _, which = np.unique(np.asarray(names), return_inverse=True)
    sums = np.bincount(which, weights=gap)
    sizes = np.bincount(which).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    better, worse = int((gap > 0).sum()), int((gap < 0).sum())
    return PairedDifference(
        float(gap.mean()), Interval(float(low), float(high)), better, worse, sign_test(better, worse), len(a)
    )
