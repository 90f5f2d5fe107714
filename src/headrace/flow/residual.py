"""What is wrong with a sample, for `flowopt.optimise_noise`: each function returns a residual in the sample's shape.

A residual is (half) the gradient of a squared distance by the sample, so residuals may be added.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor], Tensor]


def toward(target: Tensor, *, mask: Tensor | None = None) -> Residual:
    """Distance to a target; with a mask only where it is 1.

    For a chunk of actions whose first steps are already being executed, mask those steps and give the committed actions
    as target: the rest of the noise is left alone.

    Args:
        target: Shape (B, ...), or broadcastable to it.
        mask: 1 where the target counts and 0 elsewhere, broadcastable.
    """
    if mask is None:
        return lambda data: data - target
    return lambda data: (data - target) * mask.to(data)


def inside(low: Tensor | float, high: Tensor | float, *, margin: float = 0.0) -> Residual:
    """How far the data stick out of [low + margin, high - margin]; 0 inside.

    Args:
        low, high: Bounds in the data's units, broadcastable to its shape.
        margin: Distance to keep from the bounds, in the same units.

    Raises:
        ValueError: The margin leaves no room between the bounds.
    """
    bottom, top = torch.as_tensor(low) + margin, torch.as_tensor(high) - margin
    if bool((bottom > top).any()):
        raise ValueError(f"a margin of {margin} leaves no room between the bounds")
    return lambda data: data - torch.minimum(torch.maximum(data, bottom.to(data)), top.to(data))


def sums_to(displacement: Tensor, dims: tuple[int, ...]) -> Residual:
    """Action chunks whose summed deltas should reach a displacement: steering a chunk toward a target pose.

    Each step of the chunk takes an equal part of the difference.

    Args:
        displacement: Wanted sum over the horizon, shape (B, len(dims)), in the actions' units.
        dims: Which action dimensions are summed, such as (0, 1, 2) for a translation.
    """

    def residual(actions_BHA: Tensor) -> Tensor:
        wrong = torch.zeros_like(actions_BHA)
        missing = actions_BHA[..., list(dims)].sum(1) - displacement.to(actions_BHA)
        wrong[..., list(dims)] = missing[:, None] / actions_BHA.shape[1]
        return wrong

    return residual


def together(*residuals: Residual) -> Residual:
    """Sum of several residuals: reach a pose and stay inside the limits."""
    return lambda data: sum((residual(data) for residual in residuals), torch.zeros_like(data))
