"""Block outputs of any timm vision transformer, one at a time."""

from collections.abc import Iterator

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def expect_vit(model: nn.Module, what: str) -> VisionTransformer:
    """The model itself, if it is a timm VisionTransformer.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{what} must be a timm VisionTransformer, got {type(model).__name__}")
    return model


def block_outputs(vit: VisionTransformer, pixels: Tensor) -> Iterator[Tensor]:
    """Run a ViT and yield the tokens after each block, prefix tokens included, without the final norm.

    A stream, so that a teacher of L blocks never keeps L outputs.

    Args:
        vit: Any timm VisionTransformer; built with `dynamic_img_size=True` if the grid may vary.
        pixels: Normalised images, (B, 3, H, W).

    Yields:
        (B, prefix + N, D), L times.
    """
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
    for block in vit.blocks:
        tokens = block(tokens)
        yield tokens


def patch_tokens(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Drop class and register tokens: (B, prefix + N, D) to (B, N, D)."""
    return tokens[:, vit.num_prefix_tokens :]
