"""Pictures in other colours: turned hue, other saturation, a tint and another brightness, for training only."""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

TINT, BRIGHTNESS = 0.12, 0.2  # largest shift of a channel, largest change of the gain


class Pictures(Protocol):
    """Pictures by index, the same at every call."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Tensor:
        """float32, shape (B, 3, H, W) in [0, 1]."""


class Recoloured:
    """The same pictures under random colours. Picture i depends on (seed, i) only.

    A few photographs hold few colours, and grey ones none: a network that learns from them has no word for the colour
    of an orange cat. Brightness is kept to within a fifth; the grey axis is the axis of the turn, so grey stays grey
    before the tint.

    Args:
        pictures: Where pictures come from.
        seed: Of hue, saturation, tint and brightness.
        share: Share of the pictures that is changed, 0 to 1; the others come as they are.
    """

    def __init__(self, pictures: Pictures, *, seed: int, share: float = 0.8) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in 0..1, got {share}")
        self.pictures, self.seed, self.share = pictures, seed, share

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Pictures of these indices, float32 (B, 3, H, W) in [0, 1]."""
        images = self.pictures.batch(indices)
        mixed, shifts = zip(*(self._colours(int(i)) for i in indices), strict=True)
        return (torch.einsum("bij,bjhw->bihw", torch.stack(mixed), images) + torch.stack(shifts)).clamp(0, 1)

    def _colours(self, index: int) -> tuple[Tensor, Tensor]:
        """A matrix (3, 3) on the channels and what is added to them, (3, 1, 1)."""
        rng = np.random.default_rng((self.seed, index, 1))
        if rng.random() >= self.share:
            return torch.eye(3), torch.zeros(3, 1, 1)
        gain = 1 + BRIGHTNESS * rng.uniform(-1, 1)
        turn = gain * about_grey(rng.uniform(-math.pi, math.pi), rng.uniform(0.5, 1.5))
        tint = rng.uniform(-TINT, TINT, 3)
        return turn.float(), torch.from_numpy(tint - tint.mean()).float().view(3, 1, 1)


def about_grey(angle: float, saturation: float) -> Tensor:
    """Turn by `angle` [rad] about the axis where all channels are equal, and scale the distance from it; (3, 3)."""
    grey = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    across = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    return grey + saturation * (math.cos(angle) * (torch.eye(3, dtype=torch.float64) - grey) + math.sin(angle) * across)
