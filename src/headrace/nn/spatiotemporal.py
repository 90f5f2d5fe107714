"""Transformer blocks over video tokens that attend over time and over space in turn.

A block runs FiLM (if conditioned), a depthwise 3-D convolution, attention over time, attention over space and a gated
network, each added to its input. Source: ViPRA (arXiv 2511.07732; sroutray/vipra@d5d8c0d, laq/model/attention.py).
"""
# Shape letters: B batch, T frames, N tokens of a frame, E tokens behind the grid, D width, H heads, K width of a head.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.depthwise import depthwise_conv3d
from headrace.nn.shapes import expect_shape

ROPE_BASE = 10_000.0
LOGIT_SCALE = 8.0


@dataclass(frozen=True, kw_only=True)
class SpatiotemporalConfig:
    """Shape of a stack of blocks.

    Attributes:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        head_width: Width of a head, even; heads * head_width need not be `width`.
        causal: Whether a frame sees only itself and earlier frames.
        conditioned: Whether every block is modulated by one vector per frame.
        dropout: Of the gated network's hidden layer.
    """

    width: int = 768
    depth: int = 6
    heads: int = 16
    head_width: int = 64
    causal: bool = False
    conditioned: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.head_width) < 1:
            raise ValueError(f"width, depth, heads and head_width must be at least 1, got {self}")
        if self.head_width % 2:
            raise ValueError(f"head_width must be even for the rotation over time, got {self.head_width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class PositionBias(nn.Module):
    """A bias on attention logits for each head, computed from the offset between two cells of a grid.

    Offsets between cell centres, with the grid's sides scaled to 1, go through sign(x) * log(1 + |x|) and a network of
    three layers, so that any grid size may follow. Source: Swin V2 (arXiv 2111.09883, sec. 3.3).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.1), nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Linear(width, heads)
        )

    def forward(self, rows: int, columns: int) -> Tensor:
        """Bias of shape (H, N, N), N being rows * columns in row-major order; first index the query, then the key."""
        device = next(self.parameters()).device
        # Distinct offsets are far fewer than pairs, so the network sees each of them once.
        down, right = torch.arange(1 - rows, rows, device=device), torch.arange(1 - columns, columns, device=device)
        offsets = torch.stack(torch.meshgrid(down / rows, right / columns, indexing="ij"), -1).flatten(0, 1)
        table = self.net(offsets.sign() * offsets.abs().log1p())
        cell = torch.arange(rows * columns, device=device)
        place = torch.stack((cell // columns, cell % columns), -1)
        step = place[:, None] - place[None] + torch.tensor([rows - 1, columns - 1], device=device)
        return table[step[..., 0] * (2 * columns - 1) + step[..., 1]].permute(2, 0, 1)


class PositionConvolution(nn.Module):
    """Depthwise 3 x 3 x 3 convolution over (time, row, column), which tells tokens where they are.

    Source: conditional positional encodings (arXiv 2102.10882), with a causal variant that pads time on the left.
    """

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.convolution = nn.Conv3d(width, width, 3, groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What to add to tokens of shape (B, T, rows * columns, D); same shape."""
        batch, frames, count, width = x.shape
        video = x.reshape(batch, frames, *grid, width).permute(0, 4, 1, 2, 3)
        video = F.pad(video, (1, 1, 1, 1, 2, 0) if self.causal else (1, 1, 1, 1, 1, 1))
        moved = depthwise_conv3d(video, self.convolution.weight, self.convolution.get_parameter("bias"))
        return moved.permute(0, 2, 3, 4, 1).reshape(batch, frames, count, width)


class CosineAttention(nn.Module):
    """Attention on the angle between queries and keys; only the queries' input is normalised.

    Queries and keys are brought to length 1, then scaled per channel; the logits are 8 times their product.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key_value = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(head_width))
        self.key_scale = nn.Parameter(torch.ones(head_width))
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, *, logit_bias: Tensor | None = None, rotate: bool = False) -> Tensor:
        """Attend among the tokens of each row.

        Args:
            x: Shape (B, N, D).
            logit_bias: Added to the logits, broadcastable to (B, H, N, N); a large negative number hides a key.
            rotate: Whether queries and keys are rotated by their place in the sequence.

        Returns:
            Shape (B, N, D), to be added to `x`.
        """
        parts = (self.query(self.norm(x)), *self.key_value(x).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if rotate:
            q, k = rotate_by_place(q), rotate_by_place(k)
        q = F.normalize(q, dim=-1) * self.query_scale
        k = F.normalize(k, dim=-1) * self.key_scale
        bias = None if logit_bias is None else logit_bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias, scale=LOGIT_SCALE)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate_by_place(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... along the next-to-last dimension; channel i pairs with channel i + K/2.

    Source: RoFormer (arXiv 2104.09864), the half-split pairing.
    """
    length, width = x.shape[-2:]
    half = width // 2
    rates = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class GatedNetwork(nn.Module):
    """Norm, then a value times the GELU of a gate, then back to the width; hidden layer of 8/3 of the width."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        inner = int(4 * (2 / 3) * width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.inp = nn.Linear(width, 2 * inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., D), without the residual."""
        value, gate = self.inp(self.norm(x)).chunk(2, dim=-1)
        return self.out(self.dropout(F.gelu(gate) * value))


class FrameModulation(nn.Module):
    """FiLM: a network on normalised tokens whose scale and shift one vector per frame decides; starts unmodulated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.scale_shift = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """What to add to tokens (B, T, N, D) given conditions (B, T, D); same shape."""
        scale, shift = self.scale_shift(condition)[:, :, None].chunk(2, dim=-1)
        return self.network(self.norm(x) * (1 + scale) + shift)


class SpatiotemporalBlock(nn.Module):
    """One block; see the head of the file for the order of its parts."""

    def __init__(self, config: SpatiotemporalConfig) -> None:
        super().__init__()
        self.film = FrameModulation(config.width) if config.conditioned else None
        self.position = PositionConvolution(config.width, causal=config.causal)
        self.temporal = CosineAttention(config.width, config.heads, config.head_width)
        self.spatial = CosineAttention(config.width, config.heads, config.head_width)
        self.network = GatedNetwork(config.width, dropout=config.dropout)

    def forward(
        self, x: Tensor, grid: tuple[int, int], over_time: Tensor | None, over_space: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Tokens (B, T, N, D) to (B, T, N, D); the biases are those of the two attentions."""
        batch, _, count, _ = x.shape
        cells = grid[0] * grid[1]
        if self.film is not None and condition is not None:
            x = x + self.film(x, condition)
        x = torch.cat((x[:, :, :cells] + self.position(x[:, :, :cells], grid), x[:, :, cells:]), 2)
        tracks = x.transpose(1, 2).flatten(0, 1)
        tracks = self.temporal(tracks, logit_bias=over_time, rotate=True)
        x = x + tracks.unflatten(0, (batch, count)).transpose(1, 2)
        x = x + self.spatial(x.flatten(0, 1), logit_bias=over_space).unflatten(0, (batch, -1))
        return x + self.network(x)


class SpatiotemporalStack(nn.Module):
    """Blocks that share one position bias, and a norm at the end."""

    def __init__(self, config: SpatiotemporalConfig) -> None:
        super().__init__()
        self.config = config
        self.position_bias = PositionBias(config.width, config.heads)
        self.blocks = nn.ModuleList(SpatiotemporalBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        *,
        condition: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks.

        Args:
            x: Tokens, shape (B, T, N, D): the grid's cells row-major, then any tokens without a place in it.
            grid: Rows and columns.
            condition: One vector per frame, shape (B, T, D); wanted exactly when the stack is conditioned.
            frame_mask: Shape (B, T), False hides a frame from the attention over time.

        Returns:
            Shape (B, T, N, D).

        Raises:
            ValueError: Shapes do not fit, or a condition is missing or not wanted.
        """
        expect_shape("x", x, (None, None, None, self.config.width))
        batch, frames, count, _ = x.shape
        extra = count - grid[0] * grid[1]
        if extra < 0:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} needs at least {grid[0] * grid[1]} tokens, got {count}")
        if (condition is not None) != self.config.conditioned:
            wanted = "needs" if self.config.conditioned else "takes no"
            raise ValueError(f"this stack {wanted} condition of shape (B, T, D)")
        if condition is not None:
            expect_shape("condition", condition, (batch, frames, self.config.width))
        over_space = F.pad(self.position_bias(*grid), (0, extra, 0, extra))
        over_time = self._time_bias(x, frame_mask)
        for block in self.blocks:
            x = block(x, grid, over_time, over_space, condition)
        return self.norm(x)

    def _time_bias(self, x: Tensor, frame_mask: Tensor | None) -> Tensor | None:
        batch, frames, count, _ = x.shape
        hidden = torch.finfo(torch.float32).min / 4
        bias = None
        if self.config.causal:
            bias = torch.full((frames, frames), hidden, device=x.device).triu(1)[None, None]
        if frame_mask is not None:
            expect_shape("frame_mask", frame_mask, (batch, frames))
            absent = torch.zeros_like(frame_mask, dtype=torch.float32).masked_fill(~frame_mask, hidden)
            absent = absent.repeat_interleave(count, 0)[:, None, None]
            bias = absent if bias is None else bias + absent
        return bias
