r"""FlowOpt: optimising the noise of a whole sampler without gradients, for inversion, editing and steering.

The sampler f is a black box from noise to data. The update :math:`z \leftarrow z-\eta\,r(f(z))` is gradient descent
with the sampler's Jacobian replaced by the identity: one sampling per iteration, no backward pass, flat memory. It
converges where :math:`0<\eta<2\langle\Delta f,\Delta z\rangle/|\Delta f|^2`, which `step_size_bound` estimates.

Source: FlowOpt, arXiv 2510.22010; orronai/FlowOpt@ee3577b. The bound is derived in docs/flow.md.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headrace.flow.residual import Residual, toward
from headrace.flow.solver import SolverSettings, Velocity, check_grid, in_full_precision, seeing, velocity_at

Sampler = Callable[[Tensor], Tensor]
Stopped = Literal["converged", "stalled", "diverged", "asked", "budget"]


class NotContractive(ValueError):
    """No step size lets the update converge: the sampler turns small changes of the noise by 90 degrees or more."""


class StepBound(NamedTuple):
    """What step sizes a sampler allows near some noise.

    Attributes:
        limit: Step size at which the update stops contracting.
        recommended: Half of it.
        contractive_share: Share of the probed pairs for which any step size works.
        median: Median of the pairs' own limits; far above `limit` where a few regions are stiff.
    """

    limit: float
    recommended: float
    contractive_share: float
    median: float


@torch.no_grad()
def step_size_bound(
    sampler: Sampler,
    noise: Tensor,
    *,
    radius: float = 0.01,
    quantile: float = 0.01,
    generator: torch.Generator | None = None,
) -> StepBound:
    """Estimate the largest step size from pairs of nearby noises; two samplings of the batch.

    Args:
        sampler: Noise (B, ...) to data of the same shape.
        noise: Where to probe, shape (B, ...); 64 rows or more give a steady estimate.
        radius: Standard deviation of the second point around the first. Near pairs give a stricter bound than far ones.
        quantile: Share of pairs that may be stiffer than the bound; 0 takes the minimum.
        generator: Randomness of the second point.

    Raises:
        NotContractive: The quantile of the pairs' limits is not above 0.
        ValueError: `radius` or `quantile` out of range.
    """
    if not radius > 0 or not 0 <= quantile < 1:
        raise ValueError(f"radius must be above 0 and quantile in [0, 1), got {radius} and {quantile}")
    moved = noise + radius * torch.empty_like(noise).normal_(generator=generator)
    dz = (moved - noise).flatten(1).double()
    df = (sampler(moved) - sampler(noise)).flatten(1).double()
    limits = 2.0 * (df * dz).sum(1) / df.square().sum(1).clamp_min(1e-30)
    limit = torch.quantile(limits, quantile).item()
    share = (limits > 0).double().mean().item()
    if not limit > 0:
        raise NotContractive(
            f"for {1 - share:.1%} of the probed pairs no step size converges (the bound's {quantile:.0%} quantile is "
            f"{limit:.3g}). Use less guidance, a smoother sampler, or start closer to the answer"
        )
    return StepBound(limit, 0.5 * limit, share, limits.median().item())


class FlowOptStep(NamedTuple):
    """State of a running optimisation, given to the progress callback after every sampling.

    Attributes:
        iteration: Updates made so far; 0 for the start.
        error: Mean over rows of the residual's root mean square.
        worst: Largest of the rows.
        noise_norm: Mean of |z| / sqrt(D); 1 on the shell where the sampler was trained.
        output: Present samples, shape (B, ...).
    """

    iteration: int
    error: float
    worst: float
    noise_norm: float
    output: Tensor


class FlowOptResult(NamedTuple):
    """Best point of every row.

    Attributes:
        noise: Shape (B, ...).
        output: The sampler's data for it.
        error: Root mean square of each row's residual there, shape (B,).
        history: Mean error after each sampling, the start first. Where it stops falling is the floor: an answer that
            the sampler cannot produce leaves a residual.
        stopped: Why it ended.
    """

    noise: Tensor
    output: Tensor
    error: Tensor
    history: tuple[float, ...]
    stopped: Stopped


def _row_error(residual: Tensor) -> Tensor:
    return residual.flatten(1).square().mean(1).sqrt()


@torch.no_grad()
def optimise_noise(
    sampler: Sampler,
    start: Tensor,
    residual: Residual,
    *,
    step_size: float,
    iterations: int,
    tolerance: float = 0.0,
    patience: int | None = None,
    progress: Callable[[FlowOptStep], bool | None] | None = None,
) -> FlowOptResult:
    """Move the noise until the residual of its sample vanishes.

    Entries of the noise whose residual stays 0 are left untouched, bit for bit.

    Args:
        sampler: Noise (B, ...) to data of the same shape, deterministic.
        start: First noise, float32 or float64 (half precision would put a floor under the
            error).
        residual: What is wrong with the data, in the data's shape and units, such as `toward(target)`.
        step_size: See `step_size_bound`.
        iterations: Most updates; one sampling each, and one for the start.
        tolerance: Stop when every row's error is at most this.
        patience: Stop when the mean error has not reached a new low in so many iterations.
        progress: Called after every sampling; returning True stops.

    Raises:
        ValueError: A step size or an iteration count that is not above 0, half precision, or a residual of another
            shape.
    """
    if not step_size > 0 or iterations < 1:
        raise ValueError(f"step_size and iterations must be above 0, got {step_size} and {iterations}")
    if start.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the noise must be float32 or float64, got {start.dtype}: call .float() first")
    noise, history, low = start, [], math.inf
    best_noise, best_output = start, start
    best_error = torch.full(start.shape[:1], math.inf, device=start.device)
    low_at = 0
    stopped: Stopped = "budget"
    for iteration in range(iterations + 1):
        output = sampler(noise)
        wrong = residual(output)
        if wrong.shape != noise.shape:
            raise ValueError(f"the residual must have the noise's shape {tuple(noise.shape)}, got {tuple(wrong.shape)}")
        error = _row_error(wrong)
        better = error < best_error
        keep = better.reshape(-1, *[1] * (noise.ndim - 1))
        best_noise, best_output = torch.where(keep, noise, best_noise), torch.where(keep, output, best_output)
        best_error = torch.where(better, error.float(), best_error)
        history.append(error.mean().item())
        if history[-1] < low:
            low, low_at = history[-1], iteration
        if progress is not None:
            norm = noise.flatten(1).norm(dim=1).mean().item() / math.sqrt(noise[0].numel())
            if progress(FlowOptStep(iteration, history[-1], error.max().item(), norm, output)):
                stopped = "asked"
                break
        if best_error.max().item() <= tolerance:
            stopped = "converged"
        elif not math.isfinite(history[-1]) or history[-1] > 100.0 * history[0]:
            stopped = "diverged"
        elif patience is not None and iteration - low_at >= patience:
            stopped = "stalled"
        if stopped != "budget":
            break
        noise = noise - step_size * wrong
    return FlowOptResult(best_noise, best_output, best_error, tuple(history), stopped)


@torch.no_grad()
def uni_inversion(velocity: Velocity, data: Tensor, *, grid: Sequence[float]) -> Tensor:
    """Approximate noise of given data: one backward pass in which each step reuses the last slope as a predictor.

    Args:
        velocity: The sampler's velocity.
        data: Shape (B, ...).
        grid: The sampler's rising grid; walked backward with one call a step and one at the start.

    Returns:
        Shape of `data`; float32 for half-precision data, as `optimise_noise` wants it. The velocity still sees the
        data's own dtype.

    Raises:
        ValueError: The grid does not rise.

    Source: UniInv as used by orronai/FlowOpt@ee3577b for its starting point.
    """
    times = check_grid(grid)
    if times[0] > times[-1]:
        raise ValueError("give the sampler's own grid, rising; it is walked backward here")
    x, field = in_full_precision(data), seeing(data.dtype, velocity)
    slope = velocity_at(field, x, times[-1])
    for now, then in pairwise(reversed(times)):
        slope = velocity_at(field, x + (then - now) * slope, then)
        x = x + (then - now) * slope
    return x


def _fixed_times(settings: SolverSettings) -> tuple[float, ...]:
    if not settings.times:
        raise ValueError(f"FlowOpt needs a sampler with fixed steps, and {settings.method} chooses its own: give steps")
    return settings.times


def invert(
    velocity: Velocity,
    data: Tensor,
    settings: SolverSettings,
    *,
    step_size: float,
    iterations: int = 30,
    tolerance: float = 0.0,
    progress: Callable[[FlowOptStep], bool | None] | None = None,
) -> FlowOptResult:
    """Noise from which the sampler reproduces `data`, starting from `uni_inversion`.

    Args:
        velocity: With the condition under which `data` is to be reproduced.
        data: Pictures, latents or action chunks, shape (B, ...).
        settings: The sampler, with fixed steps.
        step_size, iterations, tolerance, progress: As for `optimise_noise`.

    Raises:
        ValueError: An adaptive solver, or as `optimise_noise`.

    Source: arXiv 2510.22010, inversion: 10 steps, 30 iterations.
    """
    start = uni_inversion(velocity, data, grid=_fixed_times(settings))
    return optimise_noise(
        lambda z: settings.sample(velocity, z),
        start,
        toward(data),
        step_size=step_size,
        iterations=iterations,
        tolerance=tolerance,
        progress=progress,
    )


def edit(
    source: Velocity,
    target: Velocity,
    data: Tensor,
    settings: SolverSettings,
    *,
    step_size: float,
    iterations: int = 8,
    progress: Callable[[FlowOptStep], bool | None] | None = None,
) -> FlowOptResult:
    """Data under another condition that stays close to what it was.

    Starts at the inversion under the source condition and moves towards the original content under the target
    condition. Every iterate is a usable edit, from the freest to the most faithful; stop by `progress` where it is
    faithful enough.

    Args:
        source: Velocity with the condition of `data`.
        target: Velocity with the wanted condition.
        data: Shape (B, ...).
        settings, step_size, iterations, progress: As for `invert`.

    Raises:
        ValueError: As `invert`.

    Source: arXiv 2510.22010, editing: 8 iterations.
    """
    start = uni_inversion(source, data, grid=_fixed_times(settings))
    return optimise_noise(
        lambda z: settings.sample(target, z),
        start,
        toward(data),
        step_size=step_size,
        iterations=iterations,
        progress=progress,
    )
