"""Arenas of other packages: conventions of each adapter; those whose package is missing say how to get it."""

import numpy as np
import pytest

from headrace.sim.environment import InvalidAction
from headrace.sim.tasks import ARENAS, find_task, find_tasks, make_environment, missing_package


def test_what_is_missing_is_named_with_the_way_to_get_it():
    assert missing_package("numpy", "pip install numpy") == ""
    assert missing_package("no-such-arena", "pip install it") == "pip install it"
    assert all(not task.missing() or task.missing().startswith("pip install") for task in ARENAS)
    groups = "metaworld,aloha,pusht,libero-spatial,libero-object,libero-goal,libero-10"
    assert len(find_tasks(groups)) == len(ARENAS)


def ready(name):
    task = find_task(name)
    if task.missing():
        pytest.skip(f"{name} needs: {task.missing()}")
    return make_environment(task)


def test_pusht_follows_the_target_and_starts_the_same_from_a_seed():
    env = ready("pusht")
    first, again, other = env.reset(3), env.reset(3), env.reset(4)
    np.testing.assert_array_equal(first.images["image"], again.images["image"])
    assert first.images["image"].shape == (96, 96, 3) and not np.array_equal(first.state, other.state)
    target = np.array([40.0, 40.0], np.float32)
    for _ in range(25):
        step = env.step(target)
    assert np.abs(step.observation.state - target).max() < 30 and not step.success
    assert 0 <= step.readings["coverage"] <= 1
    with pytest.raises(InvalidAction, match="outside its bounds"):
        env.step(np.array([600.0, 0.0]))
    env.close()


def test_metaworld_moves_its_hand_and_shows_the_table_below_it():
    env = ready("metaworld/reach")
    before = env.reset(0)
    for _ in range(10):
        step = env.step(np.array([0, 0, 1, 0], np.float32))
    assert step.observation.state[2] > before.state[2] + 0.02
    assert np.array_equal(env.reset(0).state, before.state)
    env.close()


def test_aloha_follows_its_joint_targets():
    env = ready("aloha/transfer-cube")
    start = env.reset(0)
    target = np.clip(start.state, env.spec.low, env.spec.high)
    target[0] += 0.2
    for _ in range(10):
        step = env.step(target)
    assert step.observation.state[0] > start.state[0] + 0.1
    assert step.observation.images["top"].shape == (480, 640, 3)
    env.close()


def test_libero_starts_from_the_suites_own_states_and_moves_its_hand():
    env = ready("libero/spatial-0")
    first, again, other = env.reset(0), env.reset(50), env.reset(1)
    np.testing.assert_allclose(first.state, again.state, atol=1e-5)
    assert first.instruction.startswith("pick up")
    assert not np.array_equal(first.images["agentview"], other.images["agentview"])
    for _ in range(5):
        step = env.step(np.array([0, 0, 1, 0, 0, 0, -1], np.float32))
    assert step.observation.state[2] > other.state[2] + 0.02 and not step.success
    env.close()
