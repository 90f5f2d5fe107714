"""Blockwise flow matching in UniFlow's flow head: several time segments, each with blocks of its own."""

import dataclasses

import pytest
import torch

from headrace.flow.solver import SolverSettings
from headrace.nn.patch_flow import PatchFlow
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS
from headrace.tokenizers.uniflow_loss import draw_times, uniflow_loss

SMALL = UniFlowConfig(
    encoder=dataclasses.replace(ENCODERS["tiny"], image_size=32, depth=1),
    latent_channels=16,
    global_depth=1,
    flow_depth=3,
    distill_weight=0.0,
)
SEGMENTED = dataclasses.replace(SMALL, flow_segments=2, steps=4)


def images(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def segmented():
    """With the layers moved that start at zero, so that the segments differ."""
    torch.manual_seed(0)
    model = UniFlow(SEGMENTED).eval()
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_one_segment_is_the_released_head():
    torch.manual_seed(0)
    plain = UniFlow(SMALL)
    torch.manual_seed(0)
    asked = UniFlow(dataclasses.replace(SMALL, flow_segments=1))
    assert type(plain.flow_head) is PatchFlow and SMALL.flow_segments == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), asked.parameters(), strict=True))
    assert set(plain.flow_head.state_dict()) >= {"input_proj.weight", "res_blocks.2.modulation.bias", "out.weight"}


@torch.no_grad()
def test_decoding_goes_through_the_segment_of_each_step():
    model, latents = segmented(), segmented().encode(images())
    noise = torch.randn(2 * 16, 192)
    condition = model.condition(latents, (4, 4)).flatten(0, 1)
    x = noise
    for k in range(4):
        x = x + 0.25 * model.flow_head(x, torch.full((32,), k / 4), condition)
    torch.testing.assert_close(model._follow(condition, noise, SolverSettings(steps=4)), x, atol=1e-5, rtol=1e-5)
    before = model.decode(latents)
    for parameter in model.flow_head.network.stacks[1].parameters():
        parameter.add_(0.5)
    late = torch.full((32,), 0.7)
    changed = model.flow_head(noise, late, condition)
    assert not torch.allclose(changed, segmented().flow_head(noise, late, condition))
    early = torch.full((32,), 0.3)
    torch.testing.assert_close(
        model.flow_head(noise, early, condition), segmented().flow_head(noise, early, condition), rtol=0, atol=0
    )
    assert not torch.allclose(model.decode(latents), before)


def test_training_reaches_every_segment_and_lowers_the_loss():
    torch.manual_seed(0)
    model, draw = UniFlow(SEGMENTED).train(), torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(40):
        loss = uniflow_loss(model, images(), generator=draw).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for stack in model.flow_head.network.stacks:
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in stack.parameters())


def test_training_times_are_even_over_segments_within_an_image():
    times = draw_times(UniFlow(SEGMENTED), 2, 16, torch.Generator().manual_seed(0))
    late = (times > 0.5).reshape(2, 16)
    assert late.sum() == 16 and 0 < late[0].sum() < 16


@torch.no_grad()
def test_a_saved_tokenizer_with_segments_decodes_the_same(tmp_path):
    model = segmented()
    latents = model.encode(images())
    model.save_pretrained(tmp_path)
    again = UniFlow.from_pretrained(tmp_path)
    assert again.config.flow_segments == 2
    assert torch.equal(again.decode(latents, steps=5), model.decode(latents, steps=5))


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="2 flow_segments need at least as many steps, got 1"):
        dataclasses.replace(SMALL, flow_segments=2)
    with pytest.raises(ValueError, match="flow_segments must be at least 1"):
        dataclasses.replace(SMALL, flow_segments=0)
    model = segmented()
    with pytest.raises(ValueError, match="1 steps leave out some of 2 time segments; take at least 2 steps"):
        model.decode(torch.zeros(1, 16, 16), steps=1)
