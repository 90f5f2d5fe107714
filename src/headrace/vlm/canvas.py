"""Pictures at their natural size on a square canvas: a letter has the same pixels wherever it stands."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from headrace.tokenizers.base import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Canvas(Preprocessing):
    """As `Preprocessing`, but a picture is pasted into the middle of a canvas of the mean colour.

    A picture that is larger than the canvas is shrunk until it fits, its aspect kept; a smaller one is not enlarged.
    """

    def _resize(self, picture: Image.Image) -> Image.Image:
        canvas = Image.new("RGB", (self.size, self.size), tuple(round(255 * m) for m in self.mean))
        fitted = shrink_to_fit(picture, self.size)
        canvas.paste(fitted, ((self.size - fitted.width) // 2, (self.size - fitted.height) // 2))
        return canvas

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where a picture of this size [px] lies: left, top, right, bottom as shares of the canvas."""
        scale = min(1.0, self.size / width, self.size / height)
        wide, high = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (self.size - wide) // 2, (self.size - high) // 2
        x0, y0, x1, y1 = np.array([left, top, left + wide, top + high]) / self.size
        return float(x0), float(y0), float(x1), float(y1)


def shrink_to_fit(picture: Image.Image, size: int) -> Image.Image:
    """The picture, no side longer than `size` [px], aspect kept."""
    scale = min(1.0, size / picture.width, size / picture.height)
    if scale == 1.0:
        return picture
    sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(sides, Image.Resampling.LANCZOS)
