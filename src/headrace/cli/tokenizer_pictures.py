"""Where `headrace tokenizer` commands take pictures from: a folder, or what packages ship and headrace renders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headrace.tokenizers.base import Preprocessing, to_rgb

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BUILT_IN = ("crops", "shapes", "mixed")
BUILT_IN_COUNT = 100_000
Part = Literal["training", "held_out"]


class Pictures(Protocol):
    """Model inputs by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Tensor:
        """Inputs in the tokenizer's range, shape (B, 3, size, size)."""


class FolderPictures:
    """The picture files of a folder. For training, crops of up to 1 / 0.8 of the size, mirrored half of the time.

    Number i is file i % F of F files at visit i // F, and each visit has its own crop.

    Args:
        folder: Searched with all folders in it.
        preprocessing: Of the tokenizer.
        part: `training` crops at random, `held_out` does not.
        seed: Of the crops.
        count: Files at most, spread evenly over the sorted names; None for all.
    """

    def __init__(
        self, folder: Path, preprocessing: Preprocessing, *, part: Part, seed: int, count: int | None = None
    ) -> None:
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
        if not self.files:
            raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
        if count is not None and count < len(self.files):
            self.files = [self.files[i * len(self.files) // count] for i in range(count)]
        self.preprocessing, self.part, self.seed = preprocessing, part, seed

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Inputs of these files; a file that cannot be read is named."""
        return self.preprocessing([self._read(int(i)) for i in indices])

    def _read(self, index: int) -> Image.Image:
        path = self.files[index % len(self.files)]
        try:
            with Image.open(path) as opened:
                picture = to_rgb(opened.copy())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if self.part == "held_out":
            return picture
        rng = np.random.default_rng((self.seed, index))
        side = max(1, int(min(picture.size) * rng.uniform(0.8, 1.0)))
        left, top = (int(rng.integers(span - side + 1)) for span in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


class BuiltInPictures:
    """Crops of scikit-image's photographs, rendered shapes, or both in turn; no files, no network."""

    def __init__(
        self, name: str, preprocessing: Preprocessing, *, part: Part, count: int, seed: int, recolour: float = 0.0
    ) -> None:
        from headrace.datasets.captioned_shapes import CaptionedShapes
        from headrace.datasets.picture_crops import PictureCrops
        from headrace.datasets.recoloured import Recoloured

        own = 2 * seed + (part == "held_out")
        self.name, self.count = name, count
        crops = PictureCrops(size=preprocessing.size, count=count, part=part, seed=own)
        self.crops: Pictures = Recoloured(crops, seed=own, share=recolour) if recolour else crops
        self.shapes = CaptionedShapes(size=preprocessing.size, count=count, seed=own)
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (preprocessing.mean, preprocessing.std))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Tensor:
        """Inputs of these indices; of `mixed`, even ones are crops."""
        kinds = {"crops": np.zeros_like(indices), "shapes": np.ones_like(indices), "mixed": indices % 2}[self.name]
        places = indices // 2 if self.name == "mixed" else indices
        out = torch.stack(
            [
                self.shapes.batch(places[i : i + 1]).images[0] if kind else self.crops.batch(places[i : i + 1])[0]
                for i, kind in enumerate(kinds)
            ]
        )
        return (out - self.mean) / self.std


def open_pictures(
    data: str,
    preprocessing: Preprocessing,
    *,
    part: Part,
    count: int | None = None,
    seed: int = 0,
    recolour: float = 0.0,
) -> Pictures:
    """Pictures from `crops`, `shapes`, `mixed`, or a folder.

    Args:
        data: Name or folder.
        preprocessing: Of the tokenizer.
        part: Pictures to train on, or others.
        count: Pictures at most; None for all of a folder, or 100,000 built-in ones. Held-out pictures of a folder are
            not thinned out: `in_batches` takes the first ones.
        seed: Of what is random.
        recolour: Share of training crops that come in other colours, see `Recoloured`.

    Raises:
        FileNotFoundError: No such folder, or no pictures in it.
        ValueError: `recolour` for pictures that are no training crops.
    """
    if recolour and (part != "training" or data not in ("crops", "mixed")):
        raise ValueError(f"only training crops (of 'crops' and 'mixed') are recoloured, got {data!r}, part {part!r}")
    if data in BUILT_IN:
        made = BUILT_IN_COUNT if count is None else count
        return BuiltInPictures(data, preprocessing, part=part, count=made, seed=seed, recolour=recolour)
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"{data!r} is no folder and none of {', '.join(BUILT_IN)}")
    return FolderPictures(folder, preprocessing, part=part, seed=seed, count=count if part == "training" else None)


def in_batches(pictures: Pictures, count: int, size: int) -> Iterator[Tensor]:
    """The first `count` pictures (or all there are) in batches of `size`."""
    stop = min(count, len(pictures))
    for start in range(0, stop, size):
        yield pictures.batch(np.arange(start, min(start + size, stop)))
