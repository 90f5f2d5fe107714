"""Cutting a square out of pictures, at a fixed or a slightly random place."""

import torch
from torch import Tensor


def random_crop(
    images: Tensor, *, corner: tuple[int, int], size: int, pixels: int, generator: torch.Generator
) -> Tensor:
    """Cut a square whose corner is moved by up to `pixels` in both directions; the same for all frames of a sample.

    Unlike `random_shift` no edge is repeated: what moves in is what the camera saw there.

    Args:
        images: Shape (B, ..., H, W, C). Not modified.
        corner: (left, top) of the square where nothing moves it [px].
        size: Its side [px].
        pixels: Largest move [px]; moves stop at the picture's edge.
        generator: CPU generator; fixes the result.

    Returns:
        Shape (B, ..., size, size, C), same dtype.

    Raises:
        ValueError: The square does not lie within the picture, or `pixels` is negative.
    """
    height, width = images.shape[-3:-1]
    left, top = corner
    if pixels < 0 or left < 0 or top < 0 or left + size > width or top + size > height:
        raise ValueError(f"a square of {size} px at ({left}, {top}), moved by {pixels}, leaves {width} x {height} px")
    moves = torch.randint(-pixels, pixels + 1, (len(images), 2), generator=generator)
    lefts = (left + moves[:, 0]).clamp(0, width - size).tolist()
    tops = (top + moves[:, 1]).clamp(0, height - size).tolist()
    return torch.stack(
        [image[..., y : y + size, x : x + size, :] for image, x, y in zip(images, lefts, tops, strict=True)]
    )
