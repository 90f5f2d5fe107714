"""Following a velocity field over a step grid, from noise (t=0) to data (t=1) or back."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Method = Literal["euler", "midpoint", "heun"]
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2}


def uniform_grid(steps: int, *, t0: float = 0.0, t1: float = 1.0) -> tuple[float, ...]:
    """`steps + 1` equally spaced times from `t0` to `t1`.

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
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


def integrate(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int | None = None,
    grid: Sequence[float] | None = None,
    method: Method = "euler",
) -> Tensor:
    r"""Follow a velocity field over a grid of times.

    Euler is :math:`x_{k+1} = x_k + (t_{k+1}-t_k)\,v(x_k, t_k)`, exact where the velocity is constant along the path.

    Args:
        velocity: Called as `velocity(x, t)` with `t` of shape (B,), returns the shape of `x`.
        x: State at the first time of the grid, shape (B, ...). Not modified.
        steps: Number of equal steps from 0 to 1; give this or `grid`.
        grid: Times to visit, strictly monotone within [0, 1]; falling grids go from data to noise.
        method: `euler` (one call a step), `midpoint` or `heun` (two).

    Returns:
        State at the last time, same shape and dtype as `x`.

    Raises:
        ValueError: Both or neither of `steps` and `grid`, a bad grid, or an unknown method.
    """
    if (steps is None) == (grid is None):
        raise ValueError("give either steps or grid")
    if method not in EVALUATIONS_PER_STEP:
        raise ValueError(f"unknown method {method!r} (known: {', '.join(EVALUATIONS_PER_STEP)})")
    times = check_grid(grid) if grid is not None else uniform_grid(steps if steps is not None else 1)

    def at(state: Tensor, time: float) -> Tensor:
        return velocity(state, torch.full(state.shape[:1], time, dtype=torch.float32, device=state.device))

    for now, then in pairwise(times):
        dt = then - now
        slope = at(x, now)
        if method == "midpoint":
            slope = at(x + 0.5 * dt * slope, now + 0.5 * dt)
        elif method == "heun":
            slope = 0.5 * (slope + at(x + dt * slope, then))
        x = x + dt * slope
    return x
