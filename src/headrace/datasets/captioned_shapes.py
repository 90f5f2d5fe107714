"""Rendered shapes with captions: colour, shape and place, on a faint textured ground. Made on the fly, no files."""

# Shape letters in this file: B batch, S side in pixels.

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.1, 0.65, 0.2), "blue": (0.15, 0.3, 0.85)}
SHAPES = ("square", "circle", "triangle")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
CAPTIONS = tuple(" ".join(words) for words in itertools.product(COLOURS, SHAPES, ROWS, COLUMNS))
EDGE = 1.0  # width of the soft edge [px]


class Captioned(NamedTuple):
    """Pictures (B, 3, S, S), float32 in [0, 1], and the index of each one's caption in `CAPTIONS`, int64 (B,)."""

    images: Tensor
    label: Tensor


class CaptionedShapes:
    """One shape per picture, anywhere in its quarter, in any size, shade and on any ground; 36 captions.

    Picture i depends on (seed, i) only, so two seeds are two disjoint sets.

    Args:
        size: Side S [px], at least 16.
        count: Pictures in the set; captions cycle evenly.
        seed: Of everything that the caption does not say.
    """

    captions = CAPTIONS

    def __init__(self, *, size: int, count: int, seed: int = 0) -> None:
        if size < 16 or count < 1:
            raise ValueError(f"size must be at least 16 px and count at least 1, got size={size}, count={count}")
        self.size, self.count, self.seed = size, count, seed

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Captioned:
        """Pictures of these indices."""
        labels = np.asarray(indices, dtype=np.int64) % len(CAPTIONS)
        pictures = np.stack([self._picture(int(i), int(label)) for i, label in zip(indices, labels, strict=True)])
        return Captioned(torch.from_numpy(pictures), torch.from_numpy(labels))

    def _picture(self, index: int, label: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index))
        colour, shape, row, column = CAPTIONS[label].split()
        size = self.size
        reach = size * rng.uniform(0.14, 0.2)
        centre = [size * (0.25 + 0.5 * side) + rng.uniform(-0.05, 0.05) * size for side in
                  (ROWS.index(row), COLUMNS.index(column))]  # fmt: skip
        y, x = np.mgrid[:size, :size] + 0.5
        outside = _distance(shape, y - centre[0], x - centre[1], reach)
        alpha = np.clip(0.5 - outside / EDGE, 0, 1)[None]
        tint = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.08, 0.08, 3), 0, 1)[:, None, None]
        slope = rng.uniform(-0.15, 0.15, (3, 2))[:, :, None, None]
        ground = rng.uniform(0.6, 0.85, (3, 1, 1)) + slope[:, 0] * (y / size - 0.5) + slope[:, 1] * (x / size - 0.5)
        ground = ground + 0.02 * rng.standard_normal((1, size, size))
        return np.clip(alpha * tint + (1 - alpha) * ground, 0, 1).astype(np.float32)


def _distance(shape: str, y: np.ndarray, x: np.ndarray, reach: float) -> np.ndarray:
    """About the signed distance to a shape's edge [px], negative inside."""
    if shape == "circle":
        return np.hypot(y, x) - reach
    if shape == "square":
        return np.maximum(abs(y), abs(x)) - 0.9 * reach
    slanted = (2 * abs(x) - (y + reach)) / np.sqrt(5)
    return np.maximum(slanted, y - reach)
