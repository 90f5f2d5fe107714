import gymnasium as gym
import numpy as np
import torch

from headrace.sim.wrappers import Unbatched, unbatch


def test_unbatch_turns_tensors_of_one_into_numbers_and_arrays():
    value = unbatch({"a": torch.ones(1, 3), "b": torch.tensor([True]), "c": 2, "d": {"e": torch.zeros(1, 2, 2)}})
    assert value["a"].shape == (3,) and value["b"] is True and value["c"] == 2 and value["d"]["e"].shape == (2, 2)


class Batched(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return torch.zeros(1, 1), {}

    def step(self, action):
        return (
            torch.ones(1, 1),
            torch.tensor([0.5]),
            torch.tensor([False]),
            torch.tensor([True]),
            {"n": torch.tensor([3])},
        )


def test_unbatched_environment():
    env = Unbatched(Batched())
    env.reset()
    observation, reward, terminated, truncated, info = env.step(np.zeros(1))
    assert observation.shape == () or observation == 1.0
    assert (reward, terminated, truncated, info) == (0.5, False, True, {"n": 3})
