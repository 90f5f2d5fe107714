"""What the drive loop needs of an arm, and a mock that behaves like a driver: lag, speed limit, bus time, faults."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from headrace.contracts import ActionSpec


class ArmFault(RuntimeError):
    """The arm reports something impossible, or does not answer: the loop stops and holds."""


class ArmState(NamedTuple):
    """One reading.

    Attributes:
        joints: Measured positions, shape (J,), in the arm's units (degrees, radians or 0..100, as its driver has them).
        images: Camera name to uint8 picture (H, W, 3).
        time: When it was read [s], `time.perf_counter`.
    """

    joints: np.ndarray
    images: dict[str, np.ndarray]
    time: float


class Arm(Protocol):
    """A position-controlled arm.

    Attributes:
        joints: Joint names, in the order of all vectors; the gripper is one of them.
        cameras: Names of the cameras whose pictures `read` brings.
        spec: How joint targets are meant: `frame="joint"`, and which end of the gripper is open.
    """

    joints: tuple[str, ...]
    spec: ActionSpec

    @property
    def cameras(self) -> tuple[str, ...]:
        """See above."""

    def connect(self) -> None:
        """Open the bus; raises `ArmFault` when it is in use or absent."""

    def read(self) -> ArmState:
        """Measure; raises `ArmFault` when the bus does not answer."""

    def send(self, target: np.ndarray) -> np.ndarray:
        """Command joint positions, shape (J,); returns what the driver really sent."""

    def close(self) -> None:
        """Release the bus; safe to call twice."""


@dataclass(kw_only=True)
class MockArm:
    """Joints that follow their target like a servo: first-order lag, a top speed, encoder steps.

    Attributes:
        joints, rate: Names and control rate [Hz] for `spec`.
        lag: Time constant of a joint [s].
        top_speed: Fastest joint motion [units/s].
        resolution: Encoder step [units].
        read_seconds, send_seconds: Bus time of a reading and of a command [s].
        picture: Size (H, W) of the one camera `front`; (0, 0) for none.
        nan_at, jump_at, silent_at: Reading (counted from 0) at which a fault shows: a NaN, a joint 1000 units away, no
            answer. -1 for never.
    """

    joints: tuple[str, ...] = ("pan", "lift", "elbow", "wrist", "roll", "gripper")
    rate: float = 30.0
    lag: float = 0.06
    top_speed: float = 300.0
    resolution: float = 360 / 4096
    read_seconds: float = 0.002
    send_seconds: float = 0.001
    picture: tuple[int, int] = (0, 0)
    nan_at: int = -1
    jump_at: int = -1
    silent_at: int = -1
    sent: list[np.ndarray] = field(default_factory=list)
    connected: bool = False

    def __post_init__(self) -> None:
        self.spec = ActionSpec(names=self.joints, frame="joint", rotation="none", gripper="open_is_1", rate=self.rate)
        self.position = np.zeros(len(self.joints))
        self.target: np.ndarray = self.position.copy()
        self._reads, self._moved = 0, time.perf_counter()

    @property
    def cameras(self) -> tuple[str, ...]:
        """The one camera, if it has one."""
        return ("front",) if self.picture[0] else ()

    def connect(self) -> None:
        """Open the imaginary bus."""
        self.connected = True
        self._moved = time.perf_counter()

    def _move(self) -> None:
        """Let the joints travel for the time that has passed."""
        now = time.perf_counter()
        passed, self._moved = now - self._moved, now
        step = (self.target - self.position) * (1 - np.exp(-passed / self.lag))
        self.position += np.clip(step, -self.top_speed * passed, self.top_speed * passed)

    def read(self) -> ArmState:
        """Measured joints, rounded to encoder steps, and a picture that shows the first joint as a bar."""
        time.sleep(self.read_seconds)
        self._move()
        joints, turn = np.round(self.position / self.resolution) * self.resolution, self._reads
        self._reads += 1
        if turn == self.silent_at:
            raise ArmFault("the bus does not answer")
        if turn == self.nan_at:
            joints[0] = np.nan
        if turn == self.jump_at:
            joints[0] += 1000.0
        images = {}
        if self.picture[0]:
            images["front"] = np.zeros((*self.picture, 3), np.uint8)
            images["front"][:, : int(abs(self.position[0])) % self.picture[1]] = 255
        return ArmState(joints, images, time.perf_counter())

    def send(self, target: np.ndarray) -> np.ndarray:
        """Set the servo targets."""
        time.sleep(self.send_seconds)
        self._move()
        self.target = np.asarray(target, dtype=float).copy()
        self.sent.append(self.target)
        return self.target

    def close(self) -> None:
        """Close the imaginary bus."""
        self.connected = False
