"""Rotary positions on a plane: rows turn the first half of the channels, columns the second."""

import torch
from torch import Tensor

THETA = 10_000.0


def axial_angles(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Angle of each channel at each cell, row-major, shape (rows * columns, head_dim), float32.

    Frequencies are `THETA ** (-2 i / (head_dim / 2))`; each serves two neighbouring channels.

    Raises:
        ValueError: `head_dim` is not divisible by 4.

    Source: FlowTok (TACJu/FlowTok, FlowTiTok blocks), after EVA-02's vision rotary embedding.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be divisible by 4 for two axes of pairs, got {head_dim}")
    half = head_dim // 2
    frequency = THETA ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    parts = [(axis.reshape(-1, 1) * frequency).repeat_interleave(2, dim=-1) for axis in (rows, columns)]
    return torch.cat(parts, dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels (x0, x1) by their angle; `cos` and `sin` broadcast to `x` (..., N, head_dim)."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin
