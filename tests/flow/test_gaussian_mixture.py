import pytest
import torch

from headrace.flow.gaussian_mixture import GaussianMixture
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate, integrate_adaptive
from headrace.flow.straightness import wasserstein2_squared


def test_one_component_maps_by_shift_and_scale(mixtures, draw):
    noise = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    one = GaussianMixture(means=mixtures["one_2d"].means.double(), std=0.2)
    torch.testing.assert_close(integrate_adaptive(one, noise, tolerance=1e-8).x, one.means + 0.2 * noise, atol=1e-5,
                               rtol=0)  # fmt: skip


def test_velocity_is_the_mean_of_the_paths_through_a_point(mixtures, draw):
    """Of many straight paths, the mean target of those that pass near x at time t is the marginal velocity at x."""
    mixture, t = mixtures["ring_wide"], 0.45
    paths = straight_path(
        torch.randn(400_000, 2, generator=draw), mixture.sample(400_000, generator=draw), torch.full((400_000,), t)
    )
    for x in (torch.tensor([1.0, 0.5]), torch.tensor([-2.0, 1.0])):
        near = (paths.x_t - x).norm(dim=1) < 0.1
        expected = mixture(x[None], torch.tensor([t]))[0]
        torch.testing.assert_close(paths.target[near].mean(0), expected, atol=0.15, rtol=0.05)


def test_flow_ends_in_the_mixture(mixtures, draw):
    mixture = mixtures["ring_narrow"]
    end = integrate(mixture, torch.randn(500, 2, generator=draw), steps=100)
    between = wasserstein2_squared(mixture.sample(500, generator=draw), mixture.sample(500, generator=draw))
    assert wasserstein2_squared(end, mixture.sample(500, generator=draw)) < 1.5 * between + 0.3


def test_bad_mixtures_cannot_exist():
    with pytest.raises(ValueError, match="K, D"):
        GaussianMixture(means=torch.zeros(3), std=1.0)
    with pytest.raises(ValueError, match="std"):
        GaussianMixture(means=torch.zeros(3, 2), std=0.0)
