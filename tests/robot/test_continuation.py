"""Real-time chunking: the published guidance, and chunks that go on where the old one is."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from headrace.contracts import ActionSpec, Observation
from headrace.flow.solver import SolverSettings
from headrace.robot.continuation import continuing, guidance_factor, prefix_weights, sample_after
from headrace.robot.drive import PrefixPolicy
from headrace.robot.policy import FlowPolicy
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput

SPEC = ActionSpec(names=("x", "y"), frame="joint", rotation="none", gripper="none", rate=10.0)


def test_guidance_is_the_published_formula_with_the_networks_jacobian():
    """For v = x M the Jacobian of the end is I + (1-t) M, which LeRobot's form leaves out."""
    random = torch.Generator().manual_seed(0)
    matrix, x, prefix = (torch.randn(*shape, generator=random) for shape in ((2, 2), (1, 3, 2), (1, 2, 2)))
    weights, t = torch.tensor([1.0, 0.4, 0.0]), torch.tensor([0.3])
    got = continuing(lambda x, t: x @ matrix, prefix, weights, limit=100.0)(x, t)
    end = x + 0.7 * x @ matrix
    error = torch.zeros(1, 3, 2)
    error[:, :2] = prefix - end[:, :2]
    jacobian = torch.eye(2) + 0.7 * matrix
    spread = 0.7**2 / (0.3**2 + 0.7**2)
    wanted = x @ matrix + 0.7 / (0.3 * spread) * (error * weights[None, :, None]) @ jacobian.T
    torch.testing.assert_close(got, wanted)


def test_the_factor_is_limited_at_both_ends_and_weights_fall():
    assert guidance_factor(torch.tensor([0.0, 0.5, 1.0]), 5.0).tolist() == [5.0, 2.0, 5.0]
    weights = prefix_weights(2, 5, 8)
    assert weights[:2].tolist() == [1, 1] and weights[5:].tolist() == [0, 0, 0]
    assert (weights[1:5].diff() < 0).all() and prefix_weights(9, 9, 4).tolist() == [1, 1, 1, 1]
    assert prefix_weights(3, 0, 4).tolist() == [0, 0, 0, 0]


def network():
    torch.manual_seed(0)
    return VipraPolicy(VipraConfig.tiny(SPEC, state_dim=0)).eval()


def test_a_chunk_continues_the_old_one_and_without_an_old_one_nothing_changes():
    model, solver = network(), SolverSettings(method="euler", steps=10)
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 1, 1, 64, 64, 3), dtype=torch.uint8, generator=random)
    inputs = PolicyInput(images, torch.zeros(1, 0), model.encode_text(["push the cube"]))
    noise = torch.randn(1, 4, 2, generator=random)
    free = model.sample(inputs, noise, solver)
    torch.testing.assert_close(
        sample_after(model, inputs, noise, solver, prefix=torch.zeros(1, 0, 2), delay=0), free, atol=1e-5, rtol=1e-5
    )
    old = free[:, :3] + 2.0
    held = sample_after(model, inputs, noise, solver, prefix=old, delay=2)
    assert (held[:, :2] - old[:, :2]).abs().max() < 0.2 * (free[:, :2] - old[:, :2]).abs().min()


def test_the_policy_serves_the_drive_loop():
    policy = FlowPolicy(network(), device="cpu")
    assert isinstance(policy, PrefixPolicy)
    policy.reset(0, seed=5)
    look = Observation(images={"base_camera": np.zeros((64, 64, 3), np.uint8)}, state=np.zeros(0, np.float32))
    prefix = np.full((3, 2), 1.5, np.float32)
    chunk = policy.act_after([look], [0], prefix=prefix, delay=1)
    assert chunk.actions.shape == (1, 4, 2) and abs(chunk.actions[0, 0] - 1.5).max() < 0.3


def test_held_features_cannot_be_continued_so_the_chunk_is_a_free_one():
    config = VipraConfig.tiny(SPEC, state_dim=0)
    config = replace(config, decoder=replace(config.decoder, segments=2, features="hold"))
    torch.manual_seed(0)
    policy = FlowPolicy(VipraPolicy(config), device="cpu")
    look = Observation(images={"base_camera": np.zeros((64, 64, 3), np.uint8)}, state=np.zeros(0, np.float32))
    chunks = []
    for ask in (policy.act, partial(policy.act_after, prefix=np.ones((3, 2), np.float32), delay=1)):
        policy.reset(0, seed=5)
        chunks.append(ask([look], [0]).actions)
    np.testing.assert_array_equal(*chunks)
