import pytest
import torch

from headrace.flow.blockwise import integrate_blockwise
from headrace.flow.flowopt import uni_inversion
from headrace.flow.guidance import guided, integrate_guided
from headrace.flow.solver import (
    NonFiniteVelocity,
    SolverSettings,
    check_grid,
    integrate,
    integrate_adaptive,
    integrate_each,
    trajectory,
    uniform_grid,
)
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity


def decay(x, t):
    return -2.0 * x


def swing(x, t):
    """dx/dt = x (1 - 2t^2): solved by x0 exp(t - 2t^3/3)."""
    return x * (1.0 - 2.0 * t.square())[:, None]


NOISE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SWUNG = NOISE * torch.exp(torch.tensor(1.0 / 3.0, dtype=torch.float64))


def test_straight_field_is_exact_in_one_step():
    data = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(integrate(lambda x, t: data - NOISE, NOISE, steps=1), data)
    flow = integrate(lambda x, t: (data - x) / (1.0 - t)[:, None], NOISE, grid=(0.0, 0.3, 0.9, 1.0))
    torch.testing.assert_close(flow, data)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_error_falls_with_the_methods_order(method, order):
    errors = [(integrate(swing, NOISE, steps=k, method=method) - SWUNG).abs().max() for k in (40, 80)]
    assert 2**order * 0.85 < errors[0] / errors[1] < 2**order * 1.15


def test_adaptive_agrees_with_the_closed_form_and_counts_calls():
    result = integrate_adaptive(swing, NOISE, tolerance=1e-9)
    torch.testing.assert_close(result.x, SWUNG, atol=1e-7, rtol=0)
    assert result.evaluations > 6


def test_going_back_undoes_going_forth():
    forth = integrate(decay, NOISE, steps=400, method="heun")
    back = integrate(decay, forth, grid=uniform_grid(400, t0=1.0, t1=0.0), method="heun")
    torch.testing.assert_close(back, NOISE, atol=1e-4, rtol=0)


def test_trajectory_ends_where_integrate_does():
    grid = (0.0, 0.2, 0.7, 1.0)
    path = trajectory(swing, NOISE, grid=grid, method="midpoint")
    assert torch.equal(path.states[-1], integrate(swing, NOISE, grid=grid, method="midpoint"))
    steps = path.times.diff()[:, None, None] * path.slopes
    torch.testing.assert_close(path.states.diff(dim=0), steps)


def test_half_precision_state_is_accumulated_in_float32():
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    seen = []
    end = integrate(lambda x, t: seen.append(x.dtype) or torch.ones_like(x), ones, steps=1000)
    assert set(seen) == {torch.bfloat16} and end.dtype == torch.bfloat16
    assert abs(end.item() - 2.0) < 0.01  # a bfloat16 sum of 1000 x 0.001 would stay at 1
    path = trajectory(lambda x, t: seen.append(x.dtype) or torch.ones_like(x), ones, steps=1000)
    assert path.states.dtype == path.slopes.dtype == torch.float32 and abs(path.states[-1].item() - 2.0) < 0.01
    back = uni_inversion(lambda x, t: seen.append(x.dtype) or torch.ones_like(x), ones, grid=uniform_grid(1000))
    assert set(seen) == {torch.bfloat16} and back.dtype == torch.float32 and abs(back.item()) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_velocity_is_named_by_step_and_time(bad):
    def broken(x, t):
        return torch.where((t > 0.55)[:, None], bad, -x)

    with pytest.raises(NonFiniteVelocity, match=r"step 6 of 10, t=0\.6") as error:
        integrate(broken, NOISE, steps=10)
    assert error.value.step == 6
    assert not torch.isfinite(integrate(broken, NOISE, steps=10, check_finite=False)).all()
    with pytest.raises(NonFiniteVelocity):
        integrate_adaptive(broken, NOISE)


def test_the_check_costs_no_call():
    calls = []
    integrate(lambda x, t: calls.append(1) or decay(x, t), NOISE, steps=7)
    assert len(calls) == 7


@pytest.mark.parametrize(
    "grid", [(0.0,), (0.0, 0.5, 0.5, 1.0), (0.0, 0.6, 0.4, 1.0), (0.0, 1.1), (-0.1, 1.0), (0.0, float("nan"), 1.0)]
)
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        check_grid(grid)


def test_bad_calls_are_refused():
    for steps in (0, -3, 2.5):
        with pytest.raises(ValueError, match="whole number and at least 1"):
            integrate(decay, NOISE, steps=steps)
    with pytest.raises(ValueError, match="either steps or grid"):
        integrate(decay, NOISE)
    with pytest.raises(ValueError, match="euler, midpoint, heun"):
        integrate(decay, NOISE, steps=2, method="rk9")
    with pytest.raises(ValueError, match=r"\(6, 4\), got \(6, 1\)"):
        integrate(lambda x, t: x[:, :1], NOISE, steps=2)
    with pytest.raises(ValueError, match="device cpu, got meta"):
        integrate(lambda x, t: x.to("meta"), NOISE, steps=2)


def test_every_step_may_have_its_own_velocity():
    ends = [integrate_each([decay, swing], NOISE, grid=(0.0, 0.3, 1.0), method="heun")]
    ends.append(
        integrate(swing, integrate(decay, NOISE, grid=(0.0, 0.3), method="heun"), grid=(0.3, 1.0), method="heun")
    )
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="2 steps need as many velocities, got 1"):
        integrate_each([decay], NOISE, grid=(0.0, 0.3, 1.0))


def test_settings_round_trip_and_sample():
    for settings in (
        SolverSettings(steps=10),
        SolverSettings(method="heun", grid=(0.0, 0.25, 1.0)),
        SolverSettings(method="dopri5", tolerance=1e-6),
    ):
        assert SolverSettings.from_json(settings.to_json()) == settings
    assert SolverSettings(method="heun", grid=(0, 0.25, 1)).evaluations == 4
    x = SolverSettings(steps=4, method="midpoint").sample(swing, NOISE)
    assert torch.equal(x, integrate(swing, NOISE, steps=4, method="midpoint"))
    torch.testing.assert_close(SolverSettings(method="dopri5", tolerance=1e-8).sample(swing, NOISE), SWUNG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either steps or grid"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 3, "grid": (0.0, 1.0)}, "either"),
        ({"grid": (0.0, 0.5)}, "from 0"),
        ({"grid": (1.0, 0.0)}, "from 0"),
        ({"steps": 3, "tolerance": 0.1}, "only for dopri5"),
        ({"method": "dopri5"}, "tolerance"),
        ({"method": "dopri5", "steps": 4, "tolerance": 0.1}, "own steps"),
    ],
)
def test_settings_that_do_not_fit_cannot_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        SolverSettings(**fields)


def test_settings_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="keys"):
        SolverSettings.from_json('{"step": 3}')


def compiled(sample):
    """The sampler as one graph: a break is an error."""
    return torch.compile(sample, fullgraph=True, backend="eager")


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)).double()
    return lambda x, t: layers(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_a_whole_sampler_compiles_into_one_graph(method, network):
    def sample(x):
        return integrate(network, x, steps=4, method=method)

    torch.testing.assert_close(compiled(sample)(NOISE), sample(NOISE))


def test_guided_samplers_compile_into_one_graph(network):
    def per_row(x):
        return integrate(guided(network, decay, scale=2.0, interval=(0.2, 0.6)), x, steps=4)

    def per_step(x):
        return integrate_guided(network, decay, x, scale=2.0, interval=(0.2, 0.6), steps=4)

    made = [compiled(sample)(NOISE) for sample in (per_row, per_step)]
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[0], per_row(NOISE))


@pytest.mark.parametrize("mode", ["full", "residual", "hold"])
def test_a_blockwise_sampler_compiles_into_one_graph(mode):
    torch.manual_seed(0)
    config = BlockwiseConfig.tiny()
    network = BlockwiseVelocity(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # a fresh one has velocity zero
    bound = network.bind(torch.randn(2, config.condition_dim))
    noise = torch.randn(2, config.tokens, config.channels)

    def sample(x):
        return integrate_blockwise(bound, x, borders=config.borders, steps_per_segment=2, mode=mode)

    with torch.no_grad():
        made = sample(noise)
        assert (made - noise).abs().mean() > 0.01
        torch.testing.assert_close(compiled(sample)(noise), made)
