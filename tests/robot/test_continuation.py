"""Real-time chunking: the published guidance, and chunks that go on where the old one is."""

from dataclasses import replace

import numpy as np
import torch

from headrace.contracts import ActionSpec, Observation, can_continue
from headrace.flow.solver import SolverSettings
from headrace.robot.client import RemotePolicy
from headrace.robot.continuation import continuing, guidance_factor, prefix_weights, sample_after
from headrace.robot.policy import FlowPolicy
from headrace.robot.server import ServerConfig, background
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
    assert can_continue(policy)
    policy.reset(0, seed=5)
    look = Observation(images={"base_camera": np.zeros((64, 64, 3), np.uint8)}, state=np.zeros(0, np.float32))
    prefix = np.full((3, 2), 1.5, np.float32)
    chunk = policy.act_after([look], [0], prefix=prefix, delay=1)
    assert chunk.actions.shape == (1, 4, 2) and abs(chunk.actions[0, 0] - 1.5).max() < 0.3


def test_a_served_policy_continues_a_chunk_as_the_local_one_does():
    local, random = FlowPolicy(network(), device="cpu"), np.random.default_rng(0)
    looks = [
        Observation(
            images={"base_camera": random.integers(0, 255, (64, 64, 3), dtype=np.uint8)}, state=np.zeros(0, np.float32)
        )
        for _ in range(2)
    ]
    prefix = random.normal(size=(2, 3, 2)).astype(np.float32)
    with background(FlowPolicy(network(), device="cpu"), ServerConfig(port=0)) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        assert can_continue(remote)
        for policy in (local, remote):
            for slot in (0, 1):
                policy.reset(slot, seed=7 + slot)
        for delay in (0, 2):
            wanted = local.act_after(looks, [0, 1], prefix=prefix, delay=delay).actions
            got = remote.act_after(looks, [0, 1], prefix=prefix, delay=delay).actions
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        free = remote.act(looks, [0, 1]).actions
        np.testing.assert_allclose(free, local.act(looks, [0, 1]).actions, atol=1e-5)
        remote.close()


def test_a_policy_with_held_features_says_that_it_cannot_continue():
    policy = FlowPolicy(network(), device="cpu")
    policy.model.decoder.config = replace(policy.model.decoder.config, segments=2, features="hold")
    assert not can_continue(policy)
