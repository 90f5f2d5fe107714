import pytest
import torch

from headrace.flow.blockwise import integrate_blockwise
from headrace.flow.guidance import GuidedParts, guided, integrate_guided
from headrace.flow.reverse import reverse_time
from headrace.flow.solver import NonFiniteVelocity, integrate

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def counted(rate):
    calls = []

    def velocity(x, t):
        calls.append(t[0].item())
        return rate * x

    return velocity, calls


def test_scale_one_and_zero_are_the_two_networks():
    for scale, rate in ((1.0, 0.5), (0.0, -0.5), (3.0, 2.5)):
        both = guided(lambda x, t: 0.5 * x, lambda x, t: -0.5 * x, scale=scale)
        torch.testing.assert_close(both(X, torch.rand(4)), rate * X)


def test_interval_is_per_row():
    both = guided(lambda x, t: x, lambda x, t: 0 * x, scale=3.0, interval=(0.2, 0.5))
    factors = both(torch.ones(4, 1), torch.tensor([0.1, 0.2, 0.49, 0.5]))[:, 0]
    assert factors.tolist() == [1.0, 3.0, 3.0, 1.0]
    assert guided(lambda x, t: x, lambda x, t: 0 * x, scale=3.0)(torch.ones(1, 1), torch.ones(1)).item() == 3.0


@pytest.mark.parametrize("interval", [(0.2, 0.6), (0.0, 1.0), (0.75, 1.0)])
def test_stepwise_guidance_agrees_and_saves_calls(interval):
    (yes, yes_calls), (no, no_calls) = counted(0.7), counted(-0.3)
    stepwise = integrate_guided(yes, no, X, scale=2.0, interval=interval, steps=10)
    used = len(no_calls)
    torch.testing.assert_close(stepwise, integrate(guided(yes, no, scale=2.0, interval=interval), X, steps=10))
    assert len(yes_calls) == 20 and used == sum(interval[0] <= k / 10 < interval[1] for k in range(10))


class Rate:
    """A blockwise network of one number: features are the time, the velocity is rate * state * (1 + features)."""

    borders = (0.0, 0.5, 1.0)

    def __init__(self, rate):
        self.rate = rate

    def at(self, t):
        return t

    def features(self, x, t):
        return t[:, None].expand_as(x).clone()

    def residual(self, x, t):
        return torch.full_like(x, 0.5)  # exact in two even segments

    def velocity(self, x, t, features, segment):
        return self.rate * x * (1 + features)


@pytest.mark.parametrize("mode", ["full", "residual"])
def test_blockwise_guidance_is_guidance(mode):
    parts = GuidedParts(Rate(0.7), Rate(-0.3), 2.0)
    made = integrate_blockwise(parts, X, borders=(0.0, 0.5, 1.0), steps_per_segment=3, mode=mode)
    plain = guided(lambda x, t: 0.7 * x * (1 + t[:, None]), lambda x, t: -0.3 * x * (1 + t[:, None]), scale=2.0)
    torch.testing.assert_close(made, integrate(plain, X, steps=6))


def test_guidance_of_networks_without_a_residual_says_so():
    class Plain:
        """A blockwise network that has no residual network."""

        def __init__(self, rate):
            self.inner, self.borders = Rate(rate), Rate.borders
            self.at, self.features, self.velocity = self.inner.at, self.inner.features, self.inner.velocity

    parts = GuidedParts(Plain(0.7), Rate(-0.3), 2.0)
    with pytest.raises(ValueError, match="no feature residual network"):
        integrate_blockwise(parts, X, borders=(0.0, 0.5, 1.0), steps_per_segment=3, mode="residual")
    integrate_blockwise(parts, X, borders=(0.0, 0.5, 1.0), steps_per_segment=3, mode="full")


def test_a_late_bad_velocity_is_counted_over_the_whole_grid():
    def broken(x, t):
        return torch.where((t > 0.75)[:, None], float("inf"), x)

    with pytest.raises(NonFiniteVelocity, match=r"step 8 of 10, t=0\.8") as error:
        integrate_guided(broken, lambda x, t: -x, X, scale=2.0, interval=(0.2, 0.6), steps=10)
    assert error.value.step == 8


def test_bad_intervals_and_falling_grids_are_refused():
    with pytest.raises(ValueError, match="interval"):
        guided(lambda x, t: x, lambda x, t: x, scale=2.0, interval=(0.5, 0.5))
    for yes, no in ((lambda x, t: x[:, :1], lambda x, t: x), (lambda x, t: x, lambda x, t: x[:, :1])):
        with pytest.raises(ValueError, match=r"one shape, got .*\(4, 1\)"):
            guided(yes, no, scale=2.0)(X, torch.rand(4))
    with pytest.raises(ValueError, match="must rise"):
        integrate_guided(lambda x, t: x, lambda x, t: x, X, scale=2.0, grid=(1.0, 0.0))


def test_reversed_time_samples_the_same_end(mixtures):
    ours = mixtures["ring_wide"]

    def theirs(x, s):  # s=0 data, s=1 noise, target noise - data
        return -ours(x, 1.0 - s)

    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    x = noise  # their sampler: s runs from 1 to 0
    for k in range(10, 0, -1):
        x = x - 0.1 * theirs(x, torch.full((8,), k / 10))
    torch.testing.assert_close(integrate(reverse_time(theirs), noise, steps=10), x, atol=1e-4, rtol=1e-4)
