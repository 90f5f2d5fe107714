import dataclasses

import pytest
import torch

from headrace.nn.distill import LayerwiseDistillation
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS
from headrace.tokenizers.uniflow_loss import draw_times, loss_by_time, parameter_groups, uniflow_loss
from headrace.tokenizers.uniflow_protocol import psnr

SMALL = UniFlowConfig(
    encoder=dataclasses.replace(ENCODERS["tiny"], image_size=32, depth=3),
    latent_channels=64,
    global_depth=2,
    flow_depth=3,
)


def images(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").clamp(-1, 1)


def trained(steps, *, config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = UniFlow(config).train()
    distillation = LayerwiseDistillation(model.encoder, model.encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50)
        terms = uniflow_loss(model, images(), distillation=distillation, generator=generator)
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), terms


def test_flow_loss_at_zero_init_is_the_variance_of_pixels_and_noise():
    model = UniFlow(dataclasses.replace(SMALL, zero_init=True, distill_weight=0.0))
    batch = images(16)
    terms = uniflow_loss(model, batch, generator=torch.Generator().manual_seed(0))
    assert terms.flow.item() == pytest.approx(batch.square().mean().item() + 1, rel=0.02)


def test_at_the_start_only_the_flow_pulls_and_it_reaches_the_first_block():
    torch.manual_seed(0)
    model = UniFlow(SMALL)
    distillation = LayerwiseDistillation(model.encoder, model.encoder)
    terms = uniflow_loss(model, images(), distillation=distillation)
    assert terms.distill.item() < 1e-6
    terms.total.backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.encoder.patch_embed.proj.weight.grad.abs().max() > 0


def test_a_bfloat16_pass_gives_nearly_the_float32_loss():
    torch.manual_seed(0)
    model = UniFlow(dataclasses.replace(SMALL, distill_weight=0.0))
    full = uniflow_loss(model, images(), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = uniflow_loss(model, images(), generator=torch.Generator().manual_seed(0))
    assert half.flow.dtype == torch.float32
    assert half.flow.item() == pytest.approx(full.flow.item(), rel=0.02)


def test_times_are_one_per_patch_or_one_per_image():
    per_patch = draw_times(UniFlow(SMALL), 3, 16, None)
    assert per_patch.unique().numel() == 48
    per_image = draw_times(UniFlow(dataclasses.replace(SMALL, time_per="image")), 3, 16, None)
    assert per_image.reshape(3, 16).unique(dim=1).shape == (3, 1)


def test_loss_by_time_averages_within_quarters_and_marks_empty_ones():
    error = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 5)
    got = loss_by_time(error, torch.zeros(3, 5), torch.tensor([0.1, 0.2, 0.9]))
    assert got[0].item() == pytest.approx(2.5) and got[3].item() == pytest.approx(9)
    assert got[1:3].isnan().all()


def test_forgetting_the_teacher_is_an_error():
    with pytest.raises(ValueError, match="distill_weight=0"):
        uniflow_loss(UniFlow(SMALL), images())


def test_every_parameter_is_in_one_group_and_the_encoder_is_slower():
    model = UniFlow(SMALL)
    new, encoder = parameter_groups(model, lr=2e-4)
    assert encoder["lr"] == pytest.approx(5e-5)
    assert len(new["params"]) + len(encoder["params"]) == len(list(model.parameters()))


@pytest.mark.slow
def test_four_pictures_are_learned_and_the_noise_seed_fades():
    model, terms = trained(260)
    batch = images()
    with torch.no_grad():
        latents = model.encode(batch)
        one, other = model.decode(latents, seed=1), model.decode(latents, seed=2)
        fresh = UniFlow(SMALL).eval()
        before = (fresh.decode(latents, seed=1) - fresh.decode(latents, seed=2)).abs().mean()
    unit = model.preprocessing.to_unit
    assert psnr(unit(batch), unit(one)).mean() > 20
    assert (one - other).abs().mean() < 0.25 * before
    log = terms.log()
    assert {"alpha/1", "weight/3", "flow/t0", "flow/t3", "latent/std"} <= set(log)
    assert 0 < log["distill"] < 0.2
