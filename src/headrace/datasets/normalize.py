"""Statistics of actions or states, and the affine map to the range that a network likes, kept inside the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Kind = Literal["mean_std", "quantile", "min_max", "identity"]
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Per-dimension statistics, each a tuple of D numbers in the data's own units; `count` rows went in."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Statistics":
        """Statistics of rows.

        Args:
            values: Shape (N, D), N at least 1.
            weights: How much each row counts, shape (N,), not negative; equal when None.

        Raises:
            ValueError: No rows, or a number that is not finite (names its row).
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or not len(values):
            raise ValueError(f"statistics need values of shape (N, D) with N at least 1, got {values.shape}")
        broken = ~np.isfinite(values).all(axis=1)
        if broken.any():
            raise ValueError(f"row {int(np.argmax(broken))} holds a number that is not finite: {values[broken][0]}")
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
        share = weights / weights.sum()
        mean = share @ values
        std = np.sqrt(share @ (values - mean) ** 2)
        low, high = (_weighted_quantile(values, share, q) for q in (0.01, 0.99))
        numbers = {"mean": mean, "std": std, "min": values.min(0), "max": values.max(0), "q01": low, "q99": high}
        return cls(count=len(values), **{name: tuple(map(float, value)) for name, value in numbers.items()})


def _weighted_quantile(values: np.ndarray, share: np.ndarray, q: float) -> np.ndarray:
    """Linear interpolation between the sorted rows; equals `np.quantile` for equal weights."""
    columns = []
    for column in values.T:
        order = np.argsort(column, kind="stable")
        before = np.cumsum(share[order]) - share[order]
        place = before / max(before[-1], np.finfo(float).tiny)
        columns.append(np.interp(q, place, column[order]))
    return np.array(columns)


@dataclass(frozen=True, kw_only=True)
class NormalizerConfig:
    """An affine map per dimension, as numbers that live in a model's config.json: normal = (raw - shift) / scale.

    Attributes:
        shift, scale: D numbers each; scale above 0. Where both are 0 and 1 a dimension passes unchanged.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shift) != len(self.scale) or not self.shift:
            raise ValueError(f"shift and scale need the same number of dimensions, got {self.shift} and {self.scale}")
        if not (np.isfinite(self.shift).all() and np.isfinite(self.scale).all() and min(self.scale) > 0):
            raise ValueError(f"shift must be finite and scale above 0, got {self.shift} and {self.scale}")

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return len(self.shift)

    @classmethod
    def identity(cls, dim: int) -> "NormalizerConfig":
        """Leaves `dim` dimensions as they are; for tests and unnormalised data."""
        return cls(shift=(0.0,) * dim, scale=(1.0,) * dim)

    @classmethod
    def from_statistics(
        cls, statistics: Statistics, kind: Kind = "mean_std", *, mask: Sequence[bool] | None = None
    ) -> "NormalizerConfig":
        """Map to mean 0 and deviation 1 (`mean_std`), or [min, max] or [q01, q99] to [-1, 1] (`min_max`, `quantile`).

        A dimension that hardly varies (spread below 1e-6) is only shifted, never blown up.

        Args:
            statistics: Of the training data.
            kind: Which map.
            mask: True for dimensions to map, shape (D,); False leaves one unchanged, such as a gripper in {-1, 1}.
        """
        dim = len(statistics.mean)
        if kind == "identity":
            return cls.identity(dim)
        if mask is not None and len(mask) != dim:
            raise ValueError(f"the mask needs {dim} entries, one per dimension, got {len(mask)}")
        if kind == "mean_std":
            shift, scale = np.array(statistics.mean), np.array(statistics.std)
        elif kind in ("min_max", "quantile"):
            ends = (statistics.min, statistics.max) if kind == "min_max" else (statistics.q01, statistics.q99)
            low, high = map(np.array, ends)
            shift, scale = (low + high) / 2, (high - low) / 2
        else:
            raise ValueError(f"normalisation is mean_std, quantile, min_max or identity, got {kind!r}")
        scale = np.where(scale < SMALLEST_SPREAD, 1.0, scale)
        kept = np.ones(dim, bool) if mask is None else np.array(mask, bool)
        shift, scale = np.where(kept, shift, 0.0), np.where(kept, scale, 1.0)
        return cls(shift=tuple(map(float, shift)), scale=tuple(map(float, scale)))


class Normalizer(nn.Module):
    """The map and its inverse on tensors; nothing is clipped. The config holds all, the state dict nothing."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: NormalizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("shift", torch.tensor(config.shift, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(config.scale, dtype=torch.float32), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """From the data's units to the network's range.

        Args:
            raw: Shape (..., D).

        Raises:
            ValueError: Another last size than D; names both.
        """
        self._check(raw)
        return (raw - self.shift) / self.scale

    def inverse(self, normal: Tensor) -> Tensor:
        """From the network's range back to the data's units; shape (..., D)."""
        self._check(normal)
        return normal * self.scale + self.shift

    def _check(self, values: Tensor) -> None:
        if values.shape[-1] != self.config.dim:
            raise ValueError(
                f"the normaliser was made for {self.config.dim} dimensions, got shape {tuple(values.shape)}"
            )
