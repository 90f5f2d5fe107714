import math

import pytest
import torch

from headrace.flow.gaussian_mixture import GaussianMixture


@pytest.fixture
def draw():
    """A seeded source of randomness."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def mixtures():
    """The spec's analytic targets, by name."""
    angle = torch.arange(8) * (math.pi / 4)
    ring = 5.0 * torch.stack([angle.cos(), angle.sin()], 1)
    modes = 1.5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    return {
        "one_2d": GaussianMixture(means=torch.tensor([[3.0, 1.0]]), std=0.2),
        "one_16d": GaussianMixture(means=modes[:1], std=0.1),
        "ring_wide": GaussianMixture(means=ring, std=1.0),
        "ring_narrow": GaussianMixture(means=ring, std=0.316),
        "modes_16d": GaussianMixture(means=modes, std=0.3),
        "modes_16d_smooth": GaussianMixture(means=0.5 * modes, std=0.8),
    }
