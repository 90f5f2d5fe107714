"""How a UniFlow reconstruction is compared with its picture: protocols A and B, and the seam ratio.

The published tables disagree because some reconstruct at the encoder's size and compare at 256 px; we name both.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.tokenizers.uniflow import UniFlow

Protocol = Literal["native", "256"]
COMPARED_AT = 256


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


@torch.no_grad()
def reconstruct(
    model: UniFlow, pictures: Tensor, *, protocol: Protocol = "native", steps: int = 1, seed: int = 0, size: int = 256
) -> tuple[Tensor, Tensor]:
    """Reference and reconstruction, both (B, 3, S, S) in [0, 1], ready for PSNR, SSIM, LPIPS and rFID.

    `native` (A): S is the encoder's size. `256` (B): S is `size`; pictures go up to the encoder's size (bicubic,
    antialiased), through the model, and down again. State protocol, steps, seed and dtype with every figure.

    Args:
        model: The tokenizer.
        pictures: Square crops in [0, 1], (B, 3, S, S), at the encoder's size for A and at `size` for B.
        protocol: `native` or `256`.
        steps: Euler steps.
        seed: Seed of the decoder's noise.
        size: Side at which B compares [px].

    Raises:
        ValueError: Unknown protocol, or pictures of another size or outside [0, 1].
    """
    native = model.config.encoder.image_size
    if protocol not in ("native", "256"):
        raise ValueError(f"protocol must be 'native' or '256', got {protocol!r}")
    wanted = native if protocol == "native" else size
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, wanted, wanted):
        raise ValueError(f"protocol {protocol} takes (B, 3, {wanted}, {wanted}), got {tuple(pictures.shape)}")
    low, high = pictures.aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"pictures must lie in [0, 1], got [{low:.3g}, {high:.3g}]")
    encoder = model.config.encoder
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(pictures) for v in (encoder.mean, encoder.std))
    latents = model.encode((_resize(pictures, native) - mean) / std)
    out = model.preprocessing.to_unit(model.decode(latents, grid=encoder.grid, steps=steps, seed=seed))
    return pictures, _resize(out, wanted)


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit pictures, one value [dB] per image of (B, 3, H, W) in [0, 1].

    Both sides are rounded to 8 bits first; the mean over images is what tables print. Equal pictures give infinity.
    """
    eight = [(x.clamp(0, 1) * 255).round() for x in (reference, other)]
    error = (eight[0] - eight[1]).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def seam_ratio(images: Tensor, patch: int) -> Tensor:
    """Gradient across patch borders over gradient inside patches; about 1 without a visible grid. (B,).

    Args:
        images: (B, C, H, W).
        patch: Patch side [px], at least 2.
    """
    if patch < 2:
        raise ValueError(f"patch must be at least 2 px, got {patch}")
    border, inside = [], []
    for axis in (-1, -2):
        step = images.diff(dim=axis).abs()
        on_border = (torch.arange(step.shape[axis], device=images.device) + 1) % patch == 0
        for mask, values in ((on_border, border), (~on_border, inside)):
            index = mask.nonzero().flatten()
            values.append(step.index_select(axis, index).flatten(1))
    return torch.cat(border, 1).mean(1) / torch.cat(inside, 1).mean(1).clamp_min(1e-12)
