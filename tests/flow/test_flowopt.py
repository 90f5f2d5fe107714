import math

import pytest
import torch

from headrace.flow.flowopt import NotContractive, edit, invert, optimise_noise, step_size_bound, uni_inversion
from headrace.flow.gaussian_mixture import GaussianMixture
from headrace.flow.residual import toward
from headrace.flow.solver import SolverSettings, integrate, uniform_grid

TEN = SolverSettings(steps=10)


def sampler(velocity, steps=10):
    return lambda z: integrate(velocity, z, steps=steps)


@pytest.mark.parametrize("factor", [0.5, 0.95, 1.05])
def test_the_bound_is_exact_for_an_affine_flow(factor, mixtures, draw):
    """One Gaussian: the sampler is z -> a + s z, so the limit is 2/s."""
    one = mixtures["one_2d"]
    f = sampler(GaussianMixture(means=one.means.double(), std=one.std))
    noise = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    slope = (f(torch.ones(1, 2).double()) - f(torch.zeros(1, 2).double()))[0, 0].item()
    bound = step_size_bound(f, noise, radius=0.5, generator=draw)
    assert bound.limit == pytest.approx(2 / slope, rel=1e-3) and bound.contractive_share == 1.0
    result = optimise_noise(
        f, noise, toward(f(noise.flip(0))), step_size=factor * bound.limit, iterations=150, tolerance=1e-5
    )
    assert result.stopped == ("converged" if factor < 1 else "diverged")
    assert (result.history[-1] < 1e-5) == (factor < 1)


def rotation(degrees):
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return lambda z: z @ matrix.T


def test_rotations_know_their_limit_or_have_none(draw):
    noise = torch.randn(64, 2, generator=draw)
    assert step_size_bound(rotation(60), noise, generator=draw).limit == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(NotContractive, match=r"100\.0%"):
        step_size_bound(rotation(100), noise, generator=draw)


def test_a_multimodal_flow_converges_below_its_bound_and_not_far_above(mixtures, draw):
    f = sampler(mixtures["modes_16d_smooth"])
    truth = torch.randn(128, 16, generator=draw)
    start = truth + 0.5 * torch.randn(128, 16, generator=draw)
    target = f(truth)
    first = (f(start) - target).square().mean(1).sqrt()
    bound = step_size_bound(f, torch.randn(2000, 16, generator=draw), quantile=0.0, generator=draw)
    found = optimise_noise(f, start, toward(target), step_size=0.75 * bound.limit, iterations=150)
    assert (found.error < 0.01 * first).all()
    noise = start
    for _ in range(60):
        noise = noise - 14 * bound.limit * (f(noise) - target)
    assert ((f(noise) - target).square().mean(1).sqrt() > first).float().mean() > 0.5


def test_uni_inversion_starts_closer_than_fresh_noise_and_is_exact_for_a_translation(mixtures, draw):
    velocity = mixtures["modes_16d_smooth"]
    data = integrate(velocity, torch.randn(64, 16, generator=draw), steps=10)
    start = uni_inversion(velocity, data, grid=uniform_grid(10))
    fresh = torch.randn(64, 16, generator=draw)
    near, far = ((integrate(velocity, z, steps=10) - data).square().mean() for z in (start, fresh))
    assert near < 0.1 * far
    torch.testing.assert_close(uni_inversion(lambda x, t: torch.ones_like(x), data, grid=uniform_grid(5)), data - 1)
    with pytest.raises(ValueError, match="rising"):
        uni_inversion(velocity, data, grid=(1.0, 0.0))


def test_inversion_reproduces_data_and_costs_what_it_says(mixtures, draw):
    velocity = mixtures["modes_16d_smooth"]
    data = integrate(velocity, torch.randn(32, 16, generator=draw), steps=10)
    calls = []

    def counted(x, t):
        calls.append(1)
        assert not torch.is_grad_enabled()  # no graph is built: memory is flat in the number of steps
        return velocity(x, t)

    result = invert(counted, data, TEN, step_size=0.1, iterations=30)
    assert len(calls) == 31 * 10 + 11
    assert result.error.max() < 0.02 * data.std()
    torch.testing.assert_close(integrate(velocity, result.noise, steps=10), result.output)


def test_a_masked_target_leaves_the_rest_of_the_noise_alone(mixtures, draw):
    """Real-time chunking: the first actions are committed, the rest stays free."""
    f = sampler(mixtures["modes_16d_smooth"])
    noise = torch.randn(16, 16, generator=draw)
    committed = f(torch.randn(16, 16, generator=draw))
    mask = (torch.arange(16) < 6).float()
    result = optimise_noise(f, noise, toward(committed, mask=mask), step_size=0.1, iterations=60)
    assert torch.equal(result.noise[:, 6:], noise[:, 6:])
    before, after = (((x - committed)[:, :6]).square().mean() for x in (f(noise), result.output))
    assert after < 0.05 * before


def test_editing_keeps_more_of_the_original_with_every_iteration(mixtures, draw):
    source = mixtures["modes_16d_smooth"]
    shift = torch.zeros(16)
    shift[:4] = 1.5

    def target(x, t):  # the same mixture moved by `shift`
        return source(x - t[:, None] * shift, t) + shift

    data = integrate(source, torch.randn(32, 16, generator=draw), steps=10)
    seen = []
    result = edit(source, target, data, TEN, step_size=0.1, iterations=8, progress=lambda s: seen.append(s.error))
    assert len(seen) == 9 and seen == sorted(seen, reverse=True) and tuple(seen) == result.history


def test_progress_can_stop_and_ends_are_named(mixtures, draw):
    f = sampler(mixtures["modes_16d_smooth"])
    noise = torch.randn(8, 16, generator=draw)
    asked = optimise_noise(f, noise, toward(f(noise) + 0.1), step_size=0.1, iterations=50,
                           progress=lambda s: s.iteration == 3)  # fmt: skip
    assert asked.stopped == "asked" and len(asked.history) == 4
    stuck = optimise_noise(lambda z: z * 0, noise, toward(noise), step_size=0.1, iterations=50, patience=5)
    assert stuck.stopped == "stalled" and len(stuck.history) == 6
    assert (
        optimise_noise(f, noise, toward(f(noise)), step_size=0.1, iterations=5, tolerance=1e-6).stopped == "converged"
    )
    assert optimise_noise(f, noise, toward(f(noise) + 1), step_size=0.1, iterations=2).stopped == "budget"
    blown = optimise_noise(lambda z: z * 30, noise, toward(noise), step_size=1.0, iterations=200)
    assert blown.stopped == "diverged" and torch.equal(blown.noise, noise)


def test_bad_input_is_refused(draw):
    noise = torch.randn(4, 2, generator=draw)
    with pytest.raises(ValueError, match="above 0"):
        optimise_noise(lambda z: z, noise, toward(noise), step_size=0.0, iterations=3)
    with pytest.raises(ValueError, match="float32 or float64"):
        optimise_noise(lambda z: z, noise.half(), toward(noise), step_size=0.1, iterations=3)
    with pytest.raises(ValueError, match="noise's shape"):
        optimise_noise(lambda z: z, noise, lambda x: x[:, :1], step_size=0.1, iterations=3)
    with pytest.raises(ValueError, match="radius"):
        step_size_bound(lambda z: z, noise, radius=0.0)
    adaptive = SolverSettings(method="dopri5", tolerance=1e-3)
    with pytest.raises(ValueError, match="dopri5 chooses its own"):
        invert(lambda x, t: x, noise, adaptive, step_size=0.1)
    with pytest.raises(ValueError, match="dopri5 chooses its own"):
        edit(lambda x, t: x, lambda x, t: x, noise, adaptive, step_size=0.1)
