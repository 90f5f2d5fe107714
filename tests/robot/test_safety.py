"""The filter between policy and motors: whatever is asked, every command keeps every limit."""

import json

import numpy as np
import pytest

from headrace.robot.arm import ArmFault
from headrace.robot.safety import SafetyFilter, SafetyLimits

LIMITS = SafetyLimits(
    joints=("a", "b"), low=(-50.0, 0.0), high=(50.0, 30.0), speed=(60.0, 90.0), acceleration=(300.0, 200.0)
)
PERIOD = 1 / 30


def started(limits=LIMITS, at=(0.0, 10.0), **kwargs):
    safety = SafetyFilter(limits, PERIOD, **kwargs)
    safety.start(np.array(at))
    return safety


@pytest.mark.parametrize("seed", range(5))
def test_range_speed_and_acceleration_hold_for_any_requests(seed):
    rng, safety = np.random.default_rng(seed), started()
    commands = [safety.command]
    for _ in range(600):
        jump = rng.uniform(-200, 200, 2)
        request = None if rng.random() < 0.1 else (jump if rng.random() < 0.5 else commands[-1] + jump / 50)
        commands.append(safety.bound(request).command)
    commands = np.array(commands)
    velocity = np.diff(commands, axis=0) / PERIOD
    assert (commands >= LIMITS.low).all() and (commands <= LIMITS.high).all()
    assert (np.abs(velocity) <= np.array(LIMITS.speed) + 1e-6).all()
    assert (np.abs(np.diff(velocity, axis=0)) / PERIOD <= np.array(LIMITS.acceleration) + 1e-6).all()
    assert np.ptp(commands, axis=0).min() > 15  # it did move


def test_a_request_within_the_limits_passes_unchanged():
    safety = started()
    for step in range(1, 100):
        request = np.array([20 * np.sin(step / 30), 10 + 5 * np.sin(step / 40)])
        bounded = safety.bound(request)
    np.testing.assert_allclose(bounded.command, request, atol=1e-9)
    assert bounded.cut == ()


def test_each_cut_is_named():
    safety = started()
    assert set(safety.bound(np.array([400.0, 10.0])).cut) == {"range", "speed", "acceleration"}


def test_none_brings_the_arm_to_rest_within_its_braking_distance():
    safety = started()
    for _ in range(20):
        safety.bound(np.array([50.0, 30.0]))
    before = safety.command
    for _ in range(60):
        safety.bound(None)
    assert np.array_equal(safety.bound(None).command, safety.command)
    assert (safety.command - before <= np.square(LIMITS.speed) / (2 * np.array(LIMITS.acceleration)) + 1e-6).all()


@pytest.mark.parametrize(
    ("reading", "why"),
    [
        ([np.nan, 1.0], "impossible"),
        ([1.0], "impossible"),
        ([80.0, 1.0], "outside their range"),
        ([45.0, 10.0], "jumped"),
    ],
)
def test_impossible_readings_stop(reading, why):
    safety = started()
    with pytest.raises(ArmFault, match=why):
        safety.check(np.array(reading))
    safety.check(np.array([1.0, 11.0]))


def test_a_request_that_is_not_finite_stops():
    with pytest.raises(ArmFault, match="finite"):
        started().bound(np.array([np.inf, 0.0]))


def test_the_gripper_stays_in_its_workspace_and_may_come_back_to_it():
    box = ((-0.2, -1.0, -1.0), (0.2, 1.0, 1.0))
    limits = SafetyLimits(**{**vars(LIMITS), "workspace": box})

    def place(joints):
        return np.array([joints[0] / 100, 0.0, 0.0])

    safety = started(limits, gripper_at=place)
    start = safety.command
    seen = [safety.bound(np.array([45.0, 10.0])) for _ in range(60)]
    velocity = np.diff([start, *(bounded.command for bounded in seen)], axis=0) / PERIOD
    assert (np.abs(np.diff(velocity, axis=0)) / PERIOD <= np.array(LIMITS.acceleration) + 1e-6).all()
    assert max(place(bounded.command)[0] for bounded in seen) <= 0.2 + 1e-9
    assert seen[-1].command[0] > 15 and "workspace" in seen[-1].cut
    outside = started(limits, at=(40.0, 10.0), gripper_at=place)
    for _ in range(60):
        outside.bound(np.array([0.0, 10.0]))
    assert outside.command[0] < 1
    with pytest.raises(ValueError, match="URDF"):
        SafetyFilter(limits, PERIOD)


def test_limits_are_read_from_a_file_and_checked(tmp_path):
    row = {"low": -1, "high": 1, "speed": 2, "acceleration": 3}
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"joints": {"a": row}, "workspace": [[0, 0, 0], [1, 1, 1]]}))
    limits = SafetyLimits.from_json(path)
    assert limits.joints == ("a",) and limits.speed == (2.0,) and limits.workspace[1] == (1.0, 1.0, 1.0)
    path.write_text(json.dumps({"joints": {"a": {"low": 0}}}))
    with pytest.raises(ValueError, match="high"):
        SafetyLimits.from_json(path)
    path.write_text(json.dumps({"joints": {"a": row}, "tolerance": 2, "jump": 9}))
    limits = SafetyLimits.from_json(path)
    assert (limits.tolerance, limits.jump) == (2.0, 9.0)
    path.write_text(json.dumps({"joints": {"a": row}, "work_space": []}))
    with pytest.raises(ValueError, match="unknown keys work_space; known are joints, workspace, tolerance, jump"):
        SafetyLimits.from_json(path)
    path.write_text(json.dumps({"joints": {"a": {**row, "accel": 3}}}))
    with pytest.raises(ValueError, match="unknown keys accel"):
        SafetyLimits.from_json(path)
    for bad in ({"tolerance": -1.0}, {"jump": 0.0}, {"low": (2.0, 40.0)}, {"speed": (0.0, 1.0)}, {"high": (1.0,)}):
        with pytest.raises(ValueError):
            SafetyLimits(**{**vars(LIMITS), **bad})
