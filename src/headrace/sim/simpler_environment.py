"""The SIMPLER tasks in the form that the rollout runner and the collector use."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from headrace.contracts import Observation
from headrace.sim.environment import Step, check_action
from headrace.sim.maniskill import on_first_backend
from headrace.sim.simpler import CAMERA, OFFICIAL_EPISODES, STATE_NAMES, Port
from headrace.sim.simpler_oracle import SimplerOracle
from headrace.sim.simpler_scene import SimplerScene
from headrace.sim.tasks import Task


class SimplerEnvironment:
    """A SIMPLER task whose seeds 0..23 are the official episodes and whose other seeds are random layouts off the grid.

    So the default evaluation is the benchmark, and demonstrations, whose seeds start at a million, never meet it.

    Args:
        task: The task, named `simpler/...`; what follows an `@` names a variant and is not read here.
        port: See `SimplerScene`.
        render: Draw pictures.
        width: Width of the drawn picture [px].
        square: Side of a square that the picture is squeezed into, aspect not kept, as Octo's evaluation does [px]; 0
            hands the drawn picture over.
    """

    cameras: tuple[str, ...] = (CAMERA,)
    state_names = STATE_NAMES
    robot = "widowx"
    largest_move = 0.03  # [m] per step; pushes that are added to demonstrations are scaled by it

    def __init__(
        self, task: Task, *, port: Port = "restored", render: bool = True, width: int = 640, square: int = 0
    ) -> None:
        _quiet()
        make = partial(SimplerScene, task.name.split("@")[0], port=port, render=render, width=width)
        self.scene = on_first_backend(lambda backend: make(backend=backend), render=render)
        self.spec, self.square = self.scene.spec, square
        self.cameras = (CAMERA,) if render else ()

    @property
    def about(self) -> dict[str, Any]:
        """What a result must say about this environment; JSON-ready."""
        return {**self.scene.describe(), "layouts": "official below seed 24, random from there", "square": self.square}

    @property
    def drawing(self) -> bool:
        """Whether observations have pictures."""
        return self.scene.drawing

    @drawing.setter
    def drawing(self, wanted: bool) -> None:
        self.scene.drawing = wanted

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names.

        Raises:
            ValueError: The stock port was given a seed beyond the official episodes.
        """
        task = self.scene.task
        official = 0 <= seed < OFFICIAL_EPISODES
        layout = task.official_layout(seed) if official else task.random_layout(seed)
        return self._squeezed(self.scene.start(layout))

    def step(self, action: np.ndarray) -> Step:
        """Apply one action; the readings hold each rule of SIMPLER by name, and the episode's outcome so far."""
        step = self.scene.step(check_action(action, self.spec))
        outcome = step.info["outcome"]
        readings = {name: float(value) for name, value in step.info.items() if name != "outcome"}
        readings |= {
            "grasped_ever": float(outcome.grasped),
            "consecutive_grasp_ever": float(outcome.consecutive_grasp),
            "success_ever": float(outcome.ever),
        }
        return Step(self._squeezed(step.observation), step.success, readings)

    def _squeezed(self, observation: Observation) -> Observation:
        if not self.square or not observation.images:
            return observation
        import cv2

        size = (self.square, self.square)
        images = {name: cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
                  for name, picture in observation.images.items()}  # fmt: skip
        return replace(observation, images=images)

    def close(self) -> None:
        """Free the simulation."""
        self.scene.close()


class SimplerExpert:
    """The scripted oracle, re-made at every episode."""

    def __init__(self, environment: SimplerEnvironment) -> None:
        self.scene = environment.scene
        self.reset()

    def reset(self) -> None:
        """Plan for the episode that was just reset."""
        self.oracle = SimplerOracle(self.scene)

    @property
    def finished(self) -> bool:
        """Whether the object is placed and the gripper has withdrawn."""
        return self.oracle.finished

    def act(self) -> np.ndarray:
        """The next action, float32 (7,)."""
        return self.oracle.act()


def _quiet() -> None:
    """One thread for ManiSkill's tiny tensors, and its warnings off."""
    import logging

    import torch
    from mani_skill import logger

    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
