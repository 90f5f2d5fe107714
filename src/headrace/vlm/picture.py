"""What may be given as a picture: a PIL image, an array, or a path."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Worked = Sequence[tuple[str, str]]  # question and answer of worked examples, one per picture before the last
Picture = Any  # PIL.Image.Image | np.ndarray | str | os.PathLike


def as_picture(given: Picture) -> Any:
    """An RGB PIL image.

    Args:
        given: PIL image in any mode, uint8 array (H, W, 3), or the path of an image file.

    Raises:
        FileNotFoundError: The path has no file; it is named.
        ValueError: The array's dtype or shape is another, or the file is no picture.
        OSError: The file is damaged.
        TypeError: Anything else.
    """
    from PIL import Image, ImageFile, UnidentifiedImageError

    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[-1] != 3:
            raise ValueError(f"a picture array must be uint8 (H, W, 3), got {given.dtype} {given.shape}")
        return Image.fromarray(given)
    if isinstance(given, str | os.PathLike):
        if not Path(given).is_file():
            raise FileNotFoundError(f"no picture at {os.fspath(given)!r}")
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES  # lmms-eval sets it for the whole process; damage would go unseen
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            return Image.open(given).convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:  # SyntaxError: broken PNG
            raise ValueError(f"{os.fspath(given)!r} is not a picture that Pillow can read ({error})") from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
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


def worked_of(worked: Sequence[Worked], *, questions: int, pictures: int) -> list[tuple[tuple[str, str], ...]]:
    """The worked examples of every question, checked; no examples at all is an empty list for each.

    Raises:
        ValueError: Not one list per question, or not one example per picture before the last.
    """
    turns = [tuple((str(asked), str(said)) for asked, said in one) for one in worked] or [()] * questions
    if len(turns) != questions:
        raise ValueError(f"{questions} questions need as many lists of worked examples, got {len(turns)}")
    wrong = [len(one) for one in turns if one and len(one) != pictures - 1]
    if wrong:
        raise ValueError(f"{wrong[0]} worked examples need {wrong[0] + 1} pictures, the last one's own; got {pictures}")
    return turns
