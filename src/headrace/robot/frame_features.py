"""Features of single video frames on a grid of patches: DINOv2 through timm, or a stem that needs no weights."""

import os
from dataclasses import dataclass
from typing import Literal, Self

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from headrace.nn.patches import patch_grid
from headrace.nn.perceptual import read_plain_weights
from headrace.nn.pretrained import load_strictly
from headrace.nn.vit_features import expect_vit, patch_tokens

# Side of the position grid that DINOv2 was trained with: 518 px in patches of 14.
DINO_SIDE = 518


@dataclass(frozen=True, kw_only=True)
class FrameFeaturesConfig:
    """Which network looks at frames.

    Attributes:
        kind: `timm` for a vision transformer of timm, `stem` for one layer of patches and a small residual network.
        name: Name of the timm model; not used by the stem.
        width: Width of the features.
        patch: Side of a patch [px].
        frozen: Whether the network stays as it is loaded. Needed where its features are predicted: a network that
            learns along could make them all alike.
    """

    kind: Literal["timm", "stem"] = "timm"
    name: str = "vit_base_patch14_reg4_dinov2"
    width: int = 768
    patch: int = 14
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("timm", "stem"):
            raise ValueError(f"unknown kind {self.kind!r} (known: timm, stem)")
        if self.kind == "timm" and not self.name:
            raise ValueError("kind 'timm' needs the name of a timm model")
        if self.width < 1 or self.patch < 1:
            raise ValueError(f"width and patch must be at least 1, got {self.width} and {self.patch}")


class PatchStem(nn.Module):
    """Patches through one linear map, plus a norm, a GELU and a linear map beside it."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) to (B, N, D)."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        return tokens + self.mix(F.gelu(self.norm(tokens)))


class FrameFeatures(nn.Module):
    """Frames in [0, 1] to patch features; ImageNet's mean and deviation are applied inside. Random weights at first.

    Raises:
        ValueError: The timm model has another width than the config says.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FrameFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind == "stem":
            self.net: nn.Module = PatchStem(config.width, config.patch)
        else:
            net = timm.create_model(config.name, num_classes=0, dynamic_img_size=True)
            self.net = expect_vit(net, config.name)
            given = (self.net.embed_dim, self.net.patch_embed.patch_size[0])
            if given != (config.width, config.patch):
                raise ValueError(
                    f"{config.name} has width {given[0]} and patches of {given[1]} px, "
                    f"the config says {config.width} and {config.patch}"
                )
        for name, value in (("mean", IMAGENET_DEFAULT_MEAN), ("deviation", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.net.requires_grad_(not config.frozen)

    def train(self, mode: bool = True) -> Self:
        """A frozen network stays in eval mode."""
        super().train(mode)
        self.net.train(mode and not self.config.frozen)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Frames of shape (B, 3, H, W) in [0, 1] to features of shape (B, rows * columns, D).

        Raises:
            ValueError: The sides are not multiples of the patch.
        """
        patch_grid(frames.shape[-2], frames.shape[-1], self.config.patch)
        pixels = (frames - self.mean) / self.deviation
        if self.config.kind == "stem":
            return self.net(pixels)
        vit = expect_vit(self.net, self.config.name)
        return patch_tokens(vit, vit.forward_features(pixels))

    def load_dinov2(self, path: str | os.PathLike[str]) -> None:
        """Load a checkpoint of facebookresearch/dinov2, such as dinov2_vitb14_reg4_pretrain.pth, from a file.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The weights do not fit; lists what is missing or of another shape.
        """
        load_strictly(self.net, timm_names(read_plain_weights(path)), what=os.fspath(path))


def timm_names(dino: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's own key names to timm's, for models with register tokens.

    The position of the class token is added to it, because timm gives prefix tokens of such models no position.

    Raises:
        ValueError: The state has no register tokens, or another key that is needed is missing.
    """
    absent = [key for key in ("register_tokens", "cls_token", "pos_embed") if key not in dino]
    if absent:
        raise ValueError(f"not a DINOv2 checkpoint with registers: {', '.join(absent)} missing")
    state = {key: value for key, value in dino.items() if key not in ("mask_token", "register_tokens")}
    state["reg_token"] = dino["register_tokens"]
    state["cls_token"] = dino["cls_token"] + dino["pos_embed"][:, :1]
    state["pos_embed"] = dino["pos_embed"][:, 1:]
    return state
