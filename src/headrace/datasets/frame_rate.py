"""When two frame rates count as the same: one tolerance for videos, labels, pretraining and demonstrations."""

from collections.abc import Iterable

TOLERANCE = 0.02  # cameras called 30 Hz give 29.97; the next usual rates, 24 and 25, are 4 % apart


def same_rate(a: float, b: float) -> bool:
    """Whether two rates [Hz] are within 2 % of each other."""
    return abs(a / b - 1) <= TOLERANCE


def common_rate(rates: Iterable[float | None]) -> float | None:
    """The first of several rates [Hz] that are all the same by `same_rate`; None if they are not, or one is None."""
    given = list(rates)
    known = [rate for rate in given if rate is not None]
    if not known or len(known) < len(given) or not same_rate(max(known), min(known)):
        return None
    return known[0]
