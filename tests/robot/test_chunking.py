import numpy as np
import pytest

from headrace.contracts import ActionChunk, ActionSpec, Policy
from headrace.robot.chunking import RecedingHorizon, TemporalEnsemble

SPEC = ActionSpec(names=("x",), frame="joint", rotation="none", gripper="none", rate=10.0)


class Counting:
    """The chunk of call k is k, k + 0.1, k + 0.2, ..."""

    spec = SPEC

    def __init__(self) -> None:
        self.calls = 0

    def reset(self, slot: int, *, seed: int) -> None:
        self.calls = 0

    def act(self, observations, slots) -> ActionChunk:
        chunk = self.calls + 0.1 * np.arange(4, dtype=np.float32)[:, None]
        self.calls += 1
        return ActionChunk(np.stack([chunk] * len(slots)), 1.0)


def test_receding_horizon_cuts_the_chunk():
    policy = RecedingHorizon(Counting(), 2)
    np.testing.assert_allclose(policy.act([None], [0]).actions, [[[0.0], [0.1]]])
    assert isinstance(policy, Policy)
    with pytest.raises(ValueError, match="cannot execute 5 actions of a chunk of 4"):
        RecedingHorizon(Counting(), 5).act([None], [0])
    with pytest.raises(ValueError, match="at least 1"):
        RecedingHorizon(Counting(), 0)


def test_ensemble_averages_what_past_chunks_said_about_now():
    policy = TemporalEnsemble(Counting(), decay=0.0)
    said = [policy.act([None], [0]).actions[0, 0, 0] for _ in range(6)]
    # At step n the chunks of calls max(0, n-3)..n speak; call k says k + 0.1 (n - k) about it.
    expected = [np.mean([k + 0.1 * (n - k) for k in range(max(0, n - 3), n + 1)]) for n in range(6)]
    np.testing.assert_allclose(said, expected, rtol=1e-6)


def test_a_positive_decay_favours_the_oldest():
    flat, decayed = TemporalEnsemble(Counting(), decay=0.0), TemporalEnsemble(Counting(), decay=1.0)
    for _ in range(3):
        plain, aged = flat.act([None], [0]).actions, decayed.act([None], [0]).actions
    assert aged.item() < plain.item()


def test_reset_forgets_a_slot_only():
    policy = TemporalEnsemble(Counting(), decay=0.0)
    policy.act([None, None], [0, 1])
    policy.reset(0, seed=1)
    actions = policy.act([None, None], [0, 1]).actions[:, 0, 0]
    assert actions[0] == 0.0 and actions[1] == pytest.approx(0.05)  # call 0 again; slot 1 remembers 0.1 beside 0.0
