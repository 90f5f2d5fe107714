import pytest
import torch

from headrace.tokenizers.tokenflow import PLAIN, TokenFlowConfig
from headrace.tokenizers.vqgan import VQGANConfig, VQGANDecoder, VQGANEncoder


def test_one_channel_a_group_erases_a_picture_wide_colour():
    """What every group of one channel does; with several the channels' means stay apart."""
    features, colour = torch.randn(2, 32, 8, 8), torch.randn(1, 32, 1, 1) * 3
    for groups, erased in ((32, True), (8, False)):
        norm = VQGANDecoder(VQGANConfig(width=32, multipliers=(1, 2), latent=4, groups=groups)).norm_out
        assert torch.allclose(norm(features), norm(features + colour), atol=1e-4) == erased


def test_the_small_variant_has_as_many_channels_a_group_as_the_published():
    small = TokenFlowConfig.mini().pixel_decoder
    assert small.width // small.groups == PLAIN.width // PLAIN.groups == 4


def test_the_shortcut_carries_what_is_flat_past_the_norms():
    config = VQGANConfig(width=32, multipliers=(1, 1, 2), blocks=1, latent=6, groups=8, shortcut=True)
    encoder, decoder = VQGANEncoder(config), VQGANDecoder(config)
    for side in (encoder, decoder):
        torch.nn.init.zeros_(side.conv_out.weight)
        torch.nn.init.zeros_(side.conv_out.bias)
    dark, bright = (torch.full((1, 3, 8, 8), value) for value in (-0.5, 0.5))
    with torch.no_grad():
        steps = encoder(bright) - encoder(dark)
        torch.testing.assert_close(steps, steps[..., :1, :1].expand_as(steps))
        assert steps.abs().max() > 0.01
        latents, more = torch.randn(2, 1, 6, 2, 2)
        both = decoder(latents + more) + decoder(torch.zeros_like(more))
        torch.testing.assert_close(both, decoder(latents) + decoder(more))
    assert not any(
        name.startswith("shortcut") for name in VQGANDecoder(VQGANConfig(width=32, multipliers=(1, 2))).state_dict()
    )


@pytest.mark.parametrize(("groups", "shortcut"), [(8, True), (32, False)])
def test_a_side_shrinks_by_the_factor_and_comes_back(groups, shortcut):
    config = VQGANConfig(width=32, multipliers=(1, 2, 2), blocks=1, latent=5, groups=groups, shortcut=shortcut)
    images = torch.rand(2, 3, 24, 16)
    latents = VQGANEncoder(config)(images)
    assert config.factor == 4 and latents.shape == (2, 5, 6, 4)
    assert VQGANDecoder(config)(latents).shape == images.shape


def test_widths_that_do_not_fit_the_groups_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        VQGANConfig(width=48)
    assert VQGANConfig(width=48, groups=16).groups == 16
    with pytest.raises(ValueError, match="at least 1"):
        VQGANConfig(groups=0)
