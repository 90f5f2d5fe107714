"""Where UniFlow's bottleneck begins: as the best linear reading of the pixels from what the encoder already knows.

A random bottleneck hands on the encoder's widest directions, and those tell what is in a picture, not what its pixels
are. The pixels are there too, in narrow directions that a short run does not find. Our own addition; the release draws
these layers at random.
"""

# Shape letters in this file: M patches, D encoder width, Z latent channels, P numbers in a patch.

import torch
from torch import Tensor

from headrace.nn.patches import patchify
from headrace.tokenizers.uniflow import Bottleneck, UniFlow


@torch.no_grad()
def start_bottleneck(
    model: UniFlow, images: Tensor, *, ridge: float = 1e-3, sharpen: float = 0.5, seed: int = 0
) -> float:
    """Set the bottleneck so that latents are the patches' principal components, as far as tokens tell them linearly.

    Both directions begin as exact linear maps: GELU(a) - GELU(-a) = a. Latents have a mean square of 1, and so has
    what the bottleneck gives back to the decoder.

    Args:
        model: Changed in place: `to_latent` and `from_latent`.
        images: Normalised training images (B, 3, H, W) with more patches in all than the encoder is wide.
        ridge: Share of the mean token variance that is added to each direction.
        sharpen: 0 keeps each component's deviation, 1 makes all equal.
        seed: Of the basis in which latents become tokens again.

    Returns:
        Share of the pixels' variance that the latents tell linearly, up to 1.

    Raises:
        ValueError: As `UniFlow.grid_of`; too few patches; fewer than 2 Z hidden units; or more latent
            channels than a patch has numbers.
    """
    model.grid_of(images)
    tokens = model.hidden(images)[1].flatten(0, 1).double()
    pixels = patchify(images.double(), model.config.encoder.patch).flatten(0, 1)
    width, channels = tokens.shape[1], model.config.latent_channels
    if len(tokens) <= width:
        raise ValueError(f"{len(tokens)} patches are too few for {width} numbers per token; give more images")
    if 2 * channels > width:
        raise ValueError(f"{channels} latent channels need an encoder width of at least {2 * channels}, got {width}")
    if channels > pixels.shape[1]:
        raise ValueError(f"{channels} latent channels are more than the {pixels.shape[1]} numbers of a patch of pixels")
    mean = tokens.mean(0)
    tokens, pixels = tokens - mean, pixels - pixels.mean(0)
    spread = tokens.T @ tokens
    spread += ridge * spread.diagonal().mean() * torch.eye(width, dtype=spread.dtype, device=spread.device)
    reading = torch.linalg.solve(spread, tokens.T @ pixels)
    read = tokens @ reading
    deviation, components = torch.linalg.svd(read, full_matrices=False)[1:]
    deviation, components = deviation[:channels] / len(tokens) ** 0.5, components[:channels]
    scale = deviation ** (1 - sharpen)
    scale = scale / scale.square().mean().sqrt()
    rows = (scale / deviation.clamp_min(1e-6))[:, None] * (components @ reading.T)
    _become_linear(model.to_latent, rows, -rows @ mean, torch.eye(channels))
    basis = (
        torch.linalg.qr(torch.randn(width, channels, generator=torch.Generator().manual_seed(seed)))[0]
        * (width / channels) ** 0.5
    )
    _become_linear(model.from_latent, torch.eye(channels), torch.zeros(channels), basis)
    kept = (read @ components.T @ components - pixels).square().sum()
    return float(1 - kept / pixels.square().sum())


def _become_linear(part: Bottleneck, first: Tensor, bias: Tensor, second: Tensor) -> None:
    """Make `part(x)` the linear map `second @ (first @ x + bias)`; hidden units beyond twice the rows are not read."""
    rows = len(first)
    for sign, units in ((1, slice(0, rows)), (-1, slice(rows, 2 * rows))):
        part.c_fc.weight[units] = sign * first.to(part.c_fc.weight)
        part.c_fc.bias[units] = sign * bias.to(part.c_fc.bias)
    part.c_proj.weight.zero_()
    part.c_proj.bias.zero_()
    part.c_proj.weight[:, : 2 * rows] = torch.cat([second, -second], dim=1).to(part.c_proj.weight)
