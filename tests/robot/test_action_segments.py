"""Blockwise flow matching in the policy's action decoder: several time segments, each with its own stack."""

from dataclasses import replace

import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings
from headrace.robot.action_decoder import ActionDecoder, ActionDecoderConfig
from headrace.robot.continuation import sample_after
from headrace.robot.policy import FlowPolicy
from headrace.robot.policy_start import Start
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_trunk import encode_text, words_of

SPEC = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)
WORDS = words_of(["push the cube", "pull it"])


def some_inputs(batch=2):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 1, 1, 64, 64, 3), generator=draw, dtype=torch.uint8)
    text = encode_text(["push the cube", "pull it"][:batch], WORDS)
    return PolicyInput(images, torch.randn(batch, 15, generator=draw), text)


def policy(segments, *, draws=1, features="full", noisy=True):
    """A tiny policy; `noisy` moves the layers that start at zero, so that the stacks differ."""
    torch.manual_seed(0)
    plain = VipraConfig.tiny(SPEC)
    decoder = replace(plain.decoder, segments=segments, features=features)
    model = VipraPolicy(replace(plain, decoder=decoder, draws=draws)).eval()
    if segments > 1 and noisy:
        with torch.no_grad():
            for parameter in model.decoder.stacks.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_one_segment_is_the_network_as_it_was():
    keys = ["action_in", "mix", "out", "velocity_out"]
    decoder = ActionDecoder(ActionDecoderConfig(width=32, action_dim=3, horizon=4))
    assert list(decoder.state_dict()) == [f"{key}.{part}" for key in keys for part in ("weight", "bias")]
    torch.manual_seed(5)
    hidden, noisy, t = torch.randn(2, 4, 32), torch.randn(2, 4, 3), torch.rand(2)
    assert torch.equal(decoder.velocity(hidden, noisy, t), decoder.velocity_out(hidden))
    model, inputs, noise = policy(1), some_inputs(), torch.randn(2, 4, 3)
    prefix = model.compute_prefix(inputs)
    solver = SolverSettings(steps=2)
    with torch.inference_mode():
        by_hand = solver.sample(lambda x, t: model.velocity(prefix, x, t), noise)
    torch.testing.assert_close(model.sample(inputs, noise, solver), model.normalize_action.inverse(by_hand))


@pytest.mark.parametrize("solver", [SolverSettings(steps=7), SolverSettings(steps=3, method="heun")])
def test_segments_sample_alike_cached_and_whole(solver):
    model, inputs, noise = policy(3), some_inputs(), torch.randn(2, 4, 3)
    made = model.sample(inputs, noise, solver)
    torch.testing.assert_close(made, model.sample_uncached(inputs, noise, solver), rtol=1e-5, atol=1e-5)
    prefix = model.compute_prefix(inputs)
    with torch.inference_mode():
        by_time = solver.sample(lambda x, t: model.velocity(prefix, x, t), noise)
    torch.testing.assert_close(made, model.normalize_action.inverse(by_time), rtol=1e-5, atol=1e-5)


def test_each_stack_acts_in_its_own_segment_only():
    model, prefix, noisy = policy(2), policy(2).compute_prefix(some_inputs()), torch.randn(2, 4, 3)
    with torch.inference_mode():
        before = model.velocity(prefix, noisy, torch.tensor([0.2, 0.8]))
        for parameter in model.decoder.stacks.stacks[1].parameters():
            parameter.add_(1.0)
        after = model.velocity(prefix, noisy, torch.tensor([0.2, 0.8]))
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_held_features_call_the_backbone_once_a_segment():
    held, full, inputs, noise = policy(2, features="hold"), policy(2), some_inputs(), torch.randn(2, 4, 3)
    calls = []
    count = held.decoder.embed
    held.decoder.embed = lambda noisy, t: calls.append(t) or count(noisy, t)
    once, often = SolverSettings(steps=2), SolverSettings(steps=6)
    torch.testing.assert_close(held.sample(inputs, noise, once), full.sample(inputs, noise, once))
    assert len(calls) == 2
    assert not torch.allclose(held.sample(inputs, noise, often), full.sample(inputs, noise, often))
    assert len(calls) == 4
    with pytest.raises(ValueError, match="in Euler steps only"):
        held.sample(inputs, noise, SolverSettings(steps=4, method="heun"))


def test_training_reaches_every_stack_and_learns_one_chunk():
    model, inputs = policy(2, draws=32, noisy=False).train(), some_inputs(1)
    actions = torch.tensor([[[0.5, -0.5, 1.0], [0.2, 0.1, 1.0], [0.0, 0.3, -1.0], [0.1, 0.1, -1.0]]])
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(120):
        loss = model.loss(inputs, actions, None, draw)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for stack in model.decoder.stacks.stacks:
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in stack.parameters())
    noise = torch.randn(1, 4, 3, generator=draw)
    assert (model.eval().sample(inputs, noise, SolverSettings(steps=10)) - actions).abs().max() < 0.2


def test_times_are_even_over_segments_and_not_sorted_by_sample():
    decoder = ActionDecoder(ActionDecoderConfig(width=32, action_dim=3, horizon=4, segments=4))
    times = decoder.draw_times(40, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.bincount((times * 4).long()).tolist() == [10] * 4
    assert not torch.equal(times.sort().values, times)
    assert decoder.draw_times(2, None, torch.device("cpu")).shape == (2,)


def test_a_saved_policy_with_segments_acts_the_same(tmp_path):
    model, inputs, noise, solver = policy(3), some_inputs(), torch.randn(2, 4, 3), SolverSettings(steps=5)
    model.save_pretrained(tmp_path)
    again = VipraPolicy.from_pretrained(tmp_path)
    assert again.config.decoder.segments == 3
    assert torch.equal(again.sample(inputs, noise, solver), model.sample(inputs, noise, solver))


def test_too_few_steps_are_refused_everywhere():
    model, inputs, noise, few = policy(4), some_inputs(), torch.randn(2, 4, 3), SolverSettings(steps=3)
    for act in (
        lambda: model.sample(inputs, noise, few),
        lambda: FlowPolicy(model, solver=few, device="cpu"),
        lambda: sample_after(model, inputs, noise, few, prefix=torch.zeros(2, 2, 3), delay=1),
    ):
        with pytest.raises(ValueError, match="3 steps leave out some of 4 time segments; take at least 4 steps"):
            act()
    assert policy(1).sample(inputs, noise, SolverSettings(steps=1)).shape == noise.shape


def test_held_features_cannot_be_continued():
    noise, prefix = torch.randn(2, 4, 3), torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match="cannot be continued with held features"):
        sample_after(policy(3, features="hold"), some_inputs(), noise, SolverSettings(steps=3), prefix=prefix, delay=1)
    model, nothing = policy(3), torch.zeros(2, 0, 3)
    free = sample_after(model, some_inputs(), noise, SolverSettings(steps=3), prefix=nothing, delay=0)
    torch.testing.assert_close(free, model.sample(some_inputs(), noise, SolverSettings(steps=3)), rtol=1e-4, atol=1e-5)


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="segments must be at least 1"):
        ActionDecoderConfig(segments=0)
    with pytest.raises(ValueError, match="'hold' with several segments"):
        ActionDecoderConfig(features="hold")
    with pytest.raises(ValueError, match="time segments are for the flow head"):
        Start(head="bins", segments=2)
    with pytest.raises(ValueError, match="also depends on the noisy actions"):
        policy(2).decoder.velocity(torch.zeros(1, 4, 32))
