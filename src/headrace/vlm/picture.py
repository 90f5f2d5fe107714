"""What may be given as a picture: a PIL image, an array, or a path."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Picture = Any  # PIL.Image.Image | np.ndarray | str | os.PathLike


def as_picture(given: Picture) -> Any:
    """An RGB PIL image.

    Args:
        given: PIL image in any mode, uint8 array (H, W, 3), or the path of an image file.

    Raises:
        FileNotFoundError: The path has no file; it is named.
        ValueError: The array's dtype or shape is another, or the file is no picture.
        TypeError: Anything else.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[-1] != 3:
            raise ValueError(f"a picture array must be uint8 (H, W, 3), got {given.dtype} {given.shape}")
        return Image.fromarray(given)
    if isinstance(given, str | os.PathLike):
        if not Path(given).is_file():
            raise FileNotFoundError(f"no picture at {os.fspath(given)!r}")
        try:
            return Image.open(given).convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{os.fspath(given)!r} is not a picture that Pillow can read") from error
    raise TypeError(f"a picture is a PIL image, an array or a path, got {type(given).__name__}")


def as_pictures(given: Picture | Sequence[Picture]) -> list[Any]:
    """One or several pictures as a list of RGB PIL images.

    Raises:
        ValueError: None at all; and as `as_picture`.
    """
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several:
        raise ValueError("at least one picture is needed")
    return [as_picture(one) for one in several]
