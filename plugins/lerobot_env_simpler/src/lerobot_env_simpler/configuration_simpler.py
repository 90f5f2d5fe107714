"""LeRobot's configuration of the SIMPLER environment."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from headrace.sim.simpler import CONTROL_RATE, TASKS, simpler_task

CHOICES = {
    "success": ("last", "ever"),
    "port": ("restored", "stock"),
    "layouts": ("official", "random"),
    "rotation": ("axis_angle", "euler_xyz"),
    "gripper": ("signed", "unit"),
}


@EnvConfig.register_subclass("simpler")
@dataclass
class SimplerEnvConfig(EnvConfig):
    """SIMPLER's WidowX + Bridge tasks; see the README for the options."""

    task: str | None = ",".join(name.split("/")[1] for name in TASKS)
    fps: int = int(CONTROL_RATE)
    success: str = "last"
    port: str = "restored"
    layouts: str = "official"
    rotation: str = "axis_angle"
    gripper: str = "signed"
    width: int = 640
    backend: str = "cpu"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--env.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.port == "stock" and self.rotation == "axis_angle":
            raise ValueError("the stock port reads rotations as Euler angles: give --env.rotation=euler_xyz")
        for task in self.task.split(","):
            simpler_task(task)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (7,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (7,)),
            "pixels/image": PolicyFeature(FeatureType.VISUAL, (self.width * 3 // 4, self.width, 3)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/image": f"{OBS_IMAGES}.image"}

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `SimplerGymEnv` beside the task."""
        names = ("success", "port", "layouts", "rotation", "gripper", "width", "backend")
        return {name: getattr(self, name) for name in names}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """One vector environment of `n_envs` copies per task, each copy with its own simulation."""
        from lerobot_env_simpler.environment import SimplerGymEnv

        made = {}
        for index, task in enumerate(self.task.split(",")):
            copies = [partial(SimplerGymEnv, task, **self.gym_kwargs) for _ in range(n_envs)]
            mode = gym.vector.AutoresetMode.NEXT_STEP
            if use_async_envs and n_envs > 1:
                made[index] = gym.vector.AsyncVectorEnv(copies, context="forkserver", autoreset_mode=mode)
            else:
                made[index] = gym.vector.SyncVectorEnv(copies, autoreset_mode=mode)
        return {"simpler": made}
