import pytest
import torch

from headrace.flow.blockwise import equal_steps, feature_residual_loss, integrate_blockwise, split_grid
from headrace.flow.solver import NonFiniteVelocity, integrate

BORDERS = (0.0, 0.3, 1.0)


class Parts:
    """Features are the time itself, so every approximation can be worked out by hand."""

    borders = BORDERS

    def __init__(self):
        self.trunk_calls = 0
        self.seen = []

    def at(self, t):
        return t

    def features(self, x, t):
        self.trunk_calls += 1
        return t[:, None].expand(-1, x.shape[1]).clone()

    def residual(self, x, t):  # the change from start to end of the segment that t lies in
        return torch.where(t < 0.3, 0.3, 0.7)[:, None].expand_as(x)

    def velocity(self, x, t, features, segment):
        self.seen.append((segment, round(t[0].item(), 4), round(features[0, 0].item(), 4)))
        return features * (segment + 1.0)


def test_each_mode_sees_the_features_it_promises():
    x = torch.zeros(2, 3)
    seen = {}
    for mode in ("full", "residual", "hold"):
        parts = Parts()
        integrate_blockwise(parts, x, borders=BORDERS, steps_per_segment=2, mode=mode)
        assert parts.trunk_calls == (4 if mode == "full" else 2)
        seen[mode] = parts.seen
    assert seen["full"] == [(0, 0.0, 0.0), (0, 0.15, 0.15), (1, 0.3, 0.3), (1, 0.65, 0.65)]
    assert seen["residual"] == seen["full"]  # this residual is exact
    assert seen["hold"] == [(0, 0.0, 0.0), (0, 0.15, 0.0), (1, 0.3, 0.3), (1, 0.65, 0.3)]


def test_one_step_a_segment_needs_no_residual_and_equals_euler_on_the_borders():
    parts = Parts()
    x = torch.ones(2, 3)
    ends = [integrate_blockwise(parts, x, borders=BORDERS, steps_per_segment=1, mode=m) for m in ("full", "residual")]
    plain = integrate(lambda s, t: torch.where(t < 0.3, t, 2 * t)[:, None].expand_as(s), x, grid=BORDERS)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], plain)


def test_parts_without_a_residual_network_take_their_features_full_or_hold():
    class Plain:
        borders, at, features, velocity = BORDERS, Parts.at, Parts.features, Parts.velocity

        def __init__(self):
            self.trunk_calls, self.seen = 0, []

    x = torch.ones(2, 3)
    for mode in ("full", "hold"):
        made, wanted = (integrate_blockwise(p, x, borders=BORDERS, steps_per_segment=2, mode=mode)
                        for p in (Plain(), Parts()))  # fmt: skip
        assert torch.equal(made, wanted)
    with pytest.raises(ValueError, match="Plain has no feature residual network; take features full or hold"):
        integrate_blockwise(Plain(), x, borders=BORDERS, steps_per_segment=2, mode="residual")


def test_residual_loss_vanishes_for_the_exact_residual_and_sends_no_gradient_to_the_trunk(draw):
    noise, data = torch.randn(2, 64, 3, generator=draw)
    assert feature_residual_loss(Parts(), noise, data, borders=BORDERS, generator=draw).item() < 1e-10
    parts, weight = Parts(), torch.nn.Parameter(torch.ones(1))
    parts.features = lambda x, t: x * weight
    parts.residual = lambda x, t: x * 0
    assert not feature_residual_loss(parts, noise, data, borders=BORDERS, generator=draw).requires_grad


def test_bad_input_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="full, residual, hold"):
        integrate_blockwise(Parts(), x, borders=BORDERS, steps_per_segment=1, mode="guess")
    with pytest.raises(ValueError, match="at least 1"):
        integrate_blockwise(Parts(), x, borders=BORDERS, steps_per_segment=0)
    with pytest.raises(ValueError, match="rise"):
        integrate_blockwise(Parts(), x, borders=(1.0, 0.0), steps_per_segment=1)
    for borders in ((0.0, 0.5, 1.0), (0.0, 1.0), (0.0, 0.3, 0.6, 1.0)):
        with pytest.raises(ValueError, match=r"borders \[0.0, 0.3, 1.0\], got"):
            integrate_blockwise(Parts(), x, borders=borders, steps_per_segment=1)
        with pytest.raises(ValueError, match=r"borders \[0.0, 0.3, 1.0\], got"):
            feature_residual_loss(Parts(), x, x, borders=borders)
    parts = Parts()
    parts.velocity = lambda x, t, features, segment: x / 0 * 0
    with pytest.raises(NonFiniteVelocity, match="step 0"):
        integrate_blockwise(parts, x, borders=BORDERS, steps_per_segment=2)


def test_any_grid_is_followed_and_a_step_belongs_to_the_segment_of_its_start():
    parts, x = Parts(), torch.zeros(2, 3)
    integrate_blockwise(parts, x, borders=BORDERS, grid=(0.0, 0.2, 0.5, 1.0), mode="hold")
    assert parts.seen == [(0, 0.0, 0.0), (0, 0.2, 0.0), (1, 0.5, 0.5)] and parts.trunk_calls == 2
    ends = [
        integrate_blockwise(Parts(), x, borders=BORDERS, grid=equal_steps(BORDERS, 3)),
        integrate_blockwise(Parts(), x, borders=BORDERS, steps_per_segment=3),
    ]
    assert torch.equal(*ends)


def test_grids_that_leave_out_a_segment_are_refused():
    assert split_grid((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)) == [(0.0, 0.25, 0.5), (0.5, 0.75, 1.0)]
    rounded = [1.0 - (6 - k) / 6 for k in range(7)]  # one of them lies a rounding below its border
    assert [len(run) for run in split_grid(rounded, [k / 6 for k in range(7)])] == [2] * 6
    with pytest.raises(ValueError, match="1 steps leave out some of 2 time segments; take at least 2"):
        split_grid((0.0, 1.0), BORDERS)
    with pytest.raises(ValueError, match=r"no step of the grid starts in the time segment from 0.3 to 1"):
        split_grid((0.0, 0.1, 0.2, 1.0), BORDERS)
    with pytest.raises(ValueError, match=r"segments span 0 to 1, the grid 0 to 0.5"):
        split_grid((0.0, 0.4, 0.5), BORDERS)
    with pytest.raises(ValueError, match="either"):
        integrate_blockwise(Parts(), torch.zeros(2, 3), borders=BORDERS)
    with pytest.raises(ValueError, match=r"segment's start 0.3, which the grid misses"):
        integrate_blockwise(Parts(), torch.zeros(2, 3), borders=BORDERS, grid=(0.0, 0.5, 1.0), mode="residual")


@pytest.mark.parametrize("mode", ["full", "residual", "hold"])
def test_a_late_bad_velocity_is_counted_over_all_segments(mode):
    parts = Parts()
    parts.velocity = lambda x, t, features, segment: torch.where((t > 0.6)[:, None], float("nan"), x)
    with pytest.raises(NonFiniteVelocity, match=r"step 3 of 4, t=0\.65") as error:
        integrate_blockwise(parts, torch.zeros(2, 3), borders=BORDERS, steps_per_segment=2, mode=mode)
    assert error.value.step == 3 and error.value.time == pytest.approx(0.65)
