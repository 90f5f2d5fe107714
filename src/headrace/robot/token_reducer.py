"""From the features of a transition to a few rows for the quantiser: by strided convolution or by queries."""
# Shape letters: B batch, T transitions, D width of the features, N tokens of a transition, Q width of a code.

from typing import Literal

import torch
from torch import Tensor, nn

from headrace.nn.spatiotemporal import GatedNetwork

Reduction = Literal["convolution", "queries"]


def strides_to(side: int, target: int) -> tuple[int, ...]:
    """Strides of the convolutions that bring `side` cells to `target`: halvings first, at least two convolutions.

    Raises:
        ValueError: Halving (rounding up) never meets `target`.
    """
    strides: list[int] = []
    while side > target:
        side, strides = -(-side // 2), [*strides, 2]
    if side != target:
        raise ValueError(f"halving a side of cells never gives {target}; choose a number of tokens that it gives")
    return tuple([*strides, 1, 1][: max(2, len(strides))])


class ConvolutionReducer(nn.Module):
    """A linear map, then 3 x 3 x 3 convolutions with stride in space only; time mixes over three transitions.

    Source: ViPRA, laq/model/utils.py, which fixes a 16 x 16 grid; here any square number of tokens that halving meets.
    """

    def __init__(self, width: int, grid: tuple[int, int], tokens: int, code_width: int) -> None:
        super().__init__()
        side = round(tokens**0.5)
        if side * side != tokens or grid[0] != grid[1]:
            raise ValueError(f"convolutions need a square grid and number of tokens, got {grid} and {tokens}")
        self.inp = nn.Linear(width, code_width)
        layers: list[nn.Module] = []
        for stride in strides_to(grid[0], side):
            layers += [nn.Conv3d(code_width, code_width, 3, (1, stride, stride), 1), nn.LeakyReLU(0.1)]
        self.convolutions = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, rows, columns, D) to (B, T, N, Q), tokens row-major."""
        video = self.inp(features).permute(0, 4, 1, 2, 3)
        return self.convolutions(video).flatten(3).permute(0, 2, 3, 1)


class QueryReducer(nn.Module):
    """Learned queries that attend to a transition's features, in the manner of UniVLA and Moto.

    Source: the idea of Moto's M-Former (arXiv 2412.04445) and UniVLA's action queries (arXiv 2505.06111); one layer.
    """

    def __init__(self, width: int, tokens: int, code_width: int, *, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.network = GatedNetwork(width, dropout=0.0)
        self.out = nn.Linear(width, code_width)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, rows, columns, D) to (B, T, N, Q)."""
        batch, transitions = features.shape[:2]
        keys = self.norm(features.flatten(2, 3).flatten(0, 1))
        queries = self.queries.expand(len(keys), -1, -1)
        x = queries + self.attention(queries, keys, keys, need_weights=False)[0]
        return self.out(x + self.network(x)).unflatten(0, (batch, transitions))
