"""How straight a flow is, and how much a few-step sampler loses by its bends."""

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.flow.coupling import exact_assignment, squared_distances
from headrace.flow.solver import Velocity, integrate, trajectory


class Straightness(NamedTuple):
    """Figures of one flow on one batch of noise.

    Attributes:
        curvature: Mean of |v - (x_end - x_0)|^2 over time over the mean of |x_end - x_0|^2; 0 is straight.
        path_energy: Mean of |v|^2 over the trajectories.
        step_errors: Steps to the root mean square distance between the end after so many Euler steps and the fine end.
    """

    curvature: float
    path_energy: float
    step_errors: dict[int, float]


def root_mean_square(difference: Tensor) -> float:
    """Root of the mean over rows of the squared length of each row of `difference`, shape (B, ...)."""
    return difference.flatten(1).double().square().sum(1).mean().sqrt().item()


def measure_straightness(
    velocity: Velocity, noise: Tensor, *, fine_steps: int = 100, steps: tuple[int, ...] = (1, 2, 4, 8)
) -> Straightness:
    """Measure a flow along its own Euler trajectories.

    Args:
        velocity: The flow's velocity.
        noise: Starts, shape (B, ...).
        fine_steps: Steps of the trajectory that counts as exact.
        steps: Step counts whose end error is wanted.

    Source: Liu et al. 2022, arXiv 2209.03003 (straightness); Tong et al. 2024, arXiv 2302.00482 (path energy).
    """
    path = trajectory(velocity, noise, steps=fine_steps)
    way = path.states[-1] - noise
    bend = (path.slopes - way).flatten(2).square().sum(-1).mean()
    energy = path.slopes.flatten(2).square().sum(-1).mean()
    errors = {k: root_mean_square(integrate(velocity, noise, steps=k) - path.states[-1]) for k in steps}
    return Straightness((bend / way.flatten(1).square().sum(-1).mean()).item(), energy.item(), errors)


def wasserstein2_squared(first: Tensor, second: Tensor) -> float:
    """Exact squared 2-Wasserstein distance between two equally large sets of points, by optimal assignment.

    Args:
        first: Shape (N, ...).
        second: Same shape. N of 1000 takes about 0.1 s.

    Raises:
        ValueError: Shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"both sets must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    cost = squared_distances(first, second)
    order = exact_assignment(cost)
    return cost[order, torch.arange(len(order), device=cost.device)].mean().item()


def normalised_path_energy(path_energy: float, source: Tensor, target: Tensor) -> float:
    """|path energy - W2^2| / W2^2 between samples of both ends: 0 where the flow is the optimal transport.

    Source: Tong et al. 2024, arXiv 2302.00482, sec. 6.
    """
    best = wasserstein2_squared(source, target)
    return abs(path_energy - best) / best
