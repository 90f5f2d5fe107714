"""ManiSkill 3 tasks through gymnasium, with pictures, on a CPU or a GPU."""

import logging
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  (registers the environments)
import numpy as np
from mani_skill import logger

from headrace.contracts import ActionSpec, Observation
from headrace.sim.environment import Step, check_action
from headrace.sim.tasks import Task
from headrace.sim.wrappers import Unbatched

log = logging.getLogger(__name__)
CONTROLLER = "pd_ee_delta_pose"
# ManiSkill scales a delta action of 1 to 0.1 m; its rotation action of 1 turns by -0.1 rad (its lower bound times one).
EE_DELTA_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
STATE_PARTS = (("qpos", 9), ("tcp", 3), ("goal", 3))


class NoVulkanDevice(ValueError):
    """Pictures cannot be rendered on this machine."""


def torch_threads() -> None:
    """One torch thread: ManiSkill steps on tiny tensors, and more threads only wait for each other."""
    import torch

    torch.set_num_threads(1)


class ManiSkillEnvironment:
    """One ManiSkill task seen as pictures, proprioception and what the environment itself hands out beside pictures.

    The state is the joint positions (9: seven arm joints [rad], two fingers [m]), the tool centre point [m] in the
    world, and the goal position [m] where the task hands one out beside the picture (PickCube), else zeros.
    """

    def __init__(
        self,
        task: Task,
        *,
        controller: str = CONTROLLER,
        robot_uids: str | None = None,
        render: bool = True,
        image_size: int = 224,
    ) -> None:
        logger.setLevel(logging.ERROR)
        torch_threads()
        self.task, self.render = task, render
        options: dict[str, Any] = {"robot_uids": robot_uids} if robot_uids else {}
        if render:
            options["sensor_configs"] = {"width": image_size, "height": image_size}
        env = build(
            task.name,
            render=render,
            obs_mode="rgb" if render else "state_dict",
            control_mode=controller,
            sim_backend="physx_cpu",
            max_episode_steps=task.max_steps + 1,  # the runner counts the steps
            **options,
        )
        self.env = Unbatched(env)
        self.base: Any = env.unwrapped
        self.cameras = tuple(self.base._sensor_configs) if render else ()
        self.robot: str = getattr(self.base.agent, "uid", "")
        space = env.action_space
        self.spec = ActionSpec(
            names=EE_DELTA_NAMES if controller == CONTROLLER else tuple(f"a{i}" for i in range(space.shape[0])),
            frame="base_delta" if "ee_delta" in controller else "joint",
            rotation="euler_xyz" if controller == CONTROLLER else "none",
            gripper="open_is_1",
            rate=float(self.base.control_freq),
            controller=controller,
            low=tuple(float(v) for v in space.low),
            high=tuple(float(v) for v in space.high),
        )
        self.state_names = tuple(f"{name}.{i}" for name, count in STATE_PARTS for i in range(count))

    @property
    def about(self) -> dict[str, Any]:
        """What a result must say about this environment; JSON-ready."""
        return {"render_backend": str(self.base.backend.render_backend)}

    @property
    def drawing(self) -> bool:
        """Whether observations have pictures; leaving them out makes a step ten times faster on a processor."""
        return self.render and self.base.obs_mode == "rgb"

    @drawing.setter
    def drawing(self, wanted: bool) -> None:
        if self.render:
            self.base._obs_mode = "rgb" if wanted else "state_dict"

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names."""
        return self._observe(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Step:
        """Apply one normalised action in [-1, 1], shape (A,)."""
        raw, _, _, _, info = self.env.step(check_action(action, self.spec))
        readings = {key: float(value) for key, value in info.items() if isinstance(value, bool | int | float)}
        return Step(self._observe(raw), bool(info.get("success", False)), readings)

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()

    def _observe(self, raw: Any) -> Observation:
        images = {}
        if self.drawing:
            images = {name: np.ascontiguousarray(raw["sensor_data"][name]["rgb"]) for name in self.cameras}
        agent = self.base.agent
        goal = raw["extra"].get("goal_pos", np.zeros(3)) if isinstance(raw, dict) and "extra" in raw else np.zeros(3)
        tcp = getattr(agent, "tcp", None)
        parts = {
            "qpos": agent.robot.get_qpos()[0].cpu().numpy(),
            "tcp": tcp.pose.p[0].cpu().numpy() if tcp is not None else np.zeros(3),
            "goal": goal,
        }
        state = np.zeros(sum(count for _, count in STATE_PARTS), np.float32)
        start = 0
        for name, count in STATE_PARTS:
            values = np.asarray(parts[name], np.float32).reshape(-1)[:count]
            state[start : start + len(values)] = values
            start += count
        return Observation(images=images, state=state, instruction=self.task.instruction)


def build(name: str, *, render: bool, **options: Any) -> Any:
    """ManiSkill's environment `name`, drawing with the first of `render_backends` that works here.

    Raises:
        NoVulkanDevice: None does; says what to do.
    """
    return on_first_backend(lambda backend: gym.make(name, render_backend=backend, **options), render=render)


def on_first_backend[Made](make: Callable[[str], Made], *, render: bool) -> Made:
    """What `make` builds with the first of `render_backends` that works here; with "none" where nothing is drawn.

    Raises:
        NoVulkanDevice: None does; says what to do.
    """
    failures: list[RuntimeError] = []
    for backend in render_backends() if render else ("none",):
        try:
            made = make(backend)
            if failures:
                log.warning("the GPU cannot draw (%s); a software device does", failures[0])
            return made
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in ("render", "vulkan", "vk::")):
                raise
            failures.append(error)
    raise NoVulkanDevice(
        f"no usable Vulkan device for rendering ({failures[-1]}). `headrace doctor` shows what is found; "
        "scripts/setup.sh, run after it, installs Mesa's software driver."
    ) from failures[-1]


def render_backends() -> tuple[str, ...]:
    """What to draw with: `gpu` where CUDA is usable, and `cpu`, a software Vulkan device.

    CUDA says nothing about drawing: containers made for computing have no Vulkan driver of the GPU.
    """
    import torch

    return ("gpu", "cpu") if torch.cuda.is_available() else ("cpu",)
