"""Finite scalar quantisation: a few numbers, each rounded to a few levels; no codebook, so no code can die."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.nn.quantizers.rows import QuantizedRows
from headrace.nn.shapes import expect_shape

EDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """Levels of each number.

    Attributes:
        levels: Levels per number, each at least 3, as with 2 the published shift makes one of them hardly ever
            met; there are as many codes as their product.
        width: Numbers of the rows outside; linear maps lead to the few inside and back.
    """

    levels: tuple[int, ...] = (3, 3)
    width: int = 32

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels must hold at least one number, each at least 3, got {self.levels}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class FiniteScalar(nn.Module):
    """FSQ with a straight-through gradient through the rounding. Source: Mentzer et al. 2023 (arXiv 2309.15505)."""

    levels: Tensor
    strides: Tensor
    usage: Tensor

    def __init__(self, config: FiniteScalarConfig) -> None:
        super().__init__()
        self.config = config
        self.codes, self.width = math.prod(config.levels), config.width
        self.inp = nn.Linear(config.width, len(config.levels))
        self.out = nn.Linear(len(config.levels), config.width)
        strides = [math.prod(config.levels[:i]) for i in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.register_buffer("usage", torch.zeros(self.codes, dtype=torch.int64))

    def forward(self, rows: Tensor, *, generator: torch.Generator | None = None) -> QuantizedRows:
        """Quantise rows of shape (R, D); nothing here is random, so `generator` draws nothing."""
        expect_shape("rows", rows, (None, self.width))
        bounded = self._bound(self.inp(rows).float())
        level = bounded + (bounded.round() - bounded).detach()
        codes = ((level.detach().round().long() + self.levels // 2) * self.strides).sum(1)
        if self.training:
            self.usage += torch.bincount(codes, minlength=self.codes)
        return QuantizedRows(self.out((level / (self.levels // 2)).to(rows.dtype)), codes, rows.new_zeros(()))

    def _bound(self, x: Tensor) -> Tensor:
        """Squash so that rounding gives exactly `levels` values, from -(L // 2) upwards."""
        half = (self.levels - 1) * (1 + EDGE) / 2
        offset = (1 - self.levels % 2) * 0.5
        return (x + torch.atanh(offset / half)).tanh() * half - offset

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors of codes of shape (...), shape (..., D)."""
        level = codes[..., None] // self.strides % self.levels - self.levels // 2
        return self.out((level / (self.levels // 2)).to(self.out.weight.dtype))
