"""The drive loop on a mock arm: it never waits for the policy, and stops for every reason it should."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from headrace.contracts import ActionChunk, ActionSpec, Needs, SpecMismatch
from headrace.robot.action_queue import ActionQueue
from headrace.robot.arm import ArmFault, MockArm
from headrace.robot.drive import DriveConfig, drive
from headrace.robot.safety import SafetyLimits

JOINTS = MockArm().joints
LIMITS = SafetyLimits(
    joints=JOINTS, low=(-100.0,) * 6, high=(100.0,) * 6, speed=(120.0,) * 6, acceleration=(2000.0,) * 6
)


class Wave:
    """Plans a slow sine for every joint from what it sees on the clock; each plan is off by its own error."""

    def __init__(self, seconds: float = 0.1, error: float = 0.0, horizon: int = 40, rate: float = 30.0) -> None:
        self.spec = ActionSpec(names=JOINTS, frame="joint", rotation="none", gripper="open_is_1", rate=rate)
        self.seconds, self.error, self.horizon = seconds, error, horizon
        self.calls, self.rng, self.begin = 0, np.random.default_rng(0), 0.0
        self.instructions = []

    def reset(self, slot, *, seed):
        self.begin = time.perf_counter()

    def act(self, observations, slots):
        now = time.perf_counter() - self.begin
        self.instructions.append(observations[0].instruction)
        time.sleep(self.seconds)
        self.calls += 1
        times = now + np.arange(self.horizon) / self.spec.rate
        plan = 20 * (1 - np.cos(1.5 * times)) + self.rng.uniform(-self.error, self.error)
        return ActionChunk(np.repeat(plan[None, :, None], 6, axis=2).astype(np.float32), self.seconds * 1e3)


def test_the_loop_runs_on_while_the_policy_thinks():
    arm, policy = MockArm(), Wave(seconds=0.3)
    report = drive(arm, policy, LIMITS, DriveConfig(seconds=2.5, instruction="wave"))
    assert report.reason == "done" and policy.calls >= 3
    assert len(report.ticks) > 40  # 75 on an idle machine; waiting for the policy would leave about 20
    assert report.held == 0 and not arm.connected
    assert set(policy.instructions) == {"wave"}
    assert max(tick.sent[0] for tick in report.ticks) > 10


def test_seams_between_disagreeing_plans_are_no_larger_than_steps_within():
    report = drive(MockArm(), Wave(seconds=0.15, error=3.0), LIMITS, DriveConfig(seconds=2.5))
    at_seam, within = report.seams()
    assert len({tick.chunk for tick in report.ticks}) > 3
    assert 0 < at_seam <= 2 * within


def test_commands_keep_the_limits_whatever_the_policy_says():
    class Wild(Wave):
        def act(self, observations, slots):
            return ActionChunk(np.random.default_rng(self.calls).uniform(-500, 500, (1, 20, 6)), 0.0)

    report = drive(MockArm(), Wild(), LIMITS, DriveConfig(seconds=1.0))
    sent = np.array([tick.sent for tick in report.ticks])
    assert (np.abs(sent) <= 100).all()
    assert np.abs(np.diff(sent, axis=0)).max() <= 120 / 30 + 1e-6
    assert any("range" in tick.cut for tick in report.ticks)


def test_a_late_policy_means_holding_and_a_dead_one_stopping():
    report = drive(MockArm(), Wave(seconds=0.5, horizon=6), LIMITS, DriveConfig(seconds=2.0, stall=4.0))
    assert report.reason == "done" and report.held > 5
    assert np.isfinite([tick.sent for tick in report.ticks]).all()
    report = drive(MockArm(), Wave(seconds=3.0), LIMITS, DriveConfig(seconds=5.0, stall=0.4))
    assert "stalled" in report.reason and len(report.ticks) < 60


@pytest.mark.parametrize(
    ("fault", "why"), [("nan_at", "impossible reading"), ("jump_at", "outside"), ("silent_at", "does not answer")]
)
def test_an_arm_that_reports_the_impossible_is_stopped_and_held(fault, why):
    arm = MockArm(**{fault: 12})
    report = drive(arm, Wave(), LIMITS, DriveConfig(seconds=3.0))
    assert why in report.reason and len(report.ticks) <= 12
    np.testing.assert_array_equal(arm.sent[-1], arm.sent[-2] if len(arm.sent) > 1 else arm.sent[-1])
    assert not arm.connected


def test_nan_from_the_policy_stops_before_it_reaches_the_arm():
    class Broken(Wave):
        def act(self, observations, slots):
            chunk = super().act(observations, slots)
            return chunk if self.calls < 2 else ActionChunk(chunk.actions * np.nan, 0.0)

    arm = MockArm()
    report = drive(arm, Broken(), LIMITS, DriveConfig(seconds=3.0))
    assert "not finite" in report.reason
    assert np.isfinite(arm.sent).all()


def test_a_policy_that_raises_ends_the_run_with_its_message():
    class Lost(Wave):
        def act(self, observations, slots):
            raise ConnectionError("lost ws://somewhere")

    assert "lost ws://somewhere" in drive(MockArm(), Lost(), LIMITS, DriveConfig(seconds=2.0)).reason


def test_wrong_conventions_are_refused_before_anything_moves():
    arm, policy = MockArm(), Wave()
    for wrong in (
        {"names": JOINTS[::-1]},
        {"gripper": "close_is_1"},
        {"frame": "base_delta", "names": ("x", "y", "z", "g")},
    ):
        policy.spec = ActionSpec(**{**vars(Wave().spec), **wrong})
        with pytest.raises(SpecMismatch):
            drive(arm, policy, LIMITS, DriveConfig())
    other = SafetyLimits(**{**vars(LIMITS), "joints": JOINTS[::-1]})
    with pytest.raises(ValueError, match="limits are for"):
        drive(arm, Wave(), other, DriveConfig())
    assert arm.sent == []


def test_a_policy_trained_on_lerobots_recordings_fits_the_arm_that_made_them():
    policy = Wave(seconds=0.01)
    policy.spec = replace(policy.spec, names=tuple(f"{name}.pos" for name in JOINTS), gripper="none")
    policy.needs = Needs(state_names=policy.spec.names)
    assert drive(MockArm(), policy, LIMITS, DriveConfig(seconds=0.3)).reason == "done"
    policy.needs = Needs(state_names=tuple(f"state_{index}" for index in range(6)))
    assert drive(MockArm(), policy, LIMITS, DriveConfig(seconds=0.3)).reason == "done"


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (Needs(state_names=("x", "y", "z", "roll", "pitch", "yaw")), "joints as the state.*x is pan"),
        (Needs(state_names=JOINTS[:2]), "a state of 2 numbers"),
        (Needs(cameras=("wrist",)), "camera wrist"),
        (Needs(cameras=("front",), picture_size=(9, 9)), "9 x 9 px, camera front gives 8 x 8"),
    ],
)
def test_a_policy_that_would_not_see_what_it_needs_moves_nothing(needs, why):
    arm, policy = MockArm(picture=(8, 8)), Wave()
    policy.needs = needs
    with pytest.raises(SpecMismatch, match=why):
        drive(arm, policy, LIMITS, DriveConfig())
    assert arm.sent == [] and not arm.connected


@pytest.mark.parametrize(("error", "why"), [(KeyboardInterrupt(), "interrupted"), (KeyError("pan"), "KeyError: 'pan'")])
def test_whatever_ends_the_loop_the_arm_is_braked_and_the_report_kept(error, why):
    class Stopped(MockArm):
        def read(self):
            if self._reads == 30:
                raise error
            return super().read()

    arm = Stopped()
    report = drive(arm, Wave(seconds=0.02), LIMITS, DriveConfig(seconds=5.0))
    assert why in report.reason and 20 < len(report.ticks) <= 30 and not arm.connected
    np.testing.assert_array_equal(arm.sent[-1], arm.sent[-2])  # at rest
    velocity = np.diff(np.array(arm.sent), axis=0) * 30
    assert np.abs(np.diff(velocity, axis=0)).max() <= 2000 / 30 + 1e-6


def test_a_policy_that_thinks_longer_than_its_chunk_is_left_with_is_asked_in_time():
    report = drive(MockArm(), Wave(seconds=0.25, horizon=30), LIMITS, DriveConfig(seconds=3.0, execute=29))
    assert report.reason == "done" and report.held <= 3  # a loaded machine; asked at the last row it would be 15


def test_an_arm_that_starts_out_of_range_is_not_moved():
    arm = MockArm()
    arm.position = arm.target = np.full(6, 400.0)
    with pytest.raises(ArmFault, match="outside"):
        drive(arm, Wave(), LIMITS, DriveConfig())
    assert arm.sent == [] and not arm.connected


def test_a_policy_that_can_continue_is_given_what_will_be_executed(monkeypatch):
    class Continues(Wave):
        prefixes = ()

        def act_after(self, observations, slots, *, prefix, delay):
            self.prefixes = (*self.prefixes, (len(prefix), delay))
            return self.act(observations, slots)

    policy = Continues(seconds=0.1)

    def leftover(self, now, original=ActionQueue.leftover):
        asked.append(now)
        return original(self, now)

    def merge(self, targets, start, now, original=ActionQueue.merge):
        placed.append(start)
        original(self, targets, start, now)

    asked: list[float] = []
    placed: list[float] = []
    monkeypatch.setattr(ActionQueue, "leftover", leftover)
    monkeypatch.setattr(ActionQueue, "merge", merge)
    drive(MockArm(), policy, LIMITS, DriveConfig(seconds=1.5))
    assert policy.prefixes and all(0 < rows <= 41 and delay >= 3 for rows, delay in policy.prefixes)
    assert set(placed[1:]) <= set(asked)  # row k of the prefix and of the answer are meant for the same moment


def test_the_first_chunk_is_executed_from_its_first_row(monkeypatch):
    placed = []

    def merge(self, targets, start, now, original=ActionQueue.merge):
        placed.append((start, now))
        original(self, targets, start, now)

    monkeypatch.setattr(ActionQueue, "merge", merge)
    drive(MockArm(), Wave(), LIMITS, DriveConfig(seconds=0.5))
    assert placed[0][0] == placed[0][1]


def test_a_policy_of_single_actions_is_named_and_not_called_stalled():
    report = drive(MockArm(), Wave(seconds=0.0, horizon=1), LIMITS, DriveConfig(seconds=3.0, stall=2.0))
    assert "chunks of at least 2 rows" in report.reason


def test_a_policy_that_looks_back_sees_its_own_control_steps():
    class Clock(MockArm):
        def read(self):
            state = super().read()
            ticks = int((state.time - begin) * 1000)
            return state._replace(images={"eye": np.full((8, 8, 3), [ticks >> 8, ticks & 255, 0], np.uint8)})

    class Looks(Wave):
        look_back, seen = 2, ()

        def act(self, observations, slots):
            pictures = [observations[0].images, *observations[0].past]
            times = [int(p["eye"][0, 0, 0]) * 256 + int(p["eye"][0, 0, 1]) for p in pictures]
            self.seen = (*self.seen, np.diff(times) * -1)
            return super().act(observations, slots)

    begin, policy = time.perf_counter(), Looks(seconds=0.05, rate=10.0, horizon=10)
    drive(Clock(), policy, LIMITS, DriveConfig(seconds=1.5, rate=50.0))
    assert len(policy.seen[0]) <= 2 and len(policy.seen) > 2
    for gaps in policy.seen[-2:]:  # 10 Hz policy on a 50 Hz arm: 100 ms apart, to half a period of the loaded loop
        assert len(gaps) == 2 and np.all(gaps > 40) and np.all(gaps < 200)


def test_no_thread_is_left_behind():
    drive(MockArm(), Wave(), LIMITS, DriveConfig(seconds=0.5))
    assert not [thread for thread in threading.enumerate() if thread.name == "policy"]


def test_configuration_is_checked():
    for bad in ({"rate": 0}, {"seconds": -1}, {"execute": 0}, {"stall": 0}):
        with pytest.raises(ValueError):
            DriveConfig(**bad)
