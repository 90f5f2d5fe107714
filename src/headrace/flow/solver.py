"""Following a velocity field over a step grid, from noise (t=0) to data (t=1) or back."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Method = Literal["euler", "midpoint", "heun"]
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2}


class NonFiniteVelocity(ValueError):
    """The velocity became NaN or infinite while a sampler ran.

    Attributes:
        step: Step of the grid at which it happened, counted from 0; None when a second run did not show it again.
        time: Time of that step's start.
    """

    def __init__(self, step: int | None, time: float | None, steps: int) -> None:
        self.step, self.time = step, time
        if step is None:
            text = "the sampler ended in NaN or infinity, but a second run did not: the velocity is not deterministic"
        else:
            text = (
                f"the velocity is NaN or infinite at step {step} of {steps}, t={time:.6g}; "
                "check the network's weights and inputs at this time (half precision overflows first)"
            )
        super().__init__(text)


def uniform_grid(steps: int, *, t0: float = 0.0, t1: float = 1.0) -> tuple[float, ...]:
    """`steps + 1` equally spaced times from `t0` to `t1`.

    Raises:
        ValueError: `steps` is below 1 or no whole number.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps must be a whole number and at least 1, got {steps}")
    steps = int(steps)
    return tuple(t0 + (t1 - t0) * k / steps for k in range(steps + 1))


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Times as floats, if they rise strictly within [0, 1] (or fall strictly, for going back to noise).

    Raises:
        ValueError: Fewer than two times, a time outside [0, 1], or not strictly monotone.
    """
    times = tuple(float(t) for t in grid)
    if len(times) < 2:
        raise ValueError(f"a grid needs at least 2 times, got {len(times)}")
    rising = all(a < b for a, b in pairwise(times))
    falling = all(a > b for a, b in pairwise(times))
    if not (rising or falling) or min(times) < 0.0 or max(times) > 1.0:
        raise ValueError(f"a grid must rise (or fall) strictly within [0, 1], got {list(times)}")
    return times


def time_tensor(state: Tensor, time: float) -> Tensor:
    """`time` for each row of `state`: shape (B,), float32 (float64 beside a float64 state), on its device."""
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    return torch.full(state.shape[:1], time, dtype=dtype, device=state.device)


def velocity_at(velocity: Velocity, state: Tensor, time: float) -> Tensor:
    """One call of the velocity, checked to have the state's shape and device.

    Raises:
        ValueError: It has another shape (which would broadcast silently) or lies on another device.
    """
    slope = velocity(state, time_tensor(state, time))
    if slope.shape != state.shape:
        raise ValueError(f"the velocity must have the state's shape {tuple(state.shape)}, got {tuple(slope.shape)}")
    if slope.device != state.device:
        raise ValueError(f"the velocity must lie on the state's device {state.device}, got {slope.device}")
    return slope


def step_slope(velocity: Velocity, x: Tensor, now: float, then: float, method: Method) -> Tensor:
    """The slope that one step from `now` to `then` follows; see `integrate` for the methods."""
    slope = velocity_at(velocity, x, now)
    if method == "midpoint":
        return velocity_at(velocity, x + 0.5 * (then - now) * slope, 0.5 * (now + then))
    if method == "heun":
        return 0.5 * (slope + velocity_at(velocity, x + (then - now) * slope, then))
    return slope


def resolve_grid(steps: int | None, grid: Sequence[float] | None, method: str) -> tuple[float, ...]:
    """The times to visit, from exactly one of a step count and a grid.

    Raises:
        ValueError: Both or neither given, a bad grid, a step count below 1, or an unknown method.
    """
    if (steps is None) == (grid is None):
        raise ValueError("give either steps or grid")
    if method not in EVALUATIONS_PER_STEP:
        raise ValueError(f"unknown method {method!r} (known: {', '.join(EVALUATIONS_PER_STEP)})")
    return check_grid(grid) if grid is not None else uniform_grid(steps if steps is not None else 1)


def integrate(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int | None = None,
    grid: Sequence[float] | None = None,
    method: Method = "euler",
    check_finite: bool = True,
) -> Tensor:
    r"""Follow a velocity field over a grid of times.

    Euler is :math:`x_{k+1} = x_k + (t_{k+1}-t_k)\,v(x_k, t_k)`, exact where the velocity is constant along the path.

    Args:
        velocity: Called as `velocity(x, t)` with `t` of shape (B,), returns the shape of `x`.
        x: State at the first time of the grid, shape (B, ...). Not modified. A half-precision state is kept in
            float32 between the steps; the velocity still sees `x`'s own dtype.
        steps: Number of equal steps from 0 to 1; give this or `grid`.
        grid: Times to visit, strictly monotone within [0, 1]; falling grids go from data to noise.
        method: `euler` (one call a step), `midpoint` or `heun` (two).
        check_finite: Look once at the end state (one device synchronisation, none inside the loop); only if it is
            not finite run again step by step to name the first bad one. Skipped inside `torch.compile`.

    Returns:
        State at the last time, same shape and dtype as `x`.

    Raises:
        ValueError: Both or neither of `steps` and `grid`, a bad grid, an unknown method, or a velocity of another
            shape or device.
        NonFiniteVelocity: The velocity was NaN or infinite; names the step and the time.
    """
    times = resolve_grid(steps, grid, method)
    return integrate_each([velocity] * (len(times) - 1), x, grid=times, method=method, check_finite=check_finite)


def integrate_each(
    velocities: Sequence[Velocity],
    x: Tensor,
    *,
    grid: Sequence[float],
    method: Method = "euler",
    check_finite: bool = True,
) -> Tensor:
    """As `integrate`, with a velocity of its own for each step, such as those of guided and blockwise samplers.

    The velocities are called in the order of the steps; a bad run is repeated from the first on, to name its step
    among all of them.

    Args:
        velocities: One per step, K of them.
        x, method, check_finite: As for `integrate`.
        grid: K + 1 times.

    Raises:
        ValueError: Another number of velocities than steps, else as `integrate`.
        NonFiniteVelocity: As `integrate`.
    """
    times = resolve_grid(None, grid, method)
    if len(velocities) != len(times) - 1:
        raise ValueError(f"{len(times) - 1} steps need as many velocities, got {len(velocities)}")
    state = in_full_precision(x)
    for velocity, now, then in zip(velocities, times[:-1], times[1:], strict=True):
        state = state + (then - now) * step_slope(seeing(x.dtype, velocity), state, now, then, method)
    if check_finite and not torch.compiler.is_compiling() and not bool(torch.isfinite(state).all()):
        _raise_first_bad_step([seeing(x.dtype, velocity) for velocity in velocities], x, times, method)
    return state.to(x.dtype)


def in_full_precision(x: Tensor) -> Tensor:
    """A half-precision state as float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def seeing(dtype: torch.dtype, velocity: Velocity) -> Velocity:
    """The velocity of a state that `in_full_precision` made: it sees `dtype` and answers in float32."""
    if dtype not in (torch.float16, torch.bfloat16):
        return velocity
    return lambda state, t: velocity(state.to(dtype), t).float()


def _raise_first_bad_step(velocities: Sequence[Velocity], x: Tensor, times: tuple[float, ...], method: Method) -> None:
    x = in_full_precision(x)
    for step, (velocity, (now, then)) in enumerate(zip(velocities, pairwise(times), strict=True)):
        x = x + (then - now) * step_slope(velocity, x, now, then, method)
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteVelocity(step, now, len(times) - 1)
    raise NonFiniteVelocity(None, None, len(times) - 1)


class Trajectory(NamedTuple):
    """Every state that a sampler visited.

    Attributes:
        times: Times of the states, shape (K+1,), float64.
        states: Shape (K+1, B, ...).
        slopes: What each step followed, shape (K, B, ...); for Euler the velocity at the step's start.
    """

    times: Tensor
    states: Tensor
    slopes: Tensor


def trajectory(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int | None = None,
    grid: Sequence[float] | None = None,
    method: Method = "euler",
) -> Trajectory:
    """Like `integrate`, keeping every state and slope; the memory grows with the number of steps.

    States and slopes of a half-precision `x` are float32; the velocity still sees `x`'s own dtype.

    Raises:
        ValueError: As `integrate`.
    """
    times = resolve_grid(steps, grid, method)
    field, states, slopes = seeing(x.dtype, velocity), [in_full_precision(x)], []
    for now, then in pairwise(times):
        slopes.append(step_slope(field, states[-1], now, then, method))
        states.append(states[-1] + (then - now) * slopes[-1])
    return Trajectory(torch.tensor(times, dtype=torch.float64), torch.stack(states), torch.stack(slopes))


class AdaptiveResult(NamedTuple):
    """End of an adaptive run.

    Attributes:
        x: State at the last time.
        evaluations: Calls of the velocity that it took.
    """

    x: Tensor
    evaluations: int


def integrate_adaptive(
    velocity: Velocity, x: Tensor, *, tolerance: float = 1e-5, t0: float = 0.0, t1: float = 1.0
) -> AdaptiveResult:
    """Dormand-Prince 5(4) with error control by torchdiffeq: the reference that fixed grids are measured against.

    Args:
        velocity: As for `integrate`.
        x: State at `t0`, shape (B, ...), float32 or float64.
        tolerance: Relative and absolute error allowed per step, over the whole batch.
        t0, t1: First and last time, in [0, 1], either order.

    Raises:
        ImportError: torchdiffeq is missing; names the extra.
        ValueError: The tolerance is not above 0, or the times are not two different times in [0, 1].
        NonFiniteVelocity: The velocity was NaN or infinite.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    check_grid((t0, t1))
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("the adaptive solver needs torchdiffeq: pip install 'headrace[ode]'") from error
    calls = 0

    def field(t: Tensor, state: Tensor) -> Tensor:
        nonlocal calls
        slope = velocity_at(velocity, state, float(t))
        if not bool(torch.isfinite(slope).all()):
            raise NonFiniteVelocity(calls, float(t), calls + 1)
        calls += 1
        return slope

    ends = torch.tensor([t0, t1], dtype=torch.float64, device=x.device)
    return AdaptiveResult(odeint(field, x, ends, rtol=tolerance, atol=tolerance, method="dopri5")[-1], calls)


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How a model is to be sampled, as it stands in a config, a JSON file or on a command line.

    Attributes:
        method: A fixed-step method of `integrate`, or `dopri5` for `integrate_adaptive`.
        steps: Number of equal steps; give this or `grid` (neither for `dopri5`).
        grid: Times to visit, rising strictly from 0 to 1, such as a Bellman grid.
        tolerance: Error per step of `dopri5`, only for it.
    """

    method: Literal["euler", "midpoint", "heun", "dopri5"] = "euler"
    steps: int | None = None
    grid: tuple[float, ...] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.method == "dopri5":
            if self.steps is not None or self.grid is not None:
                raise ValueError("dopri5 chooses its own steps: leave out steps and grid, give tolerance")
            if self.tolerance is None or not self.tolerance > 0:
                raise ValueError(f"dopri5 needs a tolerance above 0, got {self.tolerance}")
            return
        if self.tolerance is not None:
            raise ValueError(f"tolerance is only for dopri5, not for {self.method!r}")
        times = resolve_grid(self.steps, self.grid, self.method)
        if times[0] != 0.0 or times[-1] != 1.0:
            raise ValueError(f"a sampling grid must run from 0 (noise) to 1 (data), got {times[0]} to {times[-1]}")
        if self.grid is not None:
            object.__setattr__(self, "grid", times)

    @property
    def times(self) -> tuple[float, ...]:
        """The times to visit; empty for `dopri5`, which chooses them."""
        return () if self.method == "dopri5" else resolve_grid(self.steps, self.grid, self.method)

    @property
    def evaluations(self) -> int | None:
        """Calls of the velocity for one sample; None for `dopri5`, where it depends on the sample."""
        return (len(self.times) - 1) * EVALUATIONS_PER_STEP[self.method] if self.times else None

    def sample(self, velocity: Velocity, noise: Tensor) -> Tensor:
        """Follow `velocity` from `noise` at t=0 to data at t=1; see `integrate`."""
        if self.method == "dopri5":
            return integrate_adaptive(velocity, noise, tolerance=self.tolerance or math.nan).x
        return integrate(velocity, noise, grid=self.times, method=self.method)

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SolverSettings":
        """Rebuild from `to_json`.

        Raises:
            ValueError: Not JSON, not an object, unknown keys (named), or settings that do not fit together.
        """
        data: Any = json.loads(text)
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) - known:
            raise ValueError(f"solver settings are a JSON object with the keys {', '.join(sorted(known))}, got {text}")
        if data.get("grid") is not None:
            data["grid"] = tuple(data["grid"])
        return cls(**data)
