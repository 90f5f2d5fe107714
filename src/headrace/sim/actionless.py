"""Videos without actions: a task's scripted expert, or any robot that wanders, rendered to MP4."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from headrace.sim.maniskill import CONTROLLER, ManiSkillEnvironment
from headrace.sim.run_folder import write_json
from headrace.sim.tasks import Task, make_expert, require_ready
from headrace.sim.video import write_mp4


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How videos are made.

    Attributes:
        episodes: Videos per task and robot.
        steps: Longest video [frames].
        mover: `expert` follows the task's scripted expert, `random` wanders smoothly through the action space.
        robot: ManiSkill's name of a robot that the task supports; None for the task's own. Only the task's own has an
            expert.
        image_size: Side of the frames [px].
        persistence: How much of the last random action stays in the next, 0 to 1.
        seed: First seed; video k has seed + k.
    """

    episodes: int = 50
    steps: int = 60
    mover: Literal["expert", "random"] = "expert"
    robot: str | None = None
    image_size: int = 128
    persistence: float = 0.8
    seed: int = 2_000_000

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.steps < 2:
            raise ValueError(f"episodes must be at least 1 and steps at least 2, got {self.episodes} and {self.steps}")
        if self.mover not in ("expert", "random"):
            raise ValueError(f"unknown mover {self.mover!r} (known: expert, random)")
        if self.mover == "expert" and self.robot is not None:
            raise ValueError(f"only the task's own robot has an expert; use mover='random' with robot={self.robot!r}")
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence must lie in [0, 1), got {self.persistence}")


class Recorded(NamedTuple):
    """What a call did: videos written, those that were there, and frames in the new ones."""

    written: int
    kept: int
    frames: int


def record_videos(
    task: Task, settings: VideoSettings, folder: Path, *, done: Callable[[Path], None] = lambda path: None
) -> Recorded:
    """Write `000000.mp4` and following and `instructions.json` into a folder; videos that are there stay.

    Args:
        task: A ManiSkill task.
        settings: How.
        folder: For this task and robot alone.
        done: Called with each new video.

    Raises:
        ValueError: The task is not ManiSkill's own, or has no expert.
    """
    require_ready(task)
    paths = [folder / f"{number:06d}.mp4" for number in range(settings.episodes)]
    due = [(number, path) for number, path in enumerate(paths) if not path.is_file()]
    frames = 0
    if due:
        controller = CONTROLLER if settings.robot is None else "pd_joint_delta_pos"
        environment = ManiSkillEnvironment(
            task, controller=controller, robot_uids=settings.robot, image_size=settings.image_size
        )
        try:
            mover = _mover(task, environment, settings)
            for number, path in due:
                pictures = _episode(environment, mover, settings, settings.seed + number)
                write_mp4(path, pictures, rate=environment.spec.rate)
                frames += len(pictures)
                done(path)
        finally:
            environment.close()
    write_json(folder / "instructions.json", {path.name: task.instruction for path in paths})
    return Recorded(len(due), len(paths) - len(due), frames)


class Wanderer:
    """Random actions that change smoothly: an autoregressive walk of unit variance, clipped to the limits."""

    def __init__(self, low: tuple[float, ...], high: tuple[float, ...], persistence: float) -> None:
        self.low, self.high, self.persistence = np.array(low), np.array(high), persistence
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start an episode."""
        self.random = np.random.default_rng(seed)
        self.last = self.random.normal(size=len(self.low))

    def act(self) -> np.ndarray:
        """The next action, float32, within the limits."""
        fresh = np.sqrt(1 - self.persistence**2) * self.random.normal(size=len(self.low))
        self.last = self.persistence * self.last + fresh
        middle, reach = (self.high + self.low) / 2, (self.high - self.low) / 2
        return np.clip(middle + 0.7 * reach * self.last, self.low, self.high).astype(np.float32)


def _mover(task: Task, environment: ManiSkillEnvironment, settings: VideoSettings) -> Any:
    if settings.mover == "random":
        return Wanderer(environment.spec.low, environment.spec.high, settings.persistence)
    return make_expert(task, environment)


def _episode(environment: ManiSkillEnvironment, mover: Any, settings: VideoSettings, seed: int) -> list[np.ndarray]:
    """Pictures of the first camera, at most `steps`, up to three after the first success."""
    pictures = [next(iter(environment.reset(seed).images.values()))]
    mover.begin(seed) if isinstance(mover, Wanderer) else mover.reset()
    left = settings.steps - 1
    while left > 0:
        step = environment.step(mover.act())
        pictures.append(next(iter(step.observation.images.values())))
        left = min(left - 1, 3) if step.success else left - 1
    return pictures
