"""Action tokens for a flow-matching policy: noisy actions and time in, velocities out.

Source: ViPRA (arXiv 2511.07732; sroutray/vipra@d5d8c0d): ActionEncoder and flow decoder. t=0 is noise, t=1 is data.
"""
# Shape letters: B batch, H horizon, A action dimension, D width.

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headrace.nn.shapes import expect_shape
from headrace.nn.time_embedding import sinusoid_features

# Time features for t in [0, 1]: openpi's periods 0.004 .. 4 use every channel; the paper's raw sinusoid of t with
# periods up to 10,000 leaves most of them constant. `paper` is there for parity.
PERIODS: dict[str, tuple[float, float]] = {"openpi": (2 * math.pi / 4e-3, 1000.0), "paper": (1.0, 10_000.0)}


@dataclass(frozen=True, kw_only=True)
class ActionDecoderConfig:
    """Shape of the action part.

    Attributes:
        width: Width of the backbone's tokens.
        action_dim: Numbers per action.
        horizon: Actions per chunk.
        sigma_min: Width left around the data at t=1.
        time_features: Frequencies of the time embedding, see `PERIODS`.
    """

    width: int = 4096
    action_dim: int = 7
    horizon: int = 14
    sigma_min: float = 0.001
    time_features: Literal["openpi", "paper"] = "openpi"

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.action_dim < 1:
            raise ValueError(f"horizon and action_dim must be at least 1, got {self.horizon} and {self.action_dim}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {self.width}")
        if self.time_features not in PERIODS:
            raise ValueError(f"unknown time_features {self.time_features!r} (known: {', '.join(PERIODS)})")


class ActionDecoder(nn.Module):
    """Embeds noisy actions as tokens and reads velocities off the backbone's hidden states at the same positions."""

    def __init__(self, config: ActionDecoderConfig) -> None:
        super().__init__()
        self.config = config
        half = config.width // 2
        self.action_in = nn.Linear(config.action_dim, half)
        self.mix = nn.Linear(2 * half, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.velocity_out = nn.Linear(config.width, config.action_dim)

    def embed(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Tokens of noisy actions.

        Args:
            noisy: Normalised noisy actions, shape (B, H, A).
            t: Times in [0, 1], shape (B,).

        Returns:
            Shape (B, H, D).
        """
        config = self.config
        expect_shape("noisy", noisy, (None, config.horizon, config.action_dim))
        expect_shape("t", t, (noisy.shape[0],))
        time = self.time(t)
        action = self.action_in(noisy)
        both = torch.cat((time[:, None].expand(-1, config.horizon, -1).to(action), action), -1)
        return self.out(nn.functional.silu(self.mix(both)))

    def time(self, t: Tensor) -> Tensor:
        """Cosines, then sines, of times (B,), shape (B, D / 2).

        The paper's last period is exactly the longest one; openpi's here ends one ratio before it.
        """
        features = self.config.width // 2
        scale, longest = PERIODS[self.config.time_features]
        if self.config.time_features == "paper":
            pairs = features // 2
            longest = longest ** (pairs / max(pairs - 1, 1))
        return sinusoid_features(t.float(), features, scale=scale, max_period=longest)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Velocities in float32, shape (B, H, A), from hidden states at the action positions, shape (B, H, D)."""
        return self.velocity_out(hidden).float()


def time_in_paper_order(mix: Tensor) -> Tensor:
    """Columns of the official second linear map in our order, shape (D, D): theirs are sines, cosines, actions."""
    quarter = mix.shape[1] // 4
    sines, cosines, action = mix.split((quarter, quarter, 2 * quarter), 1)
    return torch.cat((cosines, sines, action), 1)
