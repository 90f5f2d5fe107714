"""Multi-scale residual quantisation with codebooks that share one index (TokenFlow; VAR without its filters)."""

# Shape letters: B batch, D all channels, K codes, N codes of all scales, g side of the finest scale, s side of a scale.

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.quantizers.joint_search import nearest_codes, unit_parts
from headrace.nn.shapes import expect_shape


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig:
    """Sizes of a multi-scale quantiser.

    Attributes:
        scales: Side of each scale, rising; the last is the side of the feature map.
        dims: Channels that each codebook quantises. TokenFlow: (32, 8), semantic then pixel.
        weights: Weight of each codebook in the distance; TokenFlow uses 1 for both.
        codes: Number of codes, shared by all codebooks.
        commitment: Weight beta of the commitment term.
    """

    scales: tuple[int, ...]
    dims: tuple[int, ...] = (32, 8)
    weights: tuple[float, ...] = (1.0, 1.0)
    codes: int = 32768
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if not self.scales or self.scales[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.scales)):
            raise ValueError(f"scales must be rising and at least 1, got {self.scales}")
        if not self.dims or min(self.dims) < 1:
            raise ValueError(f"dims must name at least one codebook of at least 1 channel, got {self.dims}")
        if len(self.weights) != len(self.dims) or min(self.weights) <= 0:
            raise ValueError(f"weights must be one number above 0 per codebook, got {self.weights} for {self.dims}")
        if self.codes < 2:
            raise ValueError(f"codes must be at least 2, got {self.codes}")
        if self.commitment < 0:
            raise ValueError(f"commitment must be at least 0, got {self.commitment}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Codes per scale."""
        return tuple(side * side for side in self.scales)

    @property
    def grid(self) -> int:
        """Side of the finest scale."""
        return self.scales[-1]

    @property
    def dim(self) -> int:
        """Channels of the feature map, all codebooks together."""
        return sum(self.dims)


class Quantized(NamedTuple):
    """Result of a pass through the quantiser.

    Attributes:
        features: Sum of all scales on the finest grid, shape (B, D, g, g); straight-through gradient.
        codes: int64, shape (B, N), scale by scale, row by row inside a scale.
        vector_loss: Mean squared distance that pulls codes to queries, averaged over scales (unweighted).
        commitment_loss: The same distance that pulls queries to codes, already times beta.
        queries: What was quantised, unit parts, shape (B, N, D), detached; new codes can be drawn from it.
    """

    features: Tensor
    codes: Tensor
    vector_loss: Tensor
    commitment_loss: Tensor
    queries: Tensor


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation from coarse to fine; at each place one index picks a vector from every codebook.

    At each scale the residual is averaged down to the scale's grid, each part is scaled to length 1, the nearest code
    is taken, brought to the finest grid with bicubic interpolation, and taken off the residual. There is no
    convolution after the interpolation. Everything runs in float32, whatever the caller's precision: with 32,768 codes
    near ties change under bf16.

    Source: TokenFlow (arXiv 2412.03069) sec. 3; repository ByteVisionLab/TokenFlow.
    """

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = config
        self.books = nn.ParameterList()
        for dim in config.dims:
            start = torch.empty(config.codes, dim).uniform_(-1 / config.codes, 1 / config.codes)
            self.books.append(nn.Parameter(F.normalize(start, dim=-1)))

    def codebook(self) -> Tensor:
        """All codes with unit parts side by side, float32, shape (K, D)."""
        return torch.cat([F.normalize(book.float(), dim=-1) for book in self.books], dim=-1)

    def forward(self, features: Tensor, *, drop: int | None = None) -> Quantized:
        """Quantise a feature map.

        Args:
            features: Shape (B, D, g, g), not normalised.
            drop: Place in `scales` of one scale to leave out (training option); never the first.

        Raises:
            ValueError: Wrong shape, or `drop` is not the place of a later scale.
        """
        config = self.config
        expect_shape("features", features, (None, config.dim, config.grid, config.grid))
        if drop is not None and not 1 <= drop < len(config.scales):
            raise ValueError(f"drop must be a place in 1..{len(config.scales) - 1}, got {drop}")
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float(), [s for i, s in enumerate(config.scales) if i != drop])

    def _quantize(self, features: Tensor, scales: list[int]) -> Quantized:
        config = self.config
        found = self.codebook().detach()
        residual, total = features, torch.zeros_like(features)
        codes, queries, vector_losses, commitment_losses = [], [], [], []
        for side in scales:
            query = unit_parts(F.adaptive_avg_pool2d(residual, side).flatten(2).transpose(1, 2), config.dims)
            index = nearest_codes(query.detach().flatten(0, 1), found, dims=config.dims, weights=config.weights)
            index = index.view(query.shape[:2])
            chosen = self.embed(index) if torch.is_grad_enabled() else found[index]
            if torch.is_grad_enabled():
                vector_losses.append(F.mse_loss(chosen, query.detach()))
                commitment_losses.append(config.commitment * F.mse_loss(query, chosen.detach()))
                chosen = query + (chosen - query).detach()
            placed = self._place(chosen, side, config.grid)
            total = total + placed
            residual = residual - placed.detach()
            codes.append(index)
            queries.append(query.detach())
        nothing = features.new_zeros(())
        return Quantized(
            total,
            torch.cat(codes, 1),
            torch.stack(vector_losses).mean() if vector_losses else nothing,
            torch.stack(commitment_losses).mean() if commitment_losses else nothing,
            torch.cat(queries, 1),
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of codes with unit parts: any integer shape (...) to (..., D), float32."""
        return torch.cat([F.normalize(book[codes].float(), dim=-1) for book in self.books], dim=-1)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Feature map of codes on the finest grid.

        Args:
            codes: int64, shape (B, n), where n counts the codes of the first one, two, ... or all scales; a
                prefix gives a coarse preview.

        Returns:
            Shape (B, D, g, g).

        Raises:
            ValueError: n is not the length of a prefix of scales.
        """
        total = None
        for side, part in zip(self.config.scales, self.split(codes), strict=False):
            placed = self._place(self.embed(part), side, self.config.grid)
            total = placed if total is None else total + placed
        assert total is not None
        return total

    def split(self, codes: Tensor) -> Sequence[Tensor]:
        """Cut (B, n, ...) into one tensor per scale; n must be the length of a prefix of scales."""
        return codes.split(self.config.counts[: self.prefix_scales(codes.shape[1])], dim=1)

    def prefix_scales(self, count: int) -> int:
        """Number of scales that `count` codes fill.

        Raises:
            ValueError: No whole number of scales has that many codes; lists the counts that work.
        """
        sums = list(itertools.accumulate(self.config.counts))
        if count not in sums:
            raise ValueError(
                f"{count} codes fill no prefix of the scales {self.config.scales}; give one of {sums} codes"
            )
        return sums.index(count) + 1

    def next_scale_inputs(self, codes: Tensor, *, refine: bool = False) -> Tensor:
        """Features that a next-scale predictor reads, interpolated step by step from each scale to the next.

        Unlike `accumulate`, which brings every scale straight to the finest grid: the running sum lives on the grid of
        its last scale.

        Args:
            codes: int64, shape (B, n), a prefix of scales.
            refine: Also say what the last given scale's places read when it is predicted once more.

        Returns:
            Shape (B, m, D) for the places of scales 2, 3, ... With all S scales given this stops at scale S,
            otherwise at the scale after the given ones. With `refine` the last given scale ends the list and its rows
            hold the sum including its own codes.

        Raises:
            ValueError: n is not the length of a prefix of scales, or `refine` with the codes of one scale only.
        """
        scales = self.config.scales
        parts = self.split(codes)
        if refine and len(parts) < 2:
            raise ValueError("refine needs the codes of at least two scales: the first is predicted from text alone")
        rows: list[Tensor] = []
        running: Tensor | None = None
        for place, part in enumerate(parts):
            side = scales[place]
            own = self.on_own_grid(part, side)
            running = own if running is None else self.resize(running, side) + own
            if refine and place == len(parts) - 1:
                rows = [*rows[:-1], running]
            elif place + 1 < len(scales):
                rows.append(self.resize(running, scales[place + 1]))
        if not rows:
            return torch.zeros(len(codes), 0, self.config.dim, device=codes.device)
        return torch.cat([row.flatten(2).transpose(1, 2) for row in rows], dim=1)

    def _place(self, vectors: Tensor, side: int, to: int) -> Tensor:
        grid = vectors.transpose(1, 2).reshape(len(vectors), -1, side, side)
        return self.resize(grid, to)

    def on_own_grid(self, codes: Tensor, side: int) -> Tensor:
        """Vectors of one scale's codes, int64 (B, side * side), as a map (B, D, side, side)."""
        return self._place(self.embed(codes), side, side)

    @staticmethod
    def resize(grid: Tensor, side: int) -> Tensor:
        """A map (B, D, h, h) on another grid, bicubic, (B, D, side, side)."""
        if grid.shape[-1] == side:
            return grid
        return F.interpolate(grid, size=(side, side), mode="bicubic")
