"""Rehearse on a recorded episode: the policy sees what the robot saw, and nothing moves."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headrace.contracts import ActionSpec, Gripper
from headrace.robot.arm import ArmFault, ArmState


@dataclass(kw_only=True)
class RecordedArm:
    """Plays readings back, one per tick, and keeps what it is sent beside what was recorded.

    Attributes:
        joints: Joint names.
        states: Measured joints of each frame, shape (T, J).
        actions: Recorded joint targets of each frame, shape (T, J).
        images: Pictures of each frame by camera, each uint8 (T, H, W, 3); may be empty.
        rate: Rate of the recording [Hz].
        gripper: Which end of the gripper's number is open.
    """

    joints: tuple[str, ...]
    states: np.ndarray
    actions: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)
    rate: float = 30.0
    gripper: Gripper = "open_is_1"
    sent: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (len(self.states), len(self.joints))
        if self.states.shape != shape or self.actions.shape != shape or not len(self.states):
            raise ValueError(
                f"states and actions must be (T, {shape[1]}), got {self.states.shape}, {self.actions.shape}"
            )
        if any(len(frames) != shape[0] for frames in self.images.values()):
            raise ValueError(f"every camera needs {shape[0]} pictures")
        self.spec = ActionSpec(names=self.joints, frame="joint", rotation="none", gripper=self.gripper, rate=self.rate)
        self._frame = 0

    @property
    def seconds(self) -> float:
        """Length of the recording [s]."""
        return len(self.states) / self.rate

    def connect(self) -> None:
        """Start from the first frame."""
        self._frame, self.sent = 0, []

    def read(self) -> ArmState:
        """The present frame; raises `ArmFault` after the last."""
        if self._frame >= len(self.states):
            raise ArmFault("the recording is over")
        images = {name: frames[self._frame] for name, frames in self.images.items()}
        return ArmState(self.states[self._frame].astype(float), images, time.perf_counter())

    def send(self, target: np.ndarray) -> np.ndarray:
        """Keep the command and go on to the next frame; nothing moves."""
        self._frame += 1
        self.sent.append(np.array(target, dtype=float))
        return self.sent[-1]

    def close(self) -> None:
        """Nothing to release."""

    def difference(self) -> np.ndarray:
        """Mean distance between what would have been sent and what was recorded, shape (J,), in the arm's units."""
        count = min(len(self.sent), len(self.actions))
        if not count:
            return np.full(len(self.joints), np.nan)
        return np.abs(np.array(self.sent[:count]) - self.actions[:count]).mean(axis=0)


def recorded_arm(root: Path, episode: int, *, gripper: Gripper = "open_is_1") -> RecordedArm:
    """Load an episode of a LeRobot dataset in joint space.

    Args:
        root: Folder of the dataset.
        episode: Its number.
        gripper: Which end of the recorded gripper's number is open.

    Raises:
        FileNotFoundError: No dataset there.
        ValueError: No such episode, or states and actions that are not the same joints.
    """
    if not (root / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"{root} holds no LeRobot dataset (meta/info.json is missing)")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(f"local/{root.name}", root=root, episodes=[episode])
    names = dataset.features["action"].get("names") or []
    if isinstance(names, dict):
        names = next(iter(names.values()))
    joints = tuple(str(name).removesuffix(".pos") for name in names)
    rows = [dataset[index] for index in range(len(dataset))]
    if (
        not rows
        or rows[0]["observation.state"].shape != rows[0]["action"].shape
        or len(joints) != len(rows[0]["action"])
    ):
        raise ValueError(
            f"{root}, episode {episode}: rehearsing needs frames whose state and action are the same joints"
        )
    cameras = {key.removeprefix("observation.images."): key for key in rows[0] if key.startswith("observation.images.")}
    return RecordedArm(
        joints=joints,
        states=np.stack([row["observation.state"].numpy() for row in rows]),
        actions=np.stack([row["action"].numpy() for row in rows]),
        images={
            name: np.stack([(row[key] * 255).round().byte().permute(1, 2, 0).numpy() for row in rows])
            for name, key in cameras.items()
        },
        rate=float(dataset.fps),
        gripper=gripper,
    )
