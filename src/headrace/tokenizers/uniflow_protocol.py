"""Figures of a reconstruction that no tokenizer is needed for: PSNR as tables print it, and the seam ratio."""

import torch
from torch import Tensor


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit pictures, one value [dB] per image of (B, 3, H, W) in [0, 1].

    Both sides are rounded to 8 bits first; the mean over images is what tables print. Equal pictures give infinity.
    """
    eight = [(x.clamp(0, 1) * 255).round() for x in (reference, other)]
    error = (eight[0] - eight[1]).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def seam_ratio(images: Tensor, patch: int) -> Tensor:
    """Gradient across patch borders over gradient inside patches; about 1 without a visible grid. (B,).

    Patches that are decoded independently show as a grid; UniFlow's global blocks are there to prevent it.

    Args:
        images: (B, C, H, W).
        patch: Patch side [px], at least 2.
    """
    if patch < 2:
        raise ValueError(f"patch must be at least 2 px, got {patch}")
    border: list[Tensor] = []
    inside: list[Tensor] = []
    for axis in (-1, -2):
        step = images.diff(dim=axis).abs()
        on_border = (torch.arange(step.shape[axis], device=images.device) + 1) % patch == 0
        for mask, values in ((on_border, border), (~on_border, inside)):
            index = mask.nonzero().flatten()
            values.append(step.index_select(axis, index).flatten(1))
    return torch.cat(border, 1).mean(1) / torch.cat(inside, 1).mean(1).clamp_min(1e-12)
