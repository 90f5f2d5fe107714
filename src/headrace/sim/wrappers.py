"""Gymnasium wrappers that change one thing each."""

from typing import Any

import gymnasium as gym
import numpy as np


class Unbatched(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Turn ManiSkill's batch-of-one torch tensors into plain numpy arrays and Python scalars."""

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return unbatch(observation), unbatch(info)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return (
            unbatch(observation),
            float(unbatch(reward)),
            bool(unbatch(terminated)),
            bool(unbatch(truncated)),
            unbatch(info),
        )


def unbatch(value: Any) -> Any:
    """Drop the leading dimension of one from every tensor of a nested dict; scalars become Python numbers."""
    if isinstance(value, dict):
        return {key: unbatch(item) for key, item in value.items()}
    if hasattr(value, "cpu"):
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray):
        value = value[0] if value.ndim and value.shape[0] == 1 else value
        return value.item() if np.ndim(value) == 0 else value
    return value
