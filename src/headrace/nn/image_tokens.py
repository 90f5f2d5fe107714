"""Pictures to tokens through any timm backbone, with spatial-softmax keypoints where positions matter."""
# Shape letters: B pictures, C channels, h w feature grid, N tokens, D width, K keypoints.

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from headrace.nn.lean_imports import without

with without("wandb"):
    import timm
import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageTokensConfig:
    """How pictures become tokens.

    Attributes:
        backbone: timm model name.
        size: Side of the square picture that the backbone sees [px], after cropping.
        width: Width of the tokens.
        stage: Index of the timm feature stage whose cells become tokens; -1 is the last (ViTs: the last block).
        keypoints: Number of spatial-softmax keypoints, gathered in one further token; 0 for none.
        keypoint_stage: Feature stage that the keypoints are read from, finer than `stage`.
        groups: Groups of group normalisation in convolutional backbones, which does not mix samples; 0 keeps the
            backbone's own normalisation.
        pretrained: Load timm's pretrained weights when the module is first built (needs the hub).
    """

    backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    size: int = 224
    width: int = 4096
    stage: int = -1
    keypoints: int = 0
    keypoint_stage: int = 2
    groups: int = 0
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.size < 8 or self.width < 1 or self.keypoints < 0:
            raise ValueError(f"size {self.size}, width {self.width} and keypoints {self.keypoints} do not make sense")

    @classmethod
    def tiny(cls, *, width: int = 32) -> "ImageTokensConfig":
        """A convolutional backbone on small pictures."""
        return cls(backbone="resnet10t", size=64, width=width, stage=3, keypoints=4, groups=8)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with the argument order that timm's backbones expect."""

    def __init__(self, channels: int, *, groups: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(groups, channels, device=device, dtype=dtype)


def spatial_softmax(maps: Tensor) -> Tensor:
    """Expected coordinates of each map under the softmax of its cells.

    Args:
        maps: Logits, shape (B, K, h, w).

    Returns:
        (x, y) in [-1, 1] per keypoint, shape (B, K, 2), float32.

    Source: Levine et al. 2016, arXiv 1504.00702, sec. 5.2 (feature points).
    """
    weights = maps.float().flatten(2).softmax(-1).unflatten(2, maps.shape[2:])
    x = torch.linspace(-1, 1, maps.shape[3], device=maps.device)
    y = torch.linspace(-1, 1, maps.shape[2], device=maps.device)
    return torch.stack(((weights.sum(2) * x).sum(-1), (weights.sum(3) * y).sum(-1)), -1)


class ImageTokens(nn.Module):
    """Tokens of pictures: one per cell of a feature map, plus one that holds the keypoints."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTokensConfig) -> None:
        super().__init__()
        self.config = config
        stages = (config.stage,) if not config.keypoints else (config.keypoint_stage, config.stage)
        options: dict[str, Any] = {"norm_layer": partial(GroupNorm, groups=config.groups)} if config.groups else {}
        if "vit" in config.backbone:
            options["img_size"] = config.size
        self.features: Any = timm.create_model(
            config.backbone, features_only=True, out_indices=stages, pretrained=config.pretrained, **options
        )
        info = cast(Any, self.features.feature_info)
        channels = info.channels()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        reduction = info.reduction()[-1]
        self.grid = -(-config.size // reduction)
        self.project = nn.Linear(channels[-1], config.width)
        self.position = nn.Parameter(torch.randn(self.grid**2, config.width) * 0.02)
        if config.keypoints:
            self.maps = nn.Conv2d(channels[0], config.keypoints, 1)
            self.points = nn.Linear(2 * config.keypoints, config.width)

    @property
    def tokens(self) -> int:
        """Tokens per picture."""
        return self.grid**2 + bool(self.config.keypoints)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of pictures.

        Args:
            images: uint8 in 0..255 or float in 0..1, RGB, shape (B, 3, size, size).

        Returns:
            Shape (B, N, D).
        """
        size = self.config.size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images.shape)}")
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.features(pixels)
        tokens = self.project(maps[-1].flatten(2).mT) + self.position
        if self.config.keypoints:
            points = spatial_softmax(self.maps(maps[0])).flatten(1)
            tokens = torch.cat((tokens, self.points(points.to(tokens.dtype))[:, None]), 1)
        return tokens
