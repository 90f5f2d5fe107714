import pytest
import torch

from headrace.flow.diffusers_import import from_diffusers, sigmas_of, to_diffusers
from headrace.flow.solver import integrate

GRID = (0.0, 0.1, 0.4, 1.0)


def test_sigmas_fall_from_one_and_leave_the_last_zero_out():
    assert sigmas_of((0.0, 0.25, 1.0)) == [1.0, 0.75]
    for bad in ((1.0, 0.0), (0.0, 0.5), (0.0, 0.5, 0.5, 1.0)):
        with pytest.raises(ValueError, match="must"):
            sigmas_of(bad)


def test_there_and_back_is_the_same_velocity(mixtures):
    ours, x, t = mixtures["ring_wide"], torch.randn(8, 2), torch.rand(8)
    torch.testing.assert_close(from_diffusers(to_diffusers(ours))(x, t), ours(x, t), atol=1e-4, rtol=1e-4)


def test_diffusers_scheduler_ends_where_we_end(mixtures):
    """Their sampler on their network, ours on the imported one, over a grid of uneven steps."""
    diffusers = pytest.importorskip("diffusers")
    ours = mixtures["ring_wide"]

    def network(x, timestep):  # as diffusers trains one: timestep 1000 is noise, target noise minus data
        return -ours(x, 1.0 - timestep / 1000)

    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=sigmas_of(GRID))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.6, 0.0]))
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.expand(len(x))), timestep, x).prev_sample
    torch.testing.assert_close(integrate(from_diffusers(network), noise, grid=GRID), x, atol=1e-4, rtol=1e-4)
