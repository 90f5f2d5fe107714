"""Sampling and training of velocities that are split over time segments and share slowly changing features.

Source: Blockwise Flow Matching, arXiv 2510.21167; mlvlab/Blockwise-Flow-Matching@5e7ae87 (facts only).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from headrace.flow.path import expand_time, straight_path
from headrace.flow.solver import SolverSettings, Velocity, check_grid, integrate_each

SAME_TIME = 1e-6  # times that differ by less count as one, so that rounding moves no step into another segment
FeatureMode = Literal["full", "residual", "hold"]


class BlockwiseParts(Protocol):
    """A blockwise network with its condition filled in, such as `headrace.nn.blockwise.BoundBlockwise`."""

    @property
    def borders(self) -> tuple[float, ...]:
        """Segment borders that the stacks were made for."""

    def at(self, t: Tensor) -> Any:
        """What the other methods need to know of times (B,); made once a step, whichever of them are called."""

    def features(self, x: Tensor, moment: Any) -> Tensor:
        """The expensive part: features at a state, any shape with leading B."""

    def velocity(self, x: Tensor, moment: Any, features: Tensor, segment: int) -> Tensor:
        """Velocity by the stack of one segment, shape of `x`."""


class ResidualParts(BlockwiseParts, Protocol):
    """Parts that have the second stage's network too, which the mode `residual` needs."""

    def residual(self, x: Tensor, moment: Any) -> Tensor:
        """The cheap part: approximate change of the features since the segment's start, at the segment's end."""


def split_grid(grid: Sequence[float], borders: Sequence[float]) -> list[tuple[float, ...]]:
    """The times of each segment's steps, with the end of the last one; a step belongs to the segment of its start.

    Args:
        grid: Times to visit, rising, from the first border to the last.
        borders: Segment borders, rising.

    Returns:
        One rising tuple of at least two times per segment.

    Raises:
        ValueError: No rise, other ends than the borders', or a segment in which no step starts; says how many steps
            are needed at least.
    """
    times, edges = check_grid(grid), check_grid(borders)
    if times[0] > times[-1] or edges[0] > edges[-1]:
        raise ValueError("segment borders and the grid over them must rise")
    if (times[0], times[-1]) != (edges[0], edges[-1]):
        raise ValueError(f"the segments span {edges[0]:g} to {edges[-1]:g}, the grid {times[0]:g} to {times[-1]:g}")
    segments, steps = len(edges) - 1, len(times) - 1
    if steps < segments:
        raise ValueError(f"{steps} steps leave out some of {segments} time segments; take at least {segments} steps")
    runs: list[list[float]] = [[] for _ in range(segments)]
    for now in times[:-1]:
        runs[min(sum(edge <= now + SAME_TIME for edge in edges), segments) - 1].append(now)
    for run, (start, end) in zip(runs, pairwise(edges), strict=True):
        if not run:
            raise ValueError(f"no step of the grid starts in the time segment from {start:g} to {end:g}; add one there")
    ends = [*(run[0] for run in runs[1:]), times[-1]]
    return [(*run, end) for run, end in zip(runs, ends, strict=True)]


def equal_steps(borders: Sequence[float], steps_per_segment: int) -> tuple[float, ...]:
    """The grid of equally many equal steps in each segment; raises ValueError for a count below 1."""
    if steps_per_segment < 1:
        raise ValueError(f"steps_per_segment must be at least 1, got {steps_per_segment}")
    edges = check_grid(borders)
    inner = [
        start + (end - start) * k / steps_per_segment
        for start, end in pairwise(edges)
        for k in range(steps_per_segment)
    ]
    return (*inner, edges[-1])


def integrate_blockwise(
    parts: BlockwiseParts,
    x: Tensor,
    *,
    borders: Sequence[float],
    steps_per_segment: int | None = None,
    grid: Sequence[float] | None = None,
    mode: FeatureMode = "full",
) -> Tensor:
    r"""Euler steps through the segments, with the features made anew or approximated inside each.

    At :math:`a=(t-t_s)/(t_e-t_s)` in a segment, `residual` uses :math:`F(x_{t_s})+a\,R(x_t,t)` and `hold` uses
    :math:`F(x_{t_s})`; both call the trunk once a segment. The first step of a segment is the same in all modes.

    Args:
        parts: The network.
        x: Noise, shape (B, ...).
        borders: The network's segment borders, rising.
        steps_per_segment: Equal steps in each segment; give this or `grid`.
        grid: Times to visit, from the first border to the last; a step belongs to the segment of its start.
        mode: `full` calls the trunk at every step.

    Raises:
        ValueError: An unknown mode, both or neither of step count and grid, a step count below 1, borders or a grid
            that do not rise, borders that are not the network's, a segment without a step, or mode `residual` on a
            grid that misses a border or with parts that have no residual network.
        NonFiniteVelocity: The velocity was NaN or infinite; the step counts over all segments.
    """
    if mode not in ("full", "residual", "hold"):
        raise ValueError(f"unknown mode {mode!r} (known: full, residual, hold)")
    if (steps_per_segment is None) == (grid is None):
        raise ValueError("give either steps_per_segment or grid")
    if mode == "residual" and not hasattr(parts, "residual"):
        raise ValueError(f"{type(parts).__name__} has no feature residual network; take features full or hold")
    edges = _check_borders(parts, borders)
    times = equal_steps(edges, steps_per_segment) if steps_per_segment is not None else tuple(grid or ())
    velocities: list[Velocity] = []
    for segment, (run, (start, end)) in enumerate(zip(split_grid(times, edges), pairwise(edges), strict=True)):
        if mode == "residual" and abs(run[0] - start) > SAME_TIME:
            raise ValueError(f"the feature residual counts from the segment's start {start:g}, which the grid misses")
        velocities += _segment_velocities(parts, segment, start, end, mode, len(run) - 1)
    return integrate_each(velocities, x, grid=times)


def _check_borders(parts: BlockwiseParts, borders: Sequence[float]) -> tuple[float, ...]:
    times, own = check_grid(borders), parts.borders
    if times[0] > times[-1]:
        raise ValueError("segment borders must rise")
    if len(times) != len(own) or any(abs(a - b) > 1e-6 for a, b in zip(times, own, strict=True)):
        raise ValueError(f"the network's segments have the borders {list(own)}, got {list(times)}")
    return times


def _segment_velocities(
    parts: BlockwiseParts, segment: int, start: float, end: float, mode: FeatureMode, steps: int
) -> list[Velocity]:
    """The velocities of one segment's steps; the first one keeps its features for the others."""
    kept: dict[str, Tensor] = {}

    def at_start(state: Tensor, t: Tensor) -> Tensor:
        moment = parts.at(t)
        kept["first"] = parts.features(state, moment)
        return parts.velocity(state, moment, kept["first"], segment)

    def inside(state: Tensor, t: Tensor) -> Tensor:
        moment = parts.at(t)
        if mode == "full":
            features = parts.features(state, moment)
        elif mode == "residual":
            share = expand_time((t - start) / (end - start), kept["first"]).to(kept["first"])
            features = kept["first"] + share * cast(ResidualParts, parts).residual(state, moment)
        else:
            features = kept["first"]
        return parts.velocity(state, moment, features, segment)

    return [at_start, *[inside] * (steps - 1)]


class BlockwiseField(BlockwiseParts, Protocol):
    """A blockwise network that also is a velocity, which finds the segment of each row by its time."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity with full features, shape of `x`."""


def require_segments(solver: SolverSettings, borders: Sequence[float], mode: FeatureMode = "full") -> None:
    """Refuse a solver that leaves out a segment, or that is not Euler where features are approximated.

    Raises:
        ValueError: Says how many steps, or which method, it takes.
    """
    if mode != "full" and solver.method != "euler":
        raise ValueError(f"features are approximated in Euler steps only, not by {solver.method!r}; take them in full")
    if solver.times:
        split_grid(solver.times, borders)


def sample_blockwise(
    field: BlockwiseField,
    noise: Tensor,
    solver: SolverSettings,
    *,
    borders: Sequence[float],
    mode: FeatureMode = "full",
) -> Tensor:
    """`SolverSettings.sample` for a blockwise network; other methods than Euler find the stack by each call's time.

    Args:
        field: The network.
        noise: Shape (B, ...).
        solver: How the flow is followed, with a step in every segment.
        borders, mode: As for `integrate_blockwise`.

    Raises:
        ValueError: As `require_segments`.
    """
    require_segments(solver, borders, mode)
    if solver.method != "euler":
        return solver.sample(field, noise)
    return integrate_blockwise(field, noise, borders=borders, grid=solver.times, mode=mode)


def feature_residual_loss(
    parts: ResidualParts,
    noise: Tensor,
    data: Tensor,
    *,
    borders: Sequence[float],
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Stage 2: mean squared distance of :math:`F(x_{t_s})+a\,R(x_t,t)` from the true features at random times.

    Both states lie on the straight line of one pair, as published; when sampling they lie on the network's own path.
    Train only the residual network: the features are taken without a gradient.

    Args:
        parts: The network.
        noise: Shape (B, ...).
        data: Same shape.
        borders: The network's segment borders, rising.
        generator: Randomness of segments and times.

    Raises:
        ValueError: Borders that do not rise or are not the network's.
    """
    edges = torch.tensor(_check_borders(parts, borders), dtype=torch.float32, device=data.device)
    segment = torch.randint(len(edges) - 1, data.shape[:1], generator=generator, device=data.device)
    share = torch.rand(data.shape[:1], generator=generator, device=data.device)
    start = edges[segment]
    t = start + share * (edges[segment + 1] - start)
    x_t = straight_path(noise, data, t).x_t
    with torch.no_grad():
        first = parts.features(straight_path(noise, data, start).x_t, parts.at(start))
        true = parts.features(x_t, parts.at(t))
    guess = first + expand_time(share, first) * parts.residual(x_t, parts.at(t))
    return (guess.float() - true.float()).square().mean()
