import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from headrace.sim.wrappers import ActionChunk, Unbatched, unbatch


def pendulum(limit: int = 200) -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=limit)


def test_a_chunk_equals_stepping_by_hand():
    plain, chunked = pendulum(), ActionChunk(pendulum(), 4)
    plain.reset(seed=3)
    chunked.reset(seed=3)
    actions = np.linspace(-1, 1, 4, dtype=np.float32)[:, None]
    total = 0.0
    for action in actions:
        observation, reward, *_ = plain.step(action)
        total += float(reward)
    got, summed, _, _, info = chunked.step(actions)
    np.testing.assert_array_equal(got, observation)
    assert summed == pytest.approx(total) and info["steps"] == 4


def test_an_episode_ends_inside_a_chunk():
    env = ActionChunk(pendulum(limit=3), 5)
    env.reset(seed=0)
    *_, truncated, info = env.step(np.zeros((5, 1), np.float32))
    assert truncated and info["steps"] == 3


def test_chunk_passes_the_checker_and_is_rebuilt_from_its_spec():
    env = ActionChunk(pendulum(), 2)
    check_env(env, skip_render_check=True)
    again = gym.make(env.spec)
    assert isinstance(again, ActionChunk) and again.action_space.shape == (2, 1)


def test_a_horizon_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ActionChunk(pendulum(), 0)


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
