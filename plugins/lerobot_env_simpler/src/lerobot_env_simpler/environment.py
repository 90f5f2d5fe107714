"""One SIMPLER task as the gymnasium environment that LeRobot's evaluation expects."""

from typing import Any

import gymnasium as gym
import numpy as np

from headrace.sim.simpler import CAMERA, CONTROL_RATE, action_spec, simpler_task
from headrace.sim.simpler_scene import SimplerScene, SimplerStep


class SimplerGymEnv(gym.Env):
    """A task with LeRobot's observation keys and a named success rule.

    The simulation is made at the first reset, so that a worker process owns its renderer. Arguments: see the README.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_RATE)}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        *,
        success: str = "last",
        port: str = "restored",
        layouts: str = "official",
        rotation: str = "axis_angle",
        gripper: str = "signed",
        width: int = 640,
        backend: str = "cpu",
    ) -> None:
        about = simpler_task(task)
        self.task, self.task_description = about.name, about.instruction
        self._max_episode_steps = about.steps
        self._success, self._rotation, self._gripper = success, rotation, gripper
        self._options = {"port": port, "layouts": layouts, "width": width, "backend": backend}
        self._native_rotation = action_spec(port).rotation
        self._scene: SimplerScene | None = None
        self._frame = np.zeros((width * 3 // 4, width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({"image": gym.spaces.Box(0, 255, self._frame.shape, np.uint8)}),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
            }
        )
        spec = action_spec(port)
        self.action_space = gym.spaces.Box(np.float32(spec.low), np.float32(spec.high), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start the episode of `seed`, by default the next one. LeRobot's own `options` are not for the simulator."""
        super().reset(seed=seed)
        if self._scene is None:
            self._scene = SimplerScene(self.task, **self._options)
        self._episode = seed if seed is not None else getattr(self, "_episode", -1) + 1
        return self._observation(self._scene.reset(self._episode)), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        """One control step of 0.2 s; the reward is 1 where the success rule of the environment is met."""
        step = self._scene.step(self._converted(np.asarray(action, dtype=np.float32)))
        achieved = self._achieved(step)
        outcome = step.info["outcome"]
        info = {
            "is_success": achieved,
            "success_last": outcome.last,
            "success_ever": outcome.ever,
            "first_success_step": outcome.first_step,
            "grasped": outcome.grasped,
            "consecutive_grasp": outcome.consecutive_grasp,
        }
        ends_early = self._success == "ever" and achieved
        return self._observation(step.observation), float(achieved), ends_early, step.truncated, info

    def _achieved(self, step: SimplerStep) -> bool:
        """Under `last`, LeRobot must not see a success before the last step: it latches any it sees."""
        return step.success and (self._success == "ever" or step.truncated)

    def _converted(self, action: np.ndarray) -> np.ndarray:
        """The policy's conventions in the simulator's."""
        if self._rotation != self._native_rotation:
            from scipy.spatial.transform import Rotation

            action = action.copy()
            if self._rotation == "euler_xyz":
                action[3:6] = Rotation.from_euler("xyz", action[3:6]).as_rotvec()
            else:
                action[3:6] = Rotation.from_rotvec(action[3:6]).as_euler("XYZ")
        if self._gripper == "unit":
            action = np.append(action[:6], np.float32(1.0 if action[6] > 0.5 else -1.0))
        return action

    def _observation(self, observation: Any) -> dict[str, Any]:
        self._frame = observation.images[CAMERA]
        return {"pixels": {"image": self._frame}, "agent_pos": observation.state}

    def render(self) -> np.ndarray:
        """The picture that the policy saw last."""
        return self._frame

    def close(self) -> None:
        """Free the simulation."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None
