import pytest
import torch

from headrace.flow.gaussian_mixture import GaussianMixture
from headrace.flow.straightness import measure_straightness, normalised_path_energy, wasserstein2_squared


def test_a_translation_is_straight_and_optimal(draw):
    noise = torch.randn(200, 3, generator=draw)
    shift = torch.tensor([2.0, -1.0, 0.5])
    figures = measure_straightness(lambda x, t: shift.expand_as(x), noise, fine_steps=20)
    assert figures.curvature < 1e-8 and max(figures.step_errors.values()) < 1e-4
    assert figures.path_energy == pytest.approx(5.25, abs=1e-4)
    assert normalised_path_energy(figures.path_energy, noise, noise + shift) < 1e-5


def test_a_narrow_multimodal_flow_bends_more_than_a_wide_one(mixtures, draw):
    noise = torch.randn(256, 2, generator=draw)
    narrow, wide = (measure_straightness(mixtures[name], noise) for name in ("ring_narrow", "one_2d"))
    assert narrow.curvature > 3 * wide.curvature
    assert narrow.step_errors[1] > narrow.step_errors[4] > narrow.step_errors[8]


def test_wasserstein_knows_translations_and_is_a_distance(draw):
    points = torch.randn(100, 2, generator=draw)
    shuffled = points[torch.randperm(100, generator=draw)]
    assert wasserstein2_squared(points, shuffled) < 1e-12
    assert wasserstein2_squared(points, shuffled + torch.tensor([3.0, 4.0])) == pytest.approx(25.0, rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        wasserstein2_squared(points, points[:50])


def test_wasserstein_between_gaussians(draw):
    """W2^2 of N(0, I) and N(m, s^2 I) is |m|^2 + D (1 - s)^2."""
    mixture = GaussianMixture(means=torch.tensor([[3.0, 1.0]]), std=0.2)
    measured = wasserstein2_squared(torch.randn(1500, 2, generator=draw), mixture.sample(1500, generator=draw))
    assert measured == pytest.approx(10.0 + 2 * 0.64, rel=0.08)
