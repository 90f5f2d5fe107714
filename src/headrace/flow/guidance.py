"""Classifier-free guidance, over all times or an interval of them.

Source: Ho and Salimans 2022, arXiv 2207.12598; interval: Kynkaanniemi et al. 2024, arXiv 2404.07724.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.flow.blockwise import ResidualParts
from headrace.flow.path import expand_time
from headrace.flow.solver import Method, Velocity, integrate_each, resolve_grid


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval, if it rises within [0, 1].

    Raises:
        ValueError: It does not.
    """
    if not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise ValueError(f"a guidance interval must rise within [0, 1], got {interval}")
    return interval


def guided(
    conditional: Velocity, unconditional: Velocity, *, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """`unconditional + scale * (conditional - unconditional)` inside the interval, `conditional` outside it.

    Both velocities are called at every time (no synchronisation with a device is needed to choose); `integrate_guided`
    saves the second call where it is not used.

    Args:
        conditional: Velocity with the condition.
        unconditional: Velocity without it, or with a condition to stay away from.
        scale: 1 is no guidance, above 1 strengthens the condition, 0 ignores it.
        interval: Times t with `low <= t < high` that are guided; a high of 1 includes 1.

    Raises:
        ValueError: A bad interval; when called, velocities of different shapes.
    """
    low, high = check_interval(interval)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= low) & ((t < high) | (t >= 1.0) & (high == 1.0))
        factor = torch.where(inside, scale, 1.0).to(x.dtype)
        return _pushed(conditional(x, t), unconditional(x, t), expand_time(factor, x))

    return velocity


def _pushed(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    if conditional.shape != unconditional.shape:  # which could broadcast
        raise ValueError(
            f"both velocities must have one shape, got {tuple(conditional.shape)} with the condition and "
            f"{tuple(unconditional.shape)} without"
        )
    return unconditional + scale * (conditional - unconditional)


class GuidedParts(NamedTuple):
    """Guidance at all times for `integrate_blockwise`: both networks' features side by side, shape (B, 2, ...).

    Attributes:
        conditional: Blockwise network with the condition filled in.
        unconditional: The same without it, or with a condition to stay away from.
        scale: As for `guided`.
    """

    conditional: ResidualParts
    unconditional: ResidualParts
    scale: float

    @property
    def borders(self) -> tuple[float, ...]:
        """Segment borders of the conditional network."""
        return self.conditional.borders

    def at(self, t: Tensor) -> tuple[Any, Any]:
        """Both moments of times (B,)."""
        return self.conditional.at(t), self.unconditional.at(t)

    def features(self, x: Tensor, moment: tuple[Any, Any]) -> Tensor:
        """Both features, stacked at dimension 1."""
        return torch.stack([self.conditional.features(x, moment[0]), self.unconditional.features(x, moment[1])], 1)

    @property
    def residual(self) -> Callable[[Tensor, tuple[Any, Any]], Tensor]:
        """Both residuals, stacked at dimension 1; there is no such attribute where a network has none."""
        first, second = self.conditional.residual, self.unconditional.residual
        return lambda x, moment: torch.stack([first(x, moment[0]), second(x, moment[1])], 1)

    def velocity(self, x: Tensor, moment: tuple[Any, Any], features: Tensor, segment: int) -> Tensor:
        """The guided velocity by one segment's stacks, shape of `x`."""
        made = self.conditional.velocity(x, moment[0], features[:, 0], segment)
        return _pushed(made, self.unconditional.velocity(x, moment[1], features[:, 1], segment), self.scale)


def integrate_guided(
    conditional: Velocity,
    unconditional: Velocity,
    x: Tensor,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    steps: int | None = None,
    grid: Sequence[float] | None = None,
    method: Method = "euler",
) -> Tensor:
    """`integrate` with guidance for the steps that start inside the interval; the other steps call one network only.

    Args:
        conditional, unconditional, scale, interval: As for `guided`; a step belongs to the interval by its start time.
        x, steps, grid, method: As for `integrate`; the grid must rise.

    Raises:
        ValueError: As `integrate` and `guided`, or a falling grid.
        NonFiniteVelocity: As `integrate`, the step counted over the whole grid.
    """
    low, high = check_interval(interval)
    times = resolve_grid(steps, grid, method)
    if times[0] > times[-1]:
        raise ValueError("guidance intervals are for sampling: the grid must rise")
    both = guided(conditional, unconditional, scale=scale)
    velocities = [both if low <= start < high else conditional for start in times[:-1]]
    return integrate_each(velocities, x, grid=times, method=method)
