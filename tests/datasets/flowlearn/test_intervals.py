"""Intervals against known values and by coverage."""

import random

import pytest

from headrace.datasets.flowlearn.intervals import bootstrap_mean, paired_difference, sign_test, wilson


def test_wilson_against_hand_values():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_sign_test_against_hand_values():
    assert sign_test(0, 0) == 1.0
    assert sign_test(1, 9) == pytest.approx(2 * 11 / 1024)


def test_bootstrap_covers_the_true_mean():
    rng = random.Random(0)
    hits = 0
    for seed in range(60):
        low, high = bootstrap_mean([rng.random() for _ in range(80)], draws=300, seed=seed)
        hits += low <= 0.5 <= high
    assert hits >= 51


def test_pairing_sees_what_separate_intervals_cannot():
    rng = random.Random(1)
    a = [float(rng.random() < 0.5) for _ in range(400)]
    b = [1.0 if x == 0.0 and rng.random() < 0.08 else x for x in a]
    result = paired_difference(a, b)
    assert result.interval.low > 0 and result.worse == 0 and result.p_value < 0.01
    assert wilson(sum(a), 400).high > wilson(sum(b), 400).low


def test_clusters_widen_the_interval():
    a = [0.0] * 400
    b = [float((i // 8) % 2) for i in range(400)]
    alone = paired_difference(a, b).interval
    together = paired_difference(a, b, clusters=[str(i // 8) for i in range(400)]).interval
    assert together.high - together.low > 2 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [])
