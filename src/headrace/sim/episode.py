"""One episode in one environment: driven by chunks of actions from outside, or by the task's scripted expert."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from headrace.contracts import Observation
from headrace.sim.environment import InvalidAction
from headrace.sim.success import SuccessReading, SuccessRule, read_success, stops_early
from headrace.sim.tasks import Task, make_environment, make_expert
from headrace.sim.video import write_mp4

LONGEST_LOOK_BACK = 64  # control steps


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Pushes added to an expert's executed actions, so that demonstrations also show how to recover.

    The recorded action stays the expert's own (Laskey et al. 2017, DART, arXiv 1703.09327, with bursts for its noise:
    independent noise at every step keeps a precise expert from ever finishing).

    Attributes:
        probability: Chance that a push starts at a step.
        scale: Standard deviation of the push, in action units.
        duration: Steps that a push lasts.
    """

    probability: float = 0.0
    scale: float = 0.5
    duration: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")


@dataclass
class Episode:
    """What happened in one episode. Lists have one entry per step; observations have one more, the first.

    Attributes:
        frames: Pictures of each observation by camera, uint8 (height, width, 3); empty unless they are kept.
        states: States of each observation, float32 (S,).
        actions: Actions, float32 (A,): those sent, or the expert's own where a push was added.
        flags: The environment's success flag after each step.
        readings: The last step's further flags and numbers.
        error: Why the episode broke off, or None.
        note: What went wrong beside the episode, such as a video that could not be written; it counts all the same.
    """

    seed: int
    instruction: str = ""
    frames: list[dict[str, np.ndarray]] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    readings: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    note: str | None = None
    seconds: float = 0.0

    @property
    def success(self) -> SuccessReading:
        """The success flags under every rule."""
        return read_success(self.flags)


class EpisodeRunner:
    """Owns an environment and runs one episode after another in it.

    Rendering costs ten times a step of physics, so environments with a switch `drawing` draw only what is looked at: by
    the policy, at the end of each run of actions, and by the viewer of a video.
    """

    def __init__(self, task: Task, *, rule: SuccessRule | None = None) -> None:
        self.task, self.rule, self.recording = task, rule or task.success_rule, False
        self.environment: Any = make_environment(task)
        self.episode = Episode(seed=0)
        self._pictures: deque[dict[str, np.ndarray]] = deque(maxlen=LONGEST_LOOK_BACK + 1)  # empty where not drawn
        self._expert: Any = None

    def describe(self) -> dict[str, Any]:
        """What the environment declares, JSON-ready: action spec, cameras, state names, its robot and further facts.

        The last two are empty for an environment that does not tell them.
        """
        env = self.environment
        return {
            "spec": env.spec.to_dict(),
            "cameras": list(env.cameras),
            "state_names": list(env.state_names),
            "robot": str(getattr(env, "robot", "")),
            "about": dict(getattr(env, "about", {})),
        }

    def start(self, seed: int, record: bool = False) -> Observation:
        """Begin the episode that `seed` names; `record` keeps the picture of every step."""
        self._started, self.recording = time.perf_counter(), record
        self._draw(True)
        observation = self.environment.reset(seed)
        self.episode = Episode(seed=seed, instruction=observation.instruction)
        self._pictures.clear()
        self._note(observation)
        return observation

    def run(self, actions: np.ndarray, look_back: int = 0) -> tuple[Observation | None, bool]:
        """Send actions one by one until they or the episode end; returns the last observation and whether it ended.

        The observation brings the pictures of `look_back` steps before it.
        """
        observation: Observation | None = None
        for left, action in zip(reversed(range(len(actions))), actions, strict=True):
            self._draw(self.recording or left <= look_back)
            observation = self._step(action, action)
            if observation is None or self._ended():
                return observation, True
        if observation is None:
            raise ValueError("a chunk needs at least one action, got none")
        return replace(observation, past=self._past(look_back)), False

    def finish(self, video: str | None = None) -> Episode:
        """The finished episode without its frames; writes them to `video` (first camera) if a path is given.

        A video that cannot be written, as on a full disk, is noted and costs the episode nothing else.
        """
        episode = self.episode
        episode.seconds = time.perf_counter() - self._started
        if video and episode.frames:
            camera = next(iter(episode.frames[0]))
            try:
                write_mp4(Path(video), [f[camera] for f in episode.frames], rate=self.environment.spec.rate)
            except OSError as error:
                episode.note = f"the video could not be written: {error}"
        return Episode(**{**vars(episode), "frames": []})

    def expert(self, seed: int, video: str | None = None) -> Episode:
        """Run a whole episode with the task's expert, under the rules that policies are under."""
        self._drive(seed, Perturbation(), 0, self._ended, record=video is not None)
        return self.finish(video)

    def demonstrate(self, seed: int, perturbation: Perturbation, linger: int, noise_seed: int) -> Episode:
        """Run the expert, with pushes, until `linger` steps after it is over; the episode keeps its frames.

        It is over at the first success; with an expert that tells when it has `finished`, not before that: an
        environment may count an object as placed while the gripper still holds it.
        """
        over: int | None = None

        def done() -> bool:
            nonlocal over
            steps, succeeded = len(self.episode.flags), self.episode.success.once
            if over is None and succeeded and getattr(self._expert, "finished", True):
                over = steps
            return steps >= self.task.max_steps or (over is not None and steps >= over + linger)

        self._drive(seed, perturbation, noise_seed, done, record=True)
        return self.episode

    def _drive(
        self, seed: int, perturbation: Perturbation, noise_seed: int, done: Callable[[], bool], *, record: bool
    ) -> None:
        self.start(seed, record)
        self._draw(record)
        if self._expert is None:
            self._expert = make_expert(self.task, self.environment)
        self._expert.reset()
        generator = np.random.default_rng([noise_seed, seed])
        push: np.ndarray = np.zeros(3)
        left = 0
        largest = float(getattr(self.environment, "largest_move", 1.0))  # in action units; metres are not normalised
        while not self.episode.flags or not done():
            action = self._expert.act()
            if left == 0 and generator.random() < perturbation.probability:
                push, left = largest * generator.normal(0, perturbation.scale, 3), perturbation.duration
            sent = action.copy()
            if left:
                sent[:3] = np.clip(sent[:3] + push, -largest, largest)
                left -= 1
            if self._step(sent, action) is None:
                return

    def close(self) -> None:
        """Free the simulator."""
        self.environment.close()

    def _step(self, sent: np.ndarray, recorded: np.ndarray) -> Observation | None:
        try:
            step = self.environment.step(sent)
        except InvalidAction as error:
            self.episode.error = str(error)
            return None
        self.episode.actions.append(np.asarray(recorded, np.float32))
        self.episode.flags.append(step.success)
        self.episode.readings = step.readings
        self._note(step.observation)
        return step.observation

    def _ended(self) -> bool:
        flags = self.episode.flags
        return len(flags) >= self.task.max_steps or (flags[-1] and stops_early(self.rule))

    def _past(self, look_back: int) -> tuple[dict[str, np.ndarray], ...]:
        drawn = takewhile(bool, islice(reversed(self._pictures), 1, None))
        return tuple(islice(drawn, look_back))

    def _draw(self, wanted: bool) -> None:
        if hasattr(self.environment, "drawing"):
            self.environment.drawing = wanted

    def _note(self, observation: Observation) -> None:
        self.episode.states.append(observation.state)
        self._pictures.append(observation.images)
        if self.recording:
            self.episode.frames.append(observation.images)
