"""Drive an arm with a policy: a control loop that never waits, a second thread that thinks."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headrace.contracts import Observation, Policy, can_continue, look_back, needs_of
from headrace.robot.action_queue import ActionQueue
from headrace.robot.arm import Arm, ArmFault, ArmState
from headrace.robot.safety import SafetyFilter, SafetyLimits
from headrace.robot.targets import ArmGeometry, joint_targets, require_arm_fits, require_arm_shows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """How an arm is driven.

    Attributes:
        rate: Control rate [Hz]; the policy's actions are interpolated to it.
        seconds: Length of the run [s].
        instruction: Given to the policy.
        execute: Rows of a chunk after which a new one is asked for; earlier where the policy thinks for longer than the
            rest of the chunk lasts.
        stall: Longest time without a target, the arm holding, before the run is stopped [s].
        seed: Fixes the policy's randomness.
        realtime: Ask the system for real-time priority for the control thread (Linux, needs the right to it).
    """

    rate: float = 30.0
    seconds: float = 30.0
    instruction: str = ""
    execute: int = 8
    stall: float = 5.0
    seed: int = 0
    realtime: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1000 or self.seconds <= 0 or self.execute < 1 or self.stall <= 0:
            raise ValueError(
                "rate must be in 0..1000 Hz, seconds and stall above 0, execute at least 1; "
                f"got {self.rate}, {self.seconds}, {self.stall}, {self.execute}"
            )


class Tick(NamedTuple):
    """What one control period did.

    Attributes:
        time: Since the start [s].
        late: By how much the command came after the end of its period [s], 0 when in time.
        measured, requested, sent: Joint positions (J,); `requested` is None while holding.
        cut: Limits that changed the request.
        chunk: Number of the newest chunk, from 1; 0 before the first.
    """

    time: float
    late: float
    measured: np.ndarray
    requested: np.ndarray | None
    sent: np.ndarray
    cut: tuple[str, ...]
    chunk: int


@dataclass(frozen=True, kw_only=True)
class DriveReport:
    """What became of a run.

    Attributes:
        reason: Why it ended: "done", or what stopped it.
        ticks: One entry per control period.
        period: Control period [s].
        thinking: Time of each policy call [s].
    """

    reason: str
    ticks: list[Tick]
    period: float
    thinking: list[float]

    @property
    def missed(self) -> int:
        """Periods whose command came late."""
        return sum(tick.late > 0 for tick in self.ticks)

    @property
    def held(self) -> int:
        """Periods without a target after the first chunk had come."""
        return sum(tick.requested is None and tick.chunk > 0 for tick in self.ticks)

    def seams(self) -> tuple[float, float]:
        """Largest step of the requested targets where a new chunk took over, and the largest within chunks [units]."""
        at_seam, within = [0.0], [0.0]
        for before, after in zip(self.ticks, self.ticks[1:], strict=False):
            if before.requested is not None and after.requested is not None:
                step = float(np.abs(after.requested - before.requested).max())
                (within if before.chunk == after.chunk else at_seam).append(step)
        return max(at_seam), max(within)


class Thinker:
    """Runs the policy in its own thread, on the newest reading, and merges its chunks into the queue."""

    def __init__(self, policy: Policy, queue: ActionQueue, config: DriveConfig, geometry: ArmGeometry | None) -> None:
        self.policy, self.queue, self.config, self.geometry = policy, queue, config, geometry
        self.failure: Exception | None = None
        self.chunks = 0
        self.thinking: list[float] = []
        self._newest: tuple[ArmState, np.ndarray] | None = None
        self._seen: deque[ArmState] = deque(maxlen=1 + int(np.ceil(look_back(policy) * config.rate / policy.spec.rate)))
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Begin an episode."""
        self.policy.reset(0, seed=self.config.seed)
        self._thread.start()

    def offer(self, state: ArmState, commanded: np.ndarray) -> None:
        """The newest reading, and the joint targets in force."""
        self._seen.append(state)
        self._newest = (state, commanded)
        self._wake.set()

    def stop(self, patience: float = 2.0) -> None:
        """End the thread; a call that is running is given `patience` seconds."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                if self._stop:
                    return
                if self._newest is not None and self._due():
                    self._think(*self._newest)
        except Exception as error:  # the control loop decides what to do about it
            self.failure = error

    def _due(self) -> bool:
        covered = self.queue.at(time.perf_counter()).covered
        unused = max(self._horizon - self.config.execute, 0) * self.queue.period
        return covered <= max(unused, 1.2 * self._slowest())

    def _slowest(self) -> float:
        """Longest of the last calls [s], 0 before the first."""
        return max(self.thinking[-5:], default=0.0)

    _horizon = 0

    def _think(self, state: ArmState, commanded: np.ndarray) -> None:
        begin = time.perf_counter()
        observation = Observation(
            images=state.images,
            state=state.joints.astype(np.float32),
            instruction=self.config.instruction,
            past=self._past(state),
        )
        if self.chunks and self.policy.spec.frame == "joint" and can_continue(self.policy):
            # Rows count from the reading, which is where the answer is placed; it has an age by now.
            delay = int(np.ceil((begin - state.time + self._slowest()) / self.queue.period))
            chunk = self.policy.act_after([observation], [0], prefix=self.queue.leftover(state.time), delay=delay)
        else:
            chunk = self.policy.act([observation], [0])
        now = time.perf_counter()
        actions = np.asarray(chunk.actions[0])
        if not np.isfinite(actions).all():
            raise ArmFault("the policy answered with numbers that are not finite")
        if len(actions) < 2:  # over before the arm has moved
            raise ArmFault(f"driving needs chunks of at least 2 rows, the policy answered with {len(actions)}")
        targets = joint_targets(actions, self.policy.spec, commanded, self.geometry)
        self.thinking.append(now - begin)
        self._horizon = len(targets)
        # The first chunk starts when it is there: the arm has stood still meanwhile.
        placed = time.perf_counter()
        self.queue.merge(targets, state.time if self.chunks else placed, placed)
        self.chunks += 1

    def _past(self, state: ArmState) -> tuple[dict[str, np.ndarray], ...]:
        """Pictures at the policy's own control steps before `state`, from the readings nearest to them."""
        seen = list(self._seen)
        times = [state.time - step * self.queue.period for step in range(1, look_back(self.policy) + 1)]
        reached = [t for t in times if seen[0].time <= t + 0.5 * self.queue.period]
        return tuple(min(seen, key=lambda reading: abs(reading.time - t)).images for t in reached)


def drive(
    arm: Arm,
    policy: Policy,
    limits: SafetyLimits,
    config: DriveConfig,
    geometry: ArmGeometry | None = None,
) -> DriveReport:
    """Run `policy` on `arm` for `config.seconds`.

    The loop reads, checks, commands and sleeps until the next period; it never waits for the policy. Without a target
    it brakes and holds. It stops, braking and holding first, when the arm reports the impossible, the policy fails or
    answers with NaN, no target came for `config.stall` seconds, on Ctrl-C, and when anything else goes wrong; the
    report then says what.

    Raises:
        SpecMismatch: Policy and arm do not fit, or the arm does not show what the policy must see; nothing has moved.
        ValueError: The limits are for other joints.
        ArmFault: The arm cannot be connected, or its first reading is impossible.
    """
    require_arm_fits(policy.spec, arm.spec, geometry)
    require_arm_shows(needs_of(policy), arm)
    if limits.joints != arm.joints:
        raise ValueError(f"the limits are for {limits.joints}, the arm has {arm.joints}")
    period = 1.0 / config.rate
    safety = SafetyFilter(limits, period, geometry.gripper_at if geometry else None)
    thinker = Thinker(policy, ActionQueue(1.0 / policy.spec.rate), config, geometry)
    ticks: list[Tick] = []
    try:
        arm.connect()
        first = arm.read()
        needs_of(policy).require_shown(Observation(images=first.images, state=first.joints))
        safety.start(first.joints)
        thinker.start()
        with _priority(config.realtime):
            reason = _loop(arm, safety, thinker, config, ticks)
            _come_to_rest(arm, safety, period)
    finally:
        try:
            thinker.stop()
        finally:
            arm.close()
    return DriveReport(reason=reason, ticks=ticks, period=period, thinking=thinker.thinking)


def _loop(arm: Arm, safety: SafetyFilter, thinker: Thinker, config: DriveConfig, ticks: list[Tick]) -> str:
    """Control periods until the end; returns why it ended, whatever ended it."""
    try:
        return _periods(arm, safety, thinker, config, ticks)
    except ArmFault as fault:
        return str(fault)
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:
        log.exception("the control loop failed")
        return f"the control loop failed: {type(error).__name__}: {error}"


def _periods(arm: Arm, safety: SafetyFilter, thinker: Thinker, config: DriveConfig, ticks: list[Tick]) -> str:
    start = deadline = time.perf_counter()
    period, with_target = 1.0 / config.rate, start
    while (begin := time.perf_counter()) - start < config.seconds:
        deadline += period
        state = arm.read()
        safety.check(state.joints)
        thinker.offer(state, safety.command)
        chunk = thinker.chunks
        request = thinker.queue.at(time.perf_counter()).target
        bounded = safety.bound(request)
        sent = arm.send(bounded.command)
        now = time.perf_counter()
        with_target = now if request is not None else with_target
        late = max(0.0, now - deadline)
        ticks.append(Tick(begin - start, late, state.joints, request, sent, bounded.cut, chunk))
        if thinker.failure is not None:
            return f"the policy failed: {type(thinker.failure).__name__}: {thinker.failure}"
        if now - with_target > config.stall:
            return f"no target for {config.stall} s: the policy is stalled"
        if late:
            deadline = now
        _sleep_until(deadline)
    return "done"


def _come_to_rest(arm: Arm, safety: SafetyFilter, period: float) -> None:
    """Brake within the limits and hold, as far as the arm still listens; a second Ctrl-C ends that too."""
    try:
        for _ in range(300):
            before = safety.command
            command = safety.bound(None).command
            arm.send(command)
            if np.array_equal(before, command):
                return
            time.sleep(period)
    except (Exception, KeyboardInterrupt) as error:
        log.warning("could not hold the arm: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def _priority(realtime: bool) -> Iterator[None]:
    """Run this thread before all ordinary ones, where the system lets us; Python hands the interpreter over sooner."""
    if not realtime:
        yield
        return
    interval = sys.getswitchinterval()
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except (AttributeError, PermissionError) as error:
        raise PermissionError(f"no right to real-time priority ({error}): run without, or with CAP_SYS_NICE") from error
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _sleep_until(deadline: float) -> None:
    """Sleep, the last half millisecond awake, because sleep comes back late."""
    while (left := deadline - time.perf_counter()) > 0:
        if left > 0.0005:
            time.sleep(left - 0.0005)
