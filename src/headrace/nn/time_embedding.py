"""Time in [0, 1] as a vector: fixed sinusoids, then a two-layer network."""

import math

import torch
from torch import Tensor, nn


def sinusoid_features(t: Tensor, width: int, *, scale: float = 1.0, max_period: float = 10_000.0) -> Tensor:
    r"""Cosines, then sines, of `scale * t` at geometrically spaced frequencies, in float32.

    :math:`\omega_i = P^{-i/(w/2)}`: the first feature pair turns once per :math:`2\pi`, the last hardly moves.

    Args:
        t: Times, shape (B,).
        width: Number of features, even.
        scale: Factor on `t`. UniFlow uses 1000; FlowTok's released nets use 1, where the features barely move.
        max_period: P above.

    Returns:
        Shape (B, width).

    Raises:
        ValueError: `width` is odd or `t` is not one-dimensional.

    Source: DiT (facebookresearch/DiT, models.py), taken over by MAR, UniFlow and FlowTok.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and at least 2, got {width}")
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}")
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = scale * t.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of `scale * t`, then Linear, SiLU, Linear to `width`."""

    def __init__(self, width: int, *, features: int = 256, scale: float = 1.0) -> None:
        super().__init__()
        self.features, self.scale = features, scale
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to vectors (B, width)."""
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(sinusoid_features(t, self.features, scale=self.scale).to(weight.dtype))
