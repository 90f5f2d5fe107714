import pytest
import torch

from headrace.flow.latent import LatentScaler, draw_latent


@pytest.fixture
def latents(draw):
    return torch.randn(64, 3, 4, 4, generator=draw) * torch.tensor([5.0, 1.0, 0.1]).reshape(3, 1, 1) + 2.0


def test_scaled_latents_have_unit_spread_and_come_back(latents):
    scaler = LatentScaler.fit(latents)
    scaled = scaler.scale(latents)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)
    torch.testing.assert_close(scaler.unscale(scaled), latents, atol=1e-5, rtol=1e-5)
    tokens = latents.flatten(2).transpose(1, 2)
    last = LatentScaler.fit(tokens, axis=-1)
    torch.testing.assert_close(last.scale(tokens), scaled.flatten(2).transpose(1, 2))


def test_one_factor_keeps_the_channels_proportions(latents):
    scaled = LatentScaler.fit(latents, per_channel=False).scale(latents)
    assert scaled.std().item() == pytest.approx(1.0, abs=0.01)
    assert (scaled[:, 0].std() / scaled[:, 1].std()).item() == pytest.approx(5.0, rel=0.1)


def test_moments_draw_what_they_say(draw):
    mean, log_variance = torch.full((20_000, 1), 3.0), torch.full((20_000, 1), -2.0)
    drawn = draw_latent(mean, log_variance, generator=draw)
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(2.718**-1, abs=0.01)
    assert draw_latent(mean, log_variance, sample=False) is mean


def test_json_round_trip_and_refusals(latents):
    scaler = LatentScaler.fit(latents)
    assert LatentScaler.from_json(scaler.to_json()) == scaler
    for make, message in (
        (lambda: scaler.scale(latents[:, :2]), "3 channels"),
        (lambda: LatentScaler.fit(torch.zeros(4, 2)), "does not vary"),
        (lambda: LatentScaler(mean=(0.0,), std=(0.0,)), "above 0"),
        (lambda: LatentScaler(mean=(0.0,), std=(1.0, 1.0)), "per channel"),
        (lambda: LatentScaler.from_json('{"mean": [0]}'), "mean, std and axis"),
        (lambda: draw_latent(torch.zeros(2), torch.zeros(3)), "one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
