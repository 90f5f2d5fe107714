"""Uncertainty of success rates and spread of timings; pure functions."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class Spread(NamedTuple):
    """Median, 95th percentile and largest value, in the unit of what went in."""

    median: float
    p95: float
    largest: float


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    r"""Score interval of a success probability.

    Centre :math:`(\hat p + z^2/2n) / (1 + z^2/n)`, half-width
    :math:`z \sqrt{\hat p (1-\hat p)/n + z^2/4n^2} / (1 + z^2/n)`. Unlike the normal approximation it never leaves
    [0, 1] and says something sensible at 0 and at `trials` successes.

    Args:
        successes: 0 to `trials`.
        trials: Episodes, 0 or more; without any the interval is [0, 1].
        confidence: Coverage, above 0 and below 1.

    Raises:
        ValueError: Counts or confidence out of range.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and the {trials} trials, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, got {confidence}")
    if trials == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * (rate * (1 - rate) / trials + z * z / (4 * trials * trials)) ** 0.5 / scale
    # At the ends the formula is exact but for rounding, which must not exclude the observed rate.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(low, high)


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile `q` (0 to 1) with linear interpolation between sorted values.

    Raises:
        ValueError: No values, or `q` out of range.
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"a quantile needs values and a q from 0 to 1, got {len(values)} values and {q}")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> Spread:
    """Median, 95th percentile and maximum of at least one value."""
    return Spread(quantile(values, 0.5), quantile(values, 0.95), max(values))
