import pytest
import torch

from headrace.flow.path import (
    bridge_path,
    cosine_schedule,
    data_from_velocity,
    diffusion_schedule,
    gaussian_path,
    noise_from_velocity,
    straight_path,
    straight_schedule,
)

SCHEDULES = [straight_schedule, cosine_schedule, diffusion_schedule]
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture
def ends(draw):
    return [torch.randn(7, 3, 2, generator=draw, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_target_is_the_derivative_of_the_path(schedule, ends):
    h = 1e-6
    ahead, behind = (gaussian_path(*ends, TIMES + shift, schedule).x_t for shift in (h, -h))
    torch.testing.assert_close(gaussian_path(*ends, TIMES, schedule).target, (ahead - behind) / (2 * h))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_ends_come_back_from_state_and_velocity(schedule, ends):
    sample = gaussian_path(*ends, TIMES, schedule)
    torch.testing.assert_close(noise_from_velocity(*sample, schedule), ends[0])
    torch.testing.assert_close(data_from_velocity(*sample, schedule), ends[1])


def test_straight_schedule_is_the_straight_path(ends):
    for mine, other in zip(gaussian_path(*ends, TIMES, straight_schedule), straight_path(*ends, TIMES), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("schedule", [cosine_schedule, diffusion_schedule])
def test_these_schedules_preserve_variance(schedule):
    c = schedule(TIMES)
    torch.testing.assert_close(c.alpha.square() + c.sigma.square(), torch.ones_like(TIMES))


def test_bridge_has_its_width_and_is_straight_at_zero(ends, draw):
    assert torch.equal(bridge_path(*ends, TIMES, sigma=0.0).x_t, straight_path(*ends, TIMES).x_t)
    zero = torch.zeros(40_000, 1)
    wide = bridge_path(zero, zero, torch.full((40_000,), 0.2), sigma=0.5, generator=draw)
    assert abs(wide.x_t.std().item() - 0.5 * 0.4) < 0.005
    torch.testing.assert_close(wide.target, (1 - 0.4) / (2 * 0.16) * wide.x_t)


def test_wrong_shapes_are_named(ends):
    with pytest.raises(ValueError, match=r"\(7, 3, 2\) and \(7, 3\)"):
        straight_path(ends[0], ends[1][..., 0], TIMES)
    with pytest.raises(ValueError, match=r"t must have shape \(7,\)"):
        gaussian_path(*ends, TIMES[:3], cosine_schedule)
    with pytest.raises(ValueError, match="one device"):
        straight_path(ends[0].to("meta"), ends[1], TIMES)
    for bad, message in ((TIMES[:, None], r"t must have shape \(7,\)"), (TIMES.to("meta"), "device cpu, got meta")):
        with pytest.raises(ValueError, match=message):
            straight_path(*ends, bad)
