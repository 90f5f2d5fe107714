"""Chunks on a time line: no jump where one takes over, interpolation between rows, nothing beyond the end."""

import numpy as np
import pytest

from headrace.robot.action_queue import ActionQueue, soft_mask

PERIOD = 0.1


def line(start: float, slope: float, rows: int) -> np.ndarray:
    return (start + slope * np.arange(rows))[:, None]


def test_targets_are_linear_between_rows_and_absent_after_the_last():
    queue = ActionQueue(PERIOD)
    assert queue.at(5.0).target is None
    queue.merge(line(0, 1, 5), start=1.0, now=1.0)
    assert queue.at(1.25).target == pytest.approx([2.5])
    assert queue.at(1.25).covered == pytest.approx(0.15)
    assert queue.at(1.401).target is None and queue.at(1.401).covered == 0
    assert len(queue.leftover(1.2)) == 3


def test_the_rows_that_came_too_late_are_skipped():
    queue = ActionQueue(PERIOD)
    queue.merge(line(0, 1, 10), start=0.0, now=0.32)
    assert queue.at(0.4).target == pytest.approx([4.0])
    assert queue.at(0.9).target == pytest.approx([9.0])


@pytest.mark.parametrize("delay", [0.0, 0.13, 0.31])
def test_a_new_chunk_takes_over_without_a_jump_and_wins_in_the_end(delay):
    queue = ActionQueue(PERIOD)
    queue.merge(line(0, 0, 20), start=0.0, now=0.0)
    times = np.arange(0.0, 2.9, 0.02)
    seen = []
    for now in times:
        if abs(now - 0.5) < 1e-9:
            queue.merge(line(10, 0, 25), start=0.5 - delay, now=0.5)
        target = queue.at(now).target
        if target is not None:
            seen.append(target[0])
    assert np.abs(np.diff(seen)).max() < 10 * 0.02 / PERIOD / 5  # faded over many rows, never a step of 10
    assert seen[-1] == pytest.approx(10.0)


def test_the_same_plan_again_changes_nothing():
    queue, plan = ActionQueue(PERIOD), line(0, 1, 40)
    queue.merge(plan, start=0.0, now=0.0)
    for step in range(1, 20):
        now = step * 0.05
        before = queue.at(now).target
        first = int(step // 2)
        queue.merge(plan[first:], start=first * PERIOD, now=now)
        assert queue.at(now).target == pytest.approx(before)


def test_soft_mask_is_one_then_falls_to_nothing():
    weights = soft_mask(3, 12)
    assert (weights[:3] == 1).all() and (np.diff(weights[2:]) < 0).all() and 0 < weights[-1] < 0.1
    c = (12 - 5) / (12 - 3 + 1)
    assert weights[5] == pytest.approx(c * (np.exp(c) - 1) / (np.e - 1))
    with pytest.raises(ValueError):
        soft_mask(-1, 3)
