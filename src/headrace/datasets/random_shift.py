"""Random-shift augmentation of pictures. Source: Kostrikov et al. 2020 (DrQ), arXiv 2004.13649, sec. 4.1."""

import torch
from torch import Tensor


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each sample by up to `pixels` in both directions, repeating the edge; the same for all its frames.

    Args:
        images: Any dtype, uint8 as a rule, shape (B, ..., H, W, C). Not modified.
        pixels: Largest shift [px], at least 0.
        generator: CPU generator; fixes the result.

    Returns:
        Shape and dtype of `images`; equal to padding by `pixels` with edge values and cropping at a random place.

    Raises:
        ValueError: `pixels` is negative or not below the picture's size.
    """
    height, width = images.shape[-3:-1]
    if not 0 <= pixels < min(height, width):
        raise ValueError(f"pixels must be at least 0 and below the picture's {height} x {width}, got {pixels}")
    shifts = torch.randint(-pixels, pixels + 1, (len(images), 2), generator=generator).tolist()
    shifted = torch.empty_like(images)
    for target, source, (down, right) in zip(shifted, images, shifts, strict=True):
        top, bottom = max(0, -down), height - max(0, down)
        left, far = max(0, -right), width - max(0, right)
        inner = source[..., top + down : bottom + down, left + right : far + right, :]
        target[..., top:bottom, left:far, :] = inner
        target[..., top:bottom, :left, :] = inner[..., :1, :]
        target[..., top:bottom, far:, :] = inner[..., -1:, :]
        target[..., :top, :, :] = target[..., top : top + 1, :, :]
        target[..., bottom:, :, :] = target[..., bottom - 1 : bottom, :, :]
    return shifted
