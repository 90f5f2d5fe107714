"""What stands between a policy and a motor: range, speed, acceleration, workspace, and readings that cannot be true."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.robot.arm import ArmFault

PER_JOINT = ("low", "high", "speed", "acceleration")


@dataclass(frozen=True, kw_only=True)
class SafetyLimits:
    """Limits per joint, in the arm's units.

    Attributes:
        joints: Names, in the arm's order.
        low, high: Range of each joint.
        speed: Top speed of each joint [units/s].
        acceleration: Top acceleration of each joint [units/s^2].
        workspace: Corners (low xyz, high xyz) of the box that the gripper may not leave [m], or None.
        tolerance: How far outside its range a joint may be measured before the reading counts as impossible [units].
        jump: Largest change between two readings, as a multiple of what top speed allows; more is impossible.
    """

    joints: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    speed: tuple[float, ...]
    acceleration: tuple[float, ...]
    workspace: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    tolerance: float = 5.0
    jump: float = 4.0

    def __post_init__(self) -> None:
        for name in ("low", "high", "speed", "acceleration"):
            values = getattr(self, name)
            if len(values) != len(self.joints) or not np.isfinite(values).all():
                raise ValueError(f"{name} needs {len(self.joints)} finite numbers, one per joint, got {values}")
        if any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low must be below high for every joint, got {self.low} and {self.high}")
        if min(self.speed) <= 0 or min(self.acceleration) <= 0:
            raise ValueError("speed and acceleration must be above 0")
        if not (self.tolerance >= 0 and self.jump > 0):  # NaN is neither
            raise ValueError(f"tolerance must be at least 0 and jump above 0, got {self.tolerance} and {self.jump}")
        if self.workspace and any(a >= b for a, b in zip(*self.workspace, strict=True)):
            raise ValueError(f"the workspace's low corner must be below its high one, got {self.workspace}")

    @classmethod
    def from_json(cls, path: Path) -> "SafetyLimits":
        """Read `{"joints": {NAME: {"low", "high", "speed", "acceleration"}}, "workspace": [[x, y, z], [x, y, z]]}`.

        `tolerance` and `jump` may be given beside them.

        Raises:
            ValueError: A joint lacks a limit, a value is wrong, or a key is unknown.
        """
        data = json.loads(path.read_text())
        try:
            _refuse_others(path, data, ("joints", "workspace", "tolerance", "jump"))
            for row in data["joints"].values():
                _refuse_others(path, row, PER_JOINT)
            rows = {name: {key: float(row[key]) for key in PER_JOINT} for name, row in data["joints"].items()}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: each joint needs low, high, speed and acceleration; {error} is missing"
            ) from error
        box = data.get("workspace")
        return cls(
            joints=tuple(rows),
            low=tuple(row["low"] for row in rows.values()),
            high=tuple(row["high"] for row in rows.values()),
            speed=tuple(row["speed"] for row in rows.values()),
            acceleration=tuple(row["acceleration"] for row in rows.values()),
            workspace=(_corner(box[0]), _corner(box[1])) if box else None,
            **{key: float(data[key]) for key in ("tolerance", "jump") if key in data},
        )


def _refuse_others(path: Path, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")


def _corner(numbers: list[float]) -> tuple[float, float, float]:
    x, y, z = (float(number) for number in numbers)
    return x, y, z


class Bounded(NamedTuple):
    """A command that may be sent.

    Attributes:
        command: Joint targets, shape (J,).
        cut: Which limits changed the request: any of "range", "speed", "acceleration", "workspace".
    """

    command: np.ndarray
    cut: tuple[str, ...]


class SafetyFilter:
    """Turns requests into commands that keep every limit, one call per control tick.

    A joint always keeps enough room to brake before the end of its range, and the gripper before the end of the
    workspace (looked at where it would be at each tick of braking). A request of None means: come to rest.

    Args:
        limits: The limits.
        period: Time between commands [s].
        gripper_at: Joint targets (J,) to gripper position (3,) [m]; needed for a workspace.

    Raises:
        ValueError: A workspace is set without `gripper_at`.
    """

    def __init__(
        self, limits: SafetyLimits, period: float, gripper_at: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        if limits.workspace and gripper_at is None:
            raise ValueError("a workspace needs the arm's kinematics (a URDF) to know where the gripper is")
        self.limits, self.period, self._gripper_at = limits, period, gripper_at
        self._low, self._high = np.array(limits.low), np.array(limits.high)
        self._speed, self._acceleration = np.array(limits.speed), np.array(limits.acceleration)
        self._command: np.ndarray | None = None
        self._velocity = np.zeros(len(limits.joints))
        self._seen: np.ndarray | None = None

    def start(self, joints: np.ndarray) -> None:
        """Begin at rest at `joints`, the measured position, which must lie within the range and its tolerance."""
        self.check(joints)
        self._command = np.clip(joints, self._low, self._high)
        self._velocity = np.zeros(len(joints))

    @property
    def command(self) -> np.ndarray:
        """The command in force, shape (J,); raises RuntimeError before `start`."""
        if self._command is None:
            raise RuntimeError("call start with the measured joints first")
        return self._command

    def check(self, joints: np.ndarray) -> None:
        """Accept a reading or stop.

        Raises:
            ArmFault: A number that is not finite, outside the range by more than the tolerance, or farther from the
                reading before than the joint can have moved.
        """
        names, allowed = np.array(self.limits.joints), self.limits.tolerance
        if joints.shape != self._low.shape or not np.isfinite(joints).all():
            raise ArmFault(f"impossible reading {np.round(joints, 3).tolist()}: wanted {len(names)} finite numbers")
        outside = (joints < self._low - allowed) | (joints > self._high + allowed)
        if outside.any():
            at = dict(zip(names[outside].tolist(), joints[outside].round(2).tolist(), strict=True))
            raise ArmFault(f"joints measured outside their range by more than {allowed}: {at}")
        if self._seen is not None:
            jumped = np.abs(joints - self._seen) > self.limits.jump * self._speed * self.period + allowed
            if jumped.any():
                change = (joints - self._seen)[jumped].round(2).tolist()
                raise ArmFault(f"joints {names[jumped].tolist()} jumped by {change} within one tick: loose cable?")
        self._seen = np.array(joints)

    def bound(self, request: np.ndarray | None) -> Bounded:
        """The command nearest to `request`, shape (J,), that keeps the limits.

        Raises:
            ArmFault: The request is not finite.
            RuntimeError: `start` was not called.
        """
        before = self.command
        if request is None:
            wanted, cut = np.zeros_like(self._velocity), []
        else:
            if not np.isfinite(request).all():
                raise ArmFault(f"a target that is not finite: {np.asarray(request).tolist()}")
            inside = np.clip(request, self._low, self._high)
            cut = ["range"] if np.any(inside != request) else []
            wanted = (inside - before) / self.period
        velocity = self._allowed(wanted, cut)
        if self.limits.workspace and not self._stops_inside(velocity):
            cut.append("workspace")
            braking = self._braked(self._velocity)
            gentler = (braking + part * (velocity - braking) for part in (0.5, 0.2))
            velocity = next((slower for slower in gentler if self._stops_inside(slower)), braking)
        command = np.clip(before + velocity * self.period, self._low, self._high)
        self._velocity = (command - before) / self.period
        self._command = command
        return Bounded(command, tuple(cut))

    def _allowed(self, wanted: np.ndarray, cut: list[str]) -> np.ndarray:
        velocity = np.clip(wanted, -self._speed, self._speed)
        if np.any(np.abs(wanted) > self._speed * (1 + 1e-9)):
            cut.append("speed")
        change = self._acceleration * self.period
        reachable = np.clip(velocity, self._velocity - change, self._velocity + change)
        ahead = self._brakes_within(self._high - self.command)
        behind = self._brakes_within(self.command - self._low)
        safe = np.clip(reachable, -behind, ahead)
        if np.any(np.abs(safe - velocity) > 1e-9):
            cut.append("acceleration")
        return safe

    def _brakes_within(self, distance: np.ndarray) -> np.ndarray:
        """Fastest velocity after which the joint still stops within `distance`: v T + v^2 / 2a = distance."""
        a, period = self._acceleration, self.period
        return a * (np.sqrt(period**2 + 2 * np.maximum(distance, 0) / a) - period)

    def _outside(self, joints: np.ndarray) -> float:
        """How far the gripper is outside the workspace [m], 0 inside and where there is none."""
        if self.limits.workspace is None or self._gripper_at is None:
            return 0.0
        low, high = (np.array(corner) for corner in self.limits.workspace)
        here = self._gripper_at(joints)
        outside = float(np.maximum(low - here, here - high).max())
        return outside if outside > 1e-9 else 0.0  # rounding is not outside

    def _braked(self, velocity: np.ndarray) -> np.ndarray:
        """The velocity one tick later when every joint brakes as hard as it may."""
        return np.sign(velocity) * np.maximum(np.abs(velocity) - self._acceleration * self.period, 0)

    def _stops_inside(self, velocity: np.ndarray) -> bool:
        """Whether the gripper keeps to the workspace when the joints take `velocity` for a tick and brake then.

        Outside already, the arm may move towards the inside: a way is good that stays nearer than the gripper is now.
        """
        joints, now = self.command, self._outside(self.command)
        while True:
            joints = np.clip(joints + velocity * self.period, self._low, self._high)
            outside = self._outside(joints)
            if outside > 0 and outside >= now:
                return False
            velocity = self._braked(velocity)
            if not velocity.any():
                return True
