"""Latents for flow matching: drawn from an autoencoder's moments, scaled to unit spread, and back.

Source: Flow Matching in Latent Space, arXiv 2307.08698; VinAIResearch/LFM@4d8e43d (facts only).
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


def draw_latent(
    mean: Tensor, log_variance: Tensor, *, sample: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """A latent from stored moments: drawn anew each time for training, the mean where determinism matters.

    Args:
        mean: Shape (B, C, ...).
        log_variance: Same shape; clamped to [-30, 20] as diffusers does.
        sample: False gives the mean.
        generator: Randomness.

    Raises:
        ValueError: Shapes differ.
    """
    if mean.shape != log_variance.shape:
        raise ValueError(f"both moments must have one shape, got {tuple(mean.shape)} and {tuple(log_variance.shape)}")
    if not sample:
        return mean
    draw = torch.empty_like(mean).normal_(generator=generator)
    return mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * draw


@dataclass(frozen=True, kw_only=True)
class LatentScaler:
    """Shift and scale per channel, so that latents have mean 0 and spread 1 as the noise has.

    Attributes:
        mean: Per channel, or one number for all.
        std: Per channel or one number, above 0. Stable Diffusion's factor 0.18215 is `mean=(0,), std=(1/0.18215,)`.
        axis: Where the channels are: 1 for pictures (B, C, H, W), -1 for tokens (B, N, C).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    axis: int = 1

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError(f"mean and std need one number per channel, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {min(self.std)}")

    @classmethod
    def fit(cls, latents: Tensor, *, axis: int = 1, per_channel: bool = True) -> Self:
        """Measure latents.

        Args:
            latents: Shape (B, C, ...) or, with `axis=-1`, (B, ..., C).
            axis: Where the channels are.
            per_channel: False gives one mean and one std for all channels, which keeps their proportions.

        Raises:
            ValueError: A channel never varies, or fewer than two latents.
        """
        flat = latents.double().movedim(axis, 0).flatten(1)
        flat = flat if per_channel else flat.reshape(1, -1)
        if flat.shape[1] < 2 or not bool((flat.std(1) > 0).all()):
            raise ValueError("a channel does not vary over these latents: give more of them, or per_channel=False")
        return cls(mean=tuple(flat.mean(1).tolist()), std=tuple(flat.std(1).tolist()), axis=axis)

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = [1] * like.ndim
        shape[self.axis] = len(self.std)
        if len(self.std) not in (1, like.shape[self.axis]):
            raise ValueError(f"this scaler has {len(self.std)} channels, the latents {like.shape[self.axis]}")
        return torch.tensor(self.mean).reshape(shape).to(like), torch.tensor(self.std).reshape(shape).to(like)

    def scale(self, latents: Tensor) -> Tensor:
        """Latents as the flow sees them."""
        mean, std = self._parts(latents)
        return (latents - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them."""
        mean, std = self._parts(latents)
        return latents * std + mean

    def to_json(self) -> str:
        """JSON; `from_json` reads it back."""
        return json.dumps({"mean": self.mean, "std": self.std, "axis": self.axis})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: Not such an object.
        """
        data: Any = json.loads(text)
        if not isinstance(data, dict) or set(data) != {"mean", "std", "axis"}:
            raise ValueError(f"a latent scaler is an object with mean, std and axis, got {text[:80]}")
        return cls(mean=tuple(data["mean"]), std=tuple(data["std"]), axis=data["axis"])
