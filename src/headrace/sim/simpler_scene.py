"""One SIMPLER task as an environment: official or random layouts in, observations and every success reading out."""

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np

from headrace.contracts import ActionSpec, Observation
from headrace.sim.simpler import (
    CAMERA,
    OFFICIAL_EPISODES,
    STATE_NAMES,
    Layout,
    Port,
    SimplerTask,
    action_spec,
    simpler_task,
    stock_episode,
)
from headrace.sim.simpler_assets import require_assets

RULES = ("success", "src_on_target", "is_src_obj_grasped", "consecutive_grasp", "moved_correct_obj", "moved_wrong_obj")
INTRINSICS = (623.588, 319.501, 239.545)  # focal length and principal point at 640 x 480 [px]
# Bridge V2 measures rotations from a gripper that points straight down; this is that pose.
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an episode has amounted to so far, under every reading that papers use.

    Attributes:
        last: The success rule at the last step: SimplerEnv's reading ("truncation"), the official one.
        ever: It held at some step: the reading of evaluations that stop at the first success.
        first_step: Step of the first success, counted from 1, or -1.
        grasped: The object was held at some step (the papers' "partial" or grasp rate).
        consecutive_grasp: It was held for at least 5 steps in a row.
        moved_correct, moved_wrong: At the last step, which object was pushed more than 3 cm.
        steps: Steps taken.
    """

    last: bool = False
    ever: bool = False
    first_step: int = -1
    grasped: bool = False
    consecutive_grasp: bool = False
    moved_correct: bool = False
    moved_wrong: bool = False
    steps: int = 0

    def after(self, rules: dict[str, bool]) -> "Outcome":
        """The outcome one step later."""
        success, steps = rules["success"], self.steps + 1
        return replace(
            self,
            last=success,
            ever=self.ever or success,
            first_step=steps if success and not self.ever else self.first_step,
            grasped=self.grasped or rules["is_src_obj_grasped"],
            consecutive_grasp=self.consecutive_grasp or rules["consecutive_grasp"],
            moved_correct=rules["moved_correct_obj"],
            moved_wrong=rules["moved_wrong_obj"],
            steps=steps,
        )


class SimplerStep(NamedTuple):
    """Result of a step.

    Attributes:
        observation: What the policy sees next.
        success: The official rule at this step.
        truncated: The episode has reached its fixed length; it never ends earlier.
        info: The rules by name, and under `outcome` the readings of the episode so far.
    """

    observation: Observation
    success: bool
    truncated: bool
    info: dict[str, Any]


class SimplerScene:
    """A task on the CPU, one episode at a time.

    Args:
        task: Name of the task, or the task.
        port: `restored` is the published environment as far as ManiSkill 3 lets it be restored, `stock` the port as it
            is. Their numbers do not belong in one column.
        layouts: `official` maps seed s to official episode s mod 24; `random` draws a layout off the official grid.
        render: Draw the camera picture; without it observations carry no images and a step is 5 to 7 times faster.
        width: Width of the picture [px]; height and focal length follow. 640 is official.
        backend: ManiSkill's render backend, "cpu" or "gpu".

    Raises:
        AssetsMissing: The scenes are not on this machine.
        ValueError: Unknown task, or an argument out of range.
    """

    def __init__(
        self,
        task: str | SimplerTask,
        *,
        port: Port = "restored",
        layouts: Literal["official", "random"] = "official",
        render: bool = True,
        width: int = 640,
        backend: str = "cpu",
    ) -> None:
        self.task = task if isinstance(task, SimplerTask) else simpler_task(task)
        if port not in ("restored", "stock"):
            raise ValueError(f"port must be 'restored' or 'stock', got {port!r}")
        if layouts not in ("official", "random"):
            raise ValueError(f"layouts must be 'official' or 'random', got {layouts!r}")
        if port == "stock" and layouts == "random":
            raise ValueError("the stock port has recorded layouts only; use port='restored' for random ones")
        if width < 32 or width % 4:
            raise ValueError(f"width must be a multiple of 4 and at least 32, got {width}")
        require_assets(self.task)
        from headrace.sim.simpler_bridge import build

        self.port, self.layouts, self.render = port, layouts, render
        self.backend = backend if render else "none"
        focal, cx, cy = (value * width / 640 for value in INTRINSICS)
        camera = {
            "width": width,
            "height": width * 3 // 4,
            "intrinsic": np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]]),
        }
        self.simulation = build(
            self.task,
            port,
            obs_mode="rgb+segmentation" if render else "none",
            num_envs=1,
            sim_backend="physx_cpu",
            render_backend=self.backend,
            sensor_configs=camera,
        )
        self.spec: ActionSpec = action_spec(port)
        self.outcome = Outcome()
        self.layout: Layout | None = None

    @property
    def drawing(self) -> bool:
        """Whether observations have pictures; leaving them out changes nothing else and saves most of a step's time."""
        return self.render and self.simulation.obs_mode != "none"

    @drawing.setter
    def drawing(self, wanted: bool) -> None:
        if self.render:
            self.simulation._obs_mode = "rgb+segmentation" if wanted else "none"

    @property
    def instruction(self) -> str:
        """The official prompt."""
        return self.task.instruction

    @property
    def max_steps(self) -> int:
        """Length of every episode [control steps]."""
        return self.task.steps

    def describe(self) -> dict[str, Any]:
        """What a result must say about the environment it was measured in."""
        return {
            "task": self.task.name,
            "official_name": self.task.official,
            "environment": f"{self.task.upstream} ({self.port} port)",
            "port": self.port,
            "finger_friction": 2.0 if self.port == "restored" else 0.3,
            "layouts": self.layouts,
            "render_backend": self.backend,
            "steps": self.task.steps,
            "control_rate": self.spec.rate,
            "rotation": self.spec.rotation,
            "state_names": list(STATE_NAMES),
            "packages": {name: _version(name) for name in ("mani-skill", "sapien", "torch", "numpy")},
        }

    def layout_for(self, seed: int) -> Layout:
        """The layout that `reset(seed)` starts from."""
        if self.layouts == "official":
            return self.task.official_layout(seed % OFFICIAL_EPISODES)
        return self.task.random_layout(seed)

    def reset(self, seed: int) -> Observation:
        """Start the episode that belongs to `seed`."""
        return self.start(self.layout_for(seed))

    def start(self, layout: Layout) -> Observation:
        """Start an episode from `layout`.

        Raises:
            ValueError: The stock port was given a layout that is not an official one.
        """
        import torch

        if self.port == "restored":
            options: dict[str, Any] = {"layouts": [layout]}
        elif layout.episode < 0:
            raise ValueError("the stock port starts from official episodes only; this layout has no episode id")
        else:
            options = {"episode_id": torch.tensor([stock_episode(self.task, layout.episode)])}
        raw, _ = self.simulation.reset(seed=0, options=options)
        self.outcome, self.layout = Outcome(), layout
        return self._observe(raw)

    def step(self, action: np.ndarray) -> SimplerStep:
        """Hold `action`, shape (7,), for one control period of 0.2 s.

        Raises:
            ValueError: Wrong shape or a number that is not finite.
            RuntimeError: Stepped before `reset`, or past the episode's end.
        """
        if self.layout is None or self.outcome.steps >= self.task.steps:
            raise RuntimeError("call reset first: no episode is running")
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (self.spec.dim,):
            raise ValueError(f"action must have shape ({self.spec.dim},), got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"action must be finite, got {action.tolist()}")
        raw, _, _, _, info = self.simulation.step(np.clip(action, self.spec.low, self.spec.high).astype(np.float32))
        rules = {name: bool(info[name][0]) for name in RULES if name in info}
        self.outcome = self.outcome.after(rules)
        done = self.outcome.steps >= self.task.steps
        return SimplerStep(self._observe(raw), self.outcome.last, done, {**rules, "outcome": self.outcome})

    def _observe(self, raw: dict[str, Any]) -> Observation:
        images = {}
        if self.drawing:
            images[CAMERA] = raw["sensor_data"][CAMERA]["rgb"][0].cpu().numpy().astype(np.uint8)
        return Observation(images=images, state=self.state(), instruction=self.task.instruction)

    def state(self) -> np.ndarray:
        """Proprioception as Bridge V2 records it, float32 (7,): see `STATE_NAMES`."""
        robot = self.simulation.agent.robot._objs[0]
        link = self.simulation.agent.controller.controllers["arm"].ee_link._objs[0]
        pose = (robot.pose.inv() * link.entity.pose).to_transformation_matrix()
        turn = pose[:3, :3] @ DOWN.T
        roll, pitch = np.arctan2(turn[2, 1], turn[2, 2]), np.arcsin(np.clip(-turn[2, 0], -1.0, 1.0))
        yaw = np.arctan2(turn[1, 0], turn[0, 0])
        opening = np.clip((robot.qpos[-2:].mean() - 0.015) / (0.037 - 0.015), 0.0, 1.0)
        return np.array([*pose[:3, 3], roll, pitch, yaw, opening], dtype=np.float32)

    def close(self) -> None:
        """Free the simulation."""
        self.simulation.close()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
