"""A transformer block that is shifted, scaled and gated from outside, token by token, at low rank.

Source: adaptive layer norm of DiT, arXiv 2212.09748; low rank, per token: mlvlab/Blockwise-Flow-Matching@5e7ae87.
"""

# Shape letters in this file: B batch, N tokens, W width.

import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.axial_rope import rotate_pairs


class ModulatedBlock(nn.Module):
    """Attention (unless mixing is none) and an MLP, modulated from outside; an identity at initialisation."""

    def __init__(
        self, *, width: int, heads: int, mlp_ratio: float, rank: int, condition_width: int, attends: bool
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads, self.attends = heads, attends
        self.parts = 6 if self.attends else 3
        self.reduce = nn.Linear(condition_width, rank, bias=False)
        self.expand = nn.Linear(rank, self.parts * width)
        if self.attends:
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        for layer in (self.expand.weight, self.expand.bias):
            nn.init.zeros_(layer)

    def forward(self, x: Tensor, active: Tensor, shared: Tensor, angles: Tensor) -> Tensor:
        """Tokens after the block.

        Args:
            x: Tokens, shape (B, N, W).
            active: Condition after its SiLU, shape (B, N or 1, condition_width).
            shared: The part of the modulation that all blocks share, shape (B, N or 1, parts * W).
            angles: Rotary angles of the tokens, shape (N, W / heads); unused without attention.

        Returns:
            Shape (B, N, W).
        """
        parts = (shared + self.expand(self.reduce(active))).chunk(self.parts, dim=-1)
        if self.attends:
            x = x + parts[5] * self._attend(F.layer_norm(x, x.shape[-1:]) * (1 + parts[4]) + parts[3], angles)
        return x + parts[2] * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + parts[1]) + parts[0])

    def _attend(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        q, k = rotate_pairs(self.q_norm(q), cos, sin), rotate_pairs(self.k_norm(k), cos, sin)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
