"""Rehearse on a recorded episode: the policy sees what the robot saw, and nothing moves."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headrace.contracts import ActionSpec, Gripper
from headrace.robot.arm import ArmFault, ArmState

PICTURES = "observation.images."


@dataclass(kw_only=True)
class RecordedArm:
    """Plays readings back, one per tick, and keeps what it is sent beside what was recorded.

    Attributes:
        joints: Joint names.
        states: Measured joints of each frame, shape (T, J).
        actions: Recorded joint targets of each frame, shape (T, J).
        images: Pictures of each frame by camera, T of uint8 (H, W, 3); may be empty.
        rate: Rate of the recording [Hz].
        gripper: Which end of the gripper's number is open.
    """

    joints: tuple[str, ...]
    states: np.ndarray
    actions: np.ndarray
    images: dict[str, Sequence[np.ndarray]] = field(default_factory=dict)
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
    def cameras(self) -> tuple[str, ...]:
        """Names of the recorded cameras."""
        return tuple(self.images)

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
    states, actions, images = [], [], defaultdict(list)
    for index in range(len(dataset)):  # one decoded frame at a time: it is float32, four times what is kept
        row = dataset[index]
        states.append(row["observation.state"].numpy())
        actions.append(row["action"].numpy())
        for key in (key for key in row if key.startswith(PICTURES)):
            picture = (row[key] * 255).round().byte().permute(1, 2, 0)
            images[key.removeprefix(PICTURES)].append(picture.contiguous().numpy())
    if not states or states[0].shape != actions[0].shape or len(joints) != len(actions[0]):
        raise ValueError(
            f"{root}, episode {episode}: rehearsing needs frames whose state and action are the same joints"
        )
    return RecordedArm(
        joints=joints,
        states=np.stack(states),
        actions=np.stack(actions),
        images=dict(images),
        rate=float(dataset.fps),
        gripper=gripper,
    )
