"""Square crops of the photographs that scikit-image ships; training and held-out crops come from different pictures."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Files inside the package itself; nothing is fetched.
TRAINING = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png")


class PictureCrops:
    """Random crops, scaled to one size. Crop i depends on (seed, i) only.

    Args:
        size: Side of a crop [px].
        count: Crops in the set.
        part: `training` or `held_out` pictures.
        seed: Of picture, place, scale and mirroring.
        zoom: Crops are taken at `size` to `zoom * size` px and scaled down.

    Raises:
        ModuleNotFoundError: scikit-image is missing; names the extra.
        ValueError: Sizes that make no sense.
    """

    def __init__(
        self,
        *,
        size: int,
        count: int,
        part: Literal["training", "held_out"] = "training",
        seed: int = 0,
        zoom: float = 3.0,
    ) -> None:
        if size < 1 or count < 1 or zoom < 1:
            raise ValueError(f"size and count must be at least 1 and zoom too, got {size}, {count}, {zoom}")
        if part not in ("training", "held_out"):
            raise ValueError(f"part must be 'training' or 'held_out', got {part!r}")
        self.size, self.count, self.seed, self.zoom = size, count, seed, zoom
        folder = _folder()
        names = TRAINING if part == "training" else HELD_OUT
        self.pictures = [Image.open(folder / name).convert("RGB") for name in names]

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Tensor:
        """Crops of these indices, float32 (B, 3, size, size) in [0, 1]."""
        crops = np.stack([self._crop(int(i)) for i in indices])
        return torch.from_numpy(crops).permute(0, 3, 1, 2).float().div(255).contiguous()

    def _crop(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index))
        picture = self.pictures[int(rng.integers(len(self.pictures)))]
        side = min(int(self.size * rng.uniform(1.0, self.zoom)), *picture.size)
        left, top = (int(rng.integers(span - side + 1)) for span in picture.size)
        box = (left, top, left + side, top + side)
        crop = np.asarray(picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=None))
        return crop[:, ::-1] if rng.random() < 0.5 else crop


def _folder() -> Path:
    try:
        import skimage.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("picture crops come with scikit-image: install headrace[offline]") from error
    return Path(str(skimage.data.__file__)).parent
