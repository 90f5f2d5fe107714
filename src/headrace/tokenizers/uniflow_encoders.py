"""The vision transformers that UniFlow adapts, as configurations over timm.

Source: UniFlow (arXiv 2510.10575) names InternViT, DFN-CLIP, SigLIP2 and DINOv2; only InternViT was released. The exact
timm models of the other three are our picks.
"""

from dataclasses import dataclass
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from headrace.nn.vit_features import expect_vit

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A timm vision transformer and its input convention.

    Attributes:
        name: timm architecture; decides norms, activation, prefix tokens and layer scale.
        tag: Pretrained weights of that name, used by `UniFlow.adapt`; empty where none are meant.
        image_size: Native side [px].
        patch: Patch side [px].
        width: Token width D.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        mean: Channel means of images in [0, 1].
        std: Channel deviations.
        drop_path: Largest stochastic depth of the student in training, rising linearly over the blocks.
    """

    name: str = "vit_intern300m_patch14_448"
    tag: str = "ogvl_2pt5"
    image_size: int = 448
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        if self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.name not in timm.list_models():
            raise ValueError(f"timm knows no architecture {self.name!r}; timm.list_models('vit*') lists them")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the native size."""
        return self.image_size // self.patch, self.image_size // self.patch


ENCODERS = {
    "internvit-300m": ViTConfig(),
    "internvit-300m-dist": ViTConfig(tag="ogvl_dist"),
    "dinov2-l": ViTConfig(name="vit_large_patch14_dinov2", tag="lvd142m", image_size=518),
    "dinov2-l-reg4": ViTConfig(name="vit_large_patch14_reg4_dinov2", tag="lvd142m", image_size=518),
    "dfn-clip-l": ViTConfig(
        name="vit_large_patch14_clip_quickgelu_224",
        tag="dfn2b",
        image_size=224,
        mean=OPENAI_CLIP[0],
        std=OPENAI_CLIP[1],
    ),
    "siglip2-so400m": ViTConfig(
        name="vit_so400m_patch16_siglip_256",
        tag="v2_webli",
        image_size=256,
        patch=16,
        width=1152,
        depth=27,
        mlp_ratio=3.7362,
        mean=HALF[0],
        std=HALF[1],
    ),
    "tiny": ViTConfig(tag="", image_size=64, patch=8, width=256, depth=4, heads=4, drop_path=0.0),
}


def build_vit(config: ViTConfig, *, pretrained: bool = False) -> VisionTransformer:
    """The transformer without head or pooling, accepting any grid.

    Args:
        config: Sizes and name.
        pretrained: Fetch timm's weights for `config.tag` from the Hub or its cache.

    Raises:
        ValueError: `pretrained` without a tag.
        OSError: The weights are neither cached nor reachable.
    """
    if pretrained and not config.tag:
        raise ValueError(f"{config.name} has no tag, so there are no pretrained weights to fetch")
    options: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
        "num_classes": 0,
        "global_pool": "",
        "dynamic_img_size": True,
    }
    name = f"{config.name}.{config.tag}" if pretrained else config.name
    return expect_vit(timm.create_model(name, pretrained=pretrained, **options), "encoder")


def last_norm(vit: VisionTransformer) -> nn.Module:
    """The norm after the last block: identity in InternViT, a LayerNorm in DINOv2, CLIP and SigLIP."""
    return vit.norm
