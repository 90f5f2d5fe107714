"""Action tokens for a flow-matching policy: noisy actions and time in, velocities out.

Source: ViPRA (arXiv 2511.07732; sroutray/vipra@d5d8c0d): ActionEncoder and flow decoder. t=0 is noise, t=1 is data.
"""
# Shape letters: B batch, H horizon, A action dimension, D width.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headrace.flow.blockwise import require_segments, sample_blockwise
from headrace.flow.solver import SolverSettings, uniform_grid
from headrace.flow.time import beta_time, segment_time, uniform_time
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity
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
        segments: Equal segments of time with a stack of blocks each in place of the one linear head (BFM); 1 is ViPRA.
        features: In sampling with segments, hidden states anew at every step (`full`), or the backbone only once a
            segment (`hold`).
    """

    width: int = 4096
    action_dim: int = 7
    horizon: int = 14
    sigma_min: float = 0.001
    time_features: Literal["openpi", "paper"] = "openpi"
    segments: int = 1
    features: Literal["full", "hold"] = "full"

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.action_dim < 1:
            raise ValueError(f"horizon and action_dim must be at least 1, got {self.horizon} and {self.action_dim}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {self.width}")
        if self.time_features not in PERIODS:
            raise ValueError(f"unknown time_features {self.time_features!r} (known: {', '.join(PERIODS)})")
        if self.segments < 1:
            raise ValueError(f"segments must be at least 1, got {self.segments}")
        if self.features not in ("full", "hold") or (self.features == "hold" and self.segments == 1):
            raise ValueError(f"features is 'full', or 'hold' with several segments, got {self.features!r}")

    @property
    def borders(self) -> tuple[float, ...]:
        """Times at which segments begin and end, from 0 to 1."""
        return uniform_grid(self.segments)

    @property
    def stacks(self) -> BlockwiseConfig:
        """One block of attention among the actions for each segment; the backbone's hidden states condition it."""
        width = min(self.width, 256)
        return BlockwiseConfig(channels=self.action_dim, width=width, heads=1 if width % 32 else width // 32,
                               grid=(1, self.horizon), trunk_depth=0, velocity_depth=1, residual_depth=0,
                               borders=self.borders, condition_dim=self.width, modulation_rank=max(1, width // 8),
                               align_dim=0)  # fmt: skip


class ActionDecoder(nn.Module):
    """Embeds noisy actions as tokens and reads velocities off the backbone's hidden states at the same positions."""

    def __init__(self, config: ActionDecoderConfig) -> None:
        super().__init__()
        self.config = config
        half = config.width // 2
        self.action_in = nn.Linear(config.action_dim, half)
        self.mix = nn.Linear(2 * half, config.width)
        self.out = nn.Linear(config.width, config.width)
        if config.segments == 1:
            self.velocity_out = nn.Linear(config.width, config.action_dim)
        else:
            self.stacks = BlockwiseVelocity(config.stacks)

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

    def velocity(self, hidden: Tensor, noisy: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Velocities in float32, shape (B, H, A).

        Args:
            hidden: Hidden states at the action positions, shape (B, H, D).
            noisy, t: What `embed` got; needed with several segments, where each row goes through its time's stack.
        """
        if self.config.segments == 1:
            return self.velocity_out(hidden).float()
        if noisy is None or t is None:
            raise ValueError("with several segments the velocity also depends on the noisy actions and the time")
        return self.stacks(noisy, t, hidden).float()

    def draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Training times, shape (count,): ViPRA's Beta, or with segments even draws in each, in random order.

        Fewer draws than segments cannot be split evenly: each is then uniform over all of them, the same law.
        """
        if self.config.segments == 1:
            return beta_time(count, generator=generator, device=device)
        if count < self.config.segments:
            return uniform_time(count, generator=generator, device=device)
        times = segment_time(count, self.config.borders, generator=generator, device=device).t
        return times[torch.randperm(count, generator=generator, device=device)]

    def require(self, solver: SolverSettings) -> None:
        """Refuse a solver that does not visit every segment, or that is not Euler where features are held.

        Raises:
            ValueError: Says how many steps, or which method, it takes.
        """
        if self.config.segments > 1:
            require_segments(solver, self.config.borders, self.config.features)


@dataclass(frozen=True)
class BoundActions:
    """The decoder with its trunk filled in: a velocity, and what `headrace.flow.blockwise` samples.

    Attributes:
        decoder: The decoder.
        read: Tokens (B, H, D) to hidden states (B, H, D): the backbone, given a prefix.
    """

    decoder: ActionDecoder
    read: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocities, shape (B, H, A), at noisy actions of that shape and times (B,)."""
        return self.decoder.velocity(self.features(x, t), x, t)

    @property
    def borders(self) -> tuple[float, ...]:
        """The decoder's segment borders."""
        return self.decoder.config.borders

    def at(self, t: Tensor) -> Tensor:
        """The times themselves."""
        return t

    def features(self, x: Tensor, moment: Tensor) -> Tensor:
        """Hidden states, shape (B, H, D), at noisy actions and times."""
        return self.read(self.decoder.embed(x, moment))

    def velocity(self, x: Tensor, moment: Tensor, features: Tensor, segment: int) -> Tensor:
        """Velocities in float32, shape (B, H, A), by one segment's stack."""
        stacks = self.decoder.stacks
        inner = stacks.embed(moment, features)
        return stacks.velocity(x, inner, stacks.features(x, inner), segment).float()

    def sample(self, noise: Tensor, solver: SolverSettings) -> Tensor:
        """Normalised actions, shape (B, H, A), from noise of that shape; raises ValueError as `require_segments`."""
        config = self.decoder.config
        if config.segments == 1:
            return solver.sample(self, noise)
        return sample_blockwise(self, noise, solver, borders=config.borders, mode=config.features)


def time_in_paper_order(mix: Tensor) -> Tensor:
    """Columns of the official second linear map in our order, shape (D, D): theirs are sines, cosines, actions."""
    quarter = mix.shape[1] // 4
    sines, cosines, action = mix.split((quarter, quarter, 2 * quarter), 1)
    return torch.cat((cosines, sines, action), 1)
