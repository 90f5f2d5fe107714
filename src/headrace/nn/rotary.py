"""Rotary positions on any number of axes: each axis turns its own share of the channels."""

import torch
from torch import Tensor

THETA = 10_000.0


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angle of each pair of channels, shape (N, head_dim / 2), float32.

    Args:
        positions: Place of each token, shape (N, axes); row and column for pictures, the time step for actions.
        head_dim: Channels of a head, divisible by twice the number of axes.

    Raises:
        ValueError: It is not divisible.
    """
    axes = positions.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim must be divisible by {2 * axes} for {axes} axes of pairs, got {head_dim}")
    pairs = head_dim // (2 * axes)
    frequency = THETA ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    return (positions.float()[:, :, None] * frequency).flatten(1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (first half, second half) of `x`, shape (..., N, head_dim), by `angles` (N, head_dim / 2)."""
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
