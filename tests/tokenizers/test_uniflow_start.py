import dataclasses

import pytest
import torch

from headrace.nn.patches import patchify
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS
from headrace.tokenizers.uniflow_start import start_bottleneck

SMALL = UniFlowConfig(
    encoder=dataclasses.replace(ENCODERS["tiny"], image_size=32, patch=4, width=64, depth=1, heads=4),
    latent_channels=8,
    global_depth=1,
    flow_depth=1,
)


def images(count=8, seed=1):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").clamp(-1, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UniFlow(SMALL).eval()


def told_linearly(latents, pixels):
    """Share of the pixels' variance that a linear map from the latents tells."""
    x, y = (v.flatten(0, 1).double() for v in (latents, pixels))
    x, y = x - x.mean(0), y - y.mean(0)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return 1 - (left.square().sum() / y.square().sum()).item()


@torch.no_grad()
def test_latents_tell_more_of_the_pixels_than_a_random_bottleneck_and_as_much_as_said(model):
    batch = images()
    pixels = patchify(batch, 4)
    before = told_linearly(model.encode(batch), pixels)
    said = start_bottleneck(model, batch)
    after = told_linearly(model.encode(batch), pixels)
    assert after > before
    assert after == pytest.approx(said, abs=0.01)
    fresh = images(seed=2)
    assert told_linearly(model.encode(fresh), patchify(fresh, 4)) > 0.9 * said


@torch.no_grad()
def test_both_directions_are_linear_with_mean_square_one(model):
    batch = images()
    start_bottleneck(model, batch)
    latents = model.encode(batch)
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.05)
    back = model.from_latent(latents)
    assert back.square().mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(model.from_latent(3 * latents), 3 * back, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_solved_is_refused(model):
    with pytest.raises(ValueError, match="64 patches are too few for 64 numbers"):
        start_bottleneck(model, images(1))
    wide = UniFlow(dataclasses.replace(SMALL, latent_channels=40))
    with pytest.raises(ValueError, match="40 latent channels need an encoder width of at least 80, got 64"):
        start_bottleneck(wide, images())
