"""A diffusion transformer over a sequence of tokens: adaptive layer norm from time and a class, no cross-attention.

Source: DiT (arXiv 2212.09748, facebookresearch/DiT, models.py); the sequence form is FlowTok's (arXiv 2503.10772).
"""

# Shape letters in this file: B batch, K tokens, D channels of a token, W width.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.grid_positions import sincos_1d
from headrace.nn.shapes import expect_shape
from headrace.nn.time_embedding import TimeEmbedding


@dataclass(frozen=True, kw_only=True)
class SequenceDiTConfig:
    """Sizes of the network.

    Attributes:
        tokens: K.
        channels: D.
        width: W.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over W.
        classes: Rows of the class table added to the time embedding; FlowTok uses 2, matched and unmatched target.
        time_scale: Factor on the time before its sinusoids. The released FlowTok feeds raw t in [0, 1], where the
            features barely move; 1000 learns better in small nets.
    """

    tokens: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    classes: int = 2
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("tokens", "channels", "width", "depth", "heads", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be even and divisible by heads {self.heads}")
        if self.time_scale <= 0:
            raise ValueError(f"time_scale must be positive, got {self.time_scale}")


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` with one shift and scale per row of the batch: (B, K, W), (B, W), (B, W)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition; an identity at initialisation."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(active).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SequenceDiT(nn.Module):
    """Velocity of a token sequence at time t under a class."""

    def __init__(self, config: SequenceDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_in = nn.Linear(config.channels, config.width)
        self.register_buffer("positions", sincos_1d(torch.arange(config.tokens), config.width)[None], persistent=False)
        self.time_embed = TimeEmbedding(config.width, scale=config.time_scale)
        self.class_table = nn.Embedding(config.classes, config.width)
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.out_norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.out_modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.channels)
        self.initialise()

    def initialise(self) -> None:
        """Xavier weights, zero biases; modulations and output zero; time network and class table N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.time_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.class_table.weight, std=0.02)
        gates = [block.modulation for block in self.blocks if isinstance(block, DiTBlock)]
        for layer in (*gates, self.out_modulation, self.out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Velocity.

        Args:
            x: State, (B, K, D).
            t: Times in [0, 1], (B,).
            label: Row of the class table, int64 or bool, (B,).

        Returns:
            (B, K, D).

        Raises:
            ValueError: A shape differs.
        """
        expect_shape("x", x, (None, self.config.tokens, self.config.channels))
        expect_shape("t", t, x.shape[:1])
        expect_shape("label", label, x.shape[:1])
        active = F.silu(self.time_embed(t) + self.class_table(label.long()))
        h = self.token_in(x) + self.positions
        for block in self.blocks:
            h = block(h, active)
        shift, scale = self.out_modulation(active).chunk(2, dim=-1)
        return self.out(modulate(self.out_norm(h), shift, scale))
