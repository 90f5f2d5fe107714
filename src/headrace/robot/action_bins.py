"""Actions as ids: one bin per number, cut at quantiles of the training data.

Source: ViPRA-AR (arXiv 2511.07732; sroutray/vipra@d5d8c0d): pandas qcut with 2047 bins per dimension, duplicate edges
dropped, the gripper binary.
"""
# Shape letters: B batch, H steps, A action dimension.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from headrace.nn.shapes import expect_shape


@dataclass(frozen=True, kw_only=True)
class ActionBinsConfig:
    """The bins of every dimension, as numbers that live in a model's config.json.

    Attributes:
        edges: Per dimension its bins' edges, rising, one more than bins; a dimension with two values has three.
        values: Per dimension what each bin stands for: the mean of the training data in it.
    """

    edges: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.edges or len(self.edges) != len(self.values):
            raise ValueError("edges and values need the same number of dimensions, at least one")
        for number, (edges, values) in enumerate(zip(self.edges, self.values, strict=True)):
            if len(edges) != len(values) + 1 or len(values) < 1:
                raise ValueError(f"dimension {number} has {len(edges)} edges for {len(values)} bins")
            if not np.isfinite([*edges, *values]).all() or (np.diff(edges) <= 0).any():
                raise ValueError(f"dimension {number}: edges must be finite and rise")

    @property
    def dim(self) -> int:
        """Number of dimensions A."""
        return len(self.edges)

    @property
    def bins(self) -> int:
        """The largest number of bins of a dimension; ids of all dimensions share one vocabulary of this size."""
        return max(len(values) for values in self.values)

    @classmethod
    def from_actions(
        cls, actions: np.ndarray, *, bins: int = 2047, binary: Sequence[bool] | None = None
    ) -> "ActionBinsConfig":
        """Quantile bins of training data.

        Args:
            actions: Raw actions, shape (N, A).
            bins: Wanted per dimension; equal quantiles are one bin, so a dimension that rests a lot has fewer.
            binary: True for dimensions with two states, such as a gripper, cut in the middle between the smallest and
                the largest value, shape (A,).

        Raises:
            ValueError: No rows, numbers that are not finite, or fewer than one bin.
        """
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or not len(actions) or not np.isfinite(actions).all():
            raise ValueError(f"bins need finite actions of shape (N, A) with N at least 1, got {actions.shape}")
        if bins < 1:
            raise ValueError(f"at least one bin is needed, got {bins}")
        two = [False] * actions.shape[1] if binary is None else list(binary)
        pairs = [
            _halves(column) if half else _quantiles(column, bins) for column, half in zip(actions.T, two, strict=True)
        ]
        return cls(edges=tuple(pair[0] for pair in pairs), values=tuple(pair[1] for pair in pairs))


def _quantiles(column: np.ndarray, bins: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    edges = np.unique(np.quantile(column, np.linspace(0, 1, bins + 1)))
    if len(edges) == 1:
        edges = np.array([edges[0] - 0.5, edges[0] + 0.5])
    return _means(column, edges)


def _halves(column: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    low, high = column.min(), column.max()
    if low == high:
        return _quantiles(column, 1)
    return _means(column, np.array([low, (low + high) / 2, high]))


def _means(column: np.ndarray, edges: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    place = np.searchsorted(edges[1:-1], column, side="left")
    count = np.bincount(place, minlength=len(edges) - 1)
    total = np.bincount(place, weights=column, minlength=len(edges) - 1)
    middle = (edges[1:] + edges[:-1]) / 2
    means = np.where(count > 0, total / np.maximum(count, 1), middle)
    return tuple(map(float, edges)), tuple(map(float, means))


class ActionBins(nn.Module):
    """Actions to ids and back. The config holds all, the state dict nothing."""

    values: Tensor
    allowed: Tensor

    def __init__(self, config: ActionBinsConfig) -> None:
        super().__init__()
        self.config = config
        inner = [torch.tensor(edges[1:-1], dtype=torch.float32) for edges in config.edges]
        for number, edges in enumerate(inner):
            self.register_buffer(f"edges_{number}", edges, persistent=False)
        values = torch.zeros(config.dim, config.bins)
        for number, row in enumerate(config.values):
            values[number, : len(row)] = torch.tensor(row)
        self.register_buffer("values", values, persistent=False)
        counts = torch.tensor([len(row) for row in config.values])
        self.register_buffer("allowed", torch.arange(config.bins) < counts[:, None], persistent=False)

    def encode(self, actions: Tensor) -> Tensor:
        """Raw actions (..., A) to ids, int64 (..., A); values outside the training data fall into the end bins."""
        expect_shape("actions", actions.reshape(-1, actions.shape[-1]), (None, self.config.dim))
        columns = [
            torch.searchsorted(getattr(self, f"edges_{number}"), column.float().contiguous())
            for number, column in enumerate(actions.unbind(-1))
        ]
        return torch.stack(columns, -1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (..., A) to raw actions, float32 (..., A).

        Raises:
            ValueError: An id that its dimension does not have.
        """
        allowed = self.allowed.expand(*ids.shape, -1).gather(-1, ids[..., None].clamp(0, self.config.bins - 1))
        if bool((ids < 0).any() | (ids >= self.config.bins).any()) or not bool(allowed.all()):
            raise ValueError(f"ids lie outside their dimension's bins (at most {self.config.bins})")
        return self.values.expand(*ids.shape, -1).gather(-1, ids[..., None])[..., 0]
