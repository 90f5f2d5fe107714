"""Sine-cosine position tables in one and two dimensions, and learned tables carried to other grids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    r"""Sines, then cosines, of each position: shape (len(positions), width), float32.

    :math:`\omega_i = 10000^{-i/(w/2)}`. Source: facebookresearch/mae, util/pos_embed.py.

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}")
    omega = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = positions.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sincos_2d(grid: tuple[int, int], width: int) -> Tensor:
    """Table for a row-major grid, shape (rows * columns, width); the COLUMN fills the first half (MAE ordering).

    Raises:
        ValueError: `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width must be divisible by 4, got {width}")
    rows = sincos_1d(torch.arange(grid[0]), width // 2)
    columns = sincos_1d(torch.arange(grid[1]), width // 2)
    both = [columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)]
    return torch.cat(both, dim=-1).reshape(grid[0] * grid[1], width)


class GridPositions(nn.Module):
    """A learned table for one native grid that answers for any grid by bicubic interpolation on the plane.

    Args:
        grid: Rows and columns of the stored table.
        width: Channels.
        interpolate: False refuses every other grid. The released UniFlow takes the first N rows of the flattened
            table instead, which gives small images the geometry of a strip.
    """

    def __init__(self, grid: tuple[int, int], width: int, *, interpolate: bool = True) -> None:
        super().__init__()
        self.grid, self.interpolate = grid, interpolate
        self.table = nn.Parameter(sincos_2d(grid, width)[None])

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid, shape (1, rows * columns, width); the table itself at the native grid.

        Raises:
            ValueError: Another grid, and interpolation is not allowed.
        """
        if grid == self.grid:
            return self.table
        if not self.interpolate:
            raise ValueError(
                f"the position table is for a grid of {self.grid[0]} x {self.grid[1]}, got {grid[0]} x {grid[1]}; "
                "resize the images to the native size or set interpolate_positions=True"
            )
        plane = self.table.float().reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(self.table.dtype)
