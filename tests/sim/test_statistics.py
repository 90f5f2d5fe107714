import numpy as np
import pytest

from headrace.sim.statistics import Interval, quantile, spread, wilson_interval


@pytest.mark.parametrize(
    "successes, trials, low, high",
    # Solutions of (p - rate)^2 = z^2 p (1 - p) / n, as tabled for z = 1.96.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448),
     (1, 1, 0.2065, 1.0)],
)  # fmt: skip
def test_wilson_has_its_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_ends_solve_the_score_equation():
    for successes in range(1, 24):
        for end in wilson_interval(successes, 24, confidence=0.9):
            score = (successes / 24 - end) ** 2 * 24 / (end * (1 - end))
            assert score == pytest.approx(1.6448536**2, rel=1e-6)


def test_interval_holds_the_rate_and_mirrors():
    for trials in (1, 7, 50):
        for successes in range(trials + 1):
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
            mirrored = wilson_interval(trials - successes, trials)
            assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high))


def test_nothing_is_known_without_trials():
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)


def test_coverage_is_near_the_confidence():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = wilson_interval(int(random.binomial(100, 0.7)), 100)
        hits += low <= 0.7 <= high
    assert 0.93 < hits / 2000 < 0.97


@pytest.mark.parametrize("successes, trials", [(-1, 5), (6, 5), (1, 0)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="successes must be between"):
        wilson_interval(successes, trials)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=1.0)


def test_quantile_is_numpys():
    values = np.random.default_rng(1).normal(size=37).tolist()
    for q in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))
    assert spread(values) == pytest.approx((np.median(values), np.quantile(values, 0.95), max(values)))
    with pytest.raises(ValueError, match="needs values"):
        quantile([], 0.5)
