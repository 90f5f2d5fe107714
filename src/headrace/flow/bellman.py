"""BOSS phase 1: the K step grid with the least summed error, by dynamic programming over a fine uniform grid.

The sum of local errors is a surrogate: minimising it mostly, but not always, lowers the error at the end. A narrow
multimodal target at K=2 is a known exception (docs/flow.md). `endpoint` costs more and follows each error to the end.

Source: Nguyen et al. 2024, arXiv 2312.16414, sec. 4.1; nguyenngocbaocmt02/BOSS@0c170f9 (facts only). The endpoint cost
is headrace's own.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.flow.solver import Trajectory, Velocity, integrate, trajectory, uniform_grid
from headrace.flow.step_grid import StepGrid

CostKind = Literal["local", "endpoint"]


class StepPath(NamedTuple):
    """A path through the fine grid.

    Attributes:
        indices: Rising indices from 0 to the last; one more than there are steps.
        cost: Sum of the costs of its steps.
    """

    indices: tuple[int, ...]
    cost: float


def local_costs(path: Trajectory) -> np.ndarray:
    """Error of each single jump: mean over samples of |x_k - x_j - (t_k - t_j) v_j|^2, summed over dimensions.

    Args:
        path: Euler trajectory on the fine grid.

    Returns:
        float64, shape (F+1, F+1), entry [j, k] for a jump from j to k > j; infinity elsewhere. Neighbours cost 0.
    """
    fine = len(path.slopes)
    costs = np.full((fine + 1, fine + 1), np.inf)
    for j in range(fine):
        ahead = (path.times[j + 1 :] - path.times[j]).to(path.states)
        jumped = path.states[j] + ahead.reshape(-1, *[1] * (path.states.ndim - 1)) * path.slopes[j]
        error = (jumped - path.states[j + 1 :]).flatten(2).square().sum(-1)
        costs[j, j + 1 :] = error.double().mean(1).cpu().numpy()
    return costs


def endpoint_costs(velocity: Velocity, path: Trajectory) -> np.ndarray:
    """Error that each single jump leaves at t=1 when fine steps finish the way; shape as `local_costs`.

    Takes about F^3/6 calls of the velocity, each with the batch of the trajectory, so that the velocity may close over
    one condition per row.

    Args:
        velocity: The one that made `path`.
        path: Euler trajectory on the fine grid.
    """
    fine = len(path.slopes)
    times = path.times.tolist()
    costs = np.full((fine + 1, fine + 1), np.inf)
    for j in range(fine):
        for k in range(j + 1, fine + 1):
            state = path.states[j] + (times[k] - times[j]) * path.slopes[j]
            if k < fine and k > j + 1:
                state = integrate(velocity, state, grid=times[k:], check_finite=False)
            elif k < fine:
                state = path.states[-1]
            error = (state - path.states[-1]).flatten(1).square().sum(-1)
            costs[j, k] = error.double().mean().item()
    return costs


def cheapest_path(costs: np.ndarray, steps: int) -> StepPath:
    """The path of exactly `steps` jumps from the first to the last index with the least sum.

    Args:
        costs: Shape (F+1, F+1); only entries [j, k] with k > j are read.
        steps: From 1 to F.

    Raises:
        ValueError: `costs` is not square, or `steps` is not in 1..F.
    """
    size = len(costs)
    if costs.ndim != 2 or costs.shape[1] != size or size < 2:
        raise ValueError(f"costs must be square with at least 2 rows, got shape {costs.shape}")
    if not 1 <= steps <= size - 1:
        raise ValueError(f"steps must be in 1..{size - 1} (the fine grid), got {steps}")
    upper = np.where(np.triu(np.ones((size, size), bool), 1), costs, np.inf)
    best, choices = upper[:, -1], []
    for _ in range(steps - 1):
        total = upper + best[None]
        choices.append(total.argmin(1))
        best = total.min(1)
    indices = [0]
    for choice in reversed(choices):
        indices.append(int(choice[indices[-1]]))
    return StepPath((*indices, size - 1), float(best[0]))


@torch.no_grad()
def bellman_grids(
    velocity: Velocity, noise: Tensor, *, steps: tuple[int, ...], fine_steps: int = 100, cost: CostKind = "local"
) -> dict[int, StepGrid]:
    """The best grid for each of several step counts, from one cost matrix.

    Args:
        velocity: The trained velocity; may close over one condition per row of `noise`.
        noise: Starts, shape (B, ...); 100 of them are enough for most velocities.
        steps: Step counts, each well below `fine_steps`.
        fine_steps: Steps of the uniform grid to choose from; that many calls for `local`, about its cube/6 for
            `endpoint`.
        cost: `local`, as published, or `endpoint`.

    Returns:
        Step count to grid.

    Raises:
        ValueError: No step count, one outside 1..fine_steps, an unknown cost, or a velocity that is not finite.

    Source: arXiv 2312.16414, algorithm 1.
    """
    if cost not in ("local", "endpoint"):
        raise ValueError(f"unknown cost {cost!r} (known: local, endpoint)")
    if not steps:
        raise ValueError("name at least one step count")
    path = trajectory(velocity, noise, steps=fine_steps)
    costs = local_costs(path) if cost == "local" else endpoint_costs(velocity, path)
    if not np.isfinite(costs[np.triu_indices(fine_steps + 1, 1)]).all():
        integrate(velocity, noise, steps=fine_steps)  # names the step and the time
        raise ValueError("the costs are not finite although the samples are: the states are too large to square")
    times = uniform_grid(fine_steps)
    grids = {}
    for count in steps:
        found = cheapest_path(costs, count)
        grids[count] = StepGrid(
            times=tuple(times[i] for i in found.indices),
            source=cost,
            fine_steps=fine_steps,
            samples=len(noise),
            cost=found.cost,
        )
    return grids


def bellman_grid(
    velocity: Velocity, noise: Tensor, *, steps: int, fine_steps: int = 100, cost: CostKind = "local"
) -> StepGrid:
    """The best grid for one step count; see `bellman_grids`."""
    return bellman_grids(velocity, noise, steps=(steps,), fine_steps=fine_steps, cost=cost)[steps]
