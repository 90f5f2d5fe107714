"""TokenFlow's semantic branch: a pretrained vision tower that is trained on, and a decoder to teacher features."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

Family = Literal["clip", "vitamin", "siglip", "efficientnet"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Reference code resizes position tables by the factor (target + 0.1) / source; asking for the size gives other numbers.
RESIZE_EXTRA = 0.1


class FamilyFacts(NamedTuple):
    """What differs between vision towers.

    Attributes:
        model: Name of the timm architecture.
        mean, std: Normalisation of pictures in [0, 1] before the tower; None feeds [-1, 1] as it is.
        penultimate: Features are those before the last block and the last norm, instead of after them.
    """

    model: str
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    penultimate: bool


FAMILIES: dict[Family, FamilyFacts] = {
    "clip": FamilyFacts("vit_base_patch16_clip_quickgelu_224", None, None, False),
    "vitamin": FamilyFacts("vitamin_xlarge_256", CLIP_MEAN, CLIP_STD, False),
    "siglip": FamilyFacts("vit_so400m_patch14_siglip_384", (0.5,) * 3, (0.5,) * 3, True),
    "efficientnet": FamilyFacts("efficientnet_lite0", None, None, False),
}
# EfficientNet-Lite0 is cut after its stage at 1/16 of the input.
EFFICIENTNET_STAGE, EFFICIENTNET_STRIDE, EFFICIENTNET_WIDTH = 3, 16, 112


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The vision tower.

    Attributes:
        family: `clip` (TokenFlow-B), `vitamin` (L) or `siglip` (XL); `efficientnet` (not in the paper) is for machines
            without a network, because a package ships its ImageNet weights.
        size: Side of the pictures that the position table is made for [px]; other sizes interpolate it (`clip` only).
        patch: Side of a patch [px]; of `efficientnet`, the side that one place of the grid stands for.
        width, depth, heads: Of the transformer. `vitamin` and `efficientnet` have their own, the width of
            `efficientnet` is 112.
        hidden: Width of the feed-forward layers.
    """

    family: Family = "clip"
    size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.family == "siglip" and self.depth < 2:
            raise ValueError("the siglip tower gives the features before its last block, so it needs a depth of 2")
        if self.family == "efficientnet" and self.width != EFFICIENTNET_WIDTH:
            raise ValueError(f"the efficientnet tower has a width of {EFFICIENTNET_WIDTH}, got {self.width}")

    @property
    def grid(self) -> int:
        """Side of the feature grid at `size`."""
        return self.size // self.patch


class SemanticTower(nn.Module):
    """Pictures in [-1, 1] to patch features, shape (B, g * g, width).

    `clip` feeds [-1, 1] without CLIP's mean and std, as the released TokenFlow-B does: the tower is trained on, so it
    need not see what it was pretrained on. Its output is normalised by the tower's last norm; `siglip` gives the state
    before its last block, whose parameters, with the last norm and the pooling head, stay unused and frozen.
    `efficientnet` sees pictures at twice their size and gives its map at 1/16 of that, interpolated to the grid, as
    `EfficientNetTeacher` does; its batch norms keep the statistics they came with.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.facts = FAMILIES[config.family]
        self.model = cast(Any, build_tower(config))
        if self.facts.penultimate:
            for module in (self.model.blocks[-1], self.model.norm, self.model.attn_pool):
                module.requires_grad_(False)
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Shape (B, 3, H, W) in [-1, 1] to (B, g * g, width)."""
        if self.facts.mean is not None and self.facts.std is not None:
            images = normalise(images, self.facts.mean, self.facts.std)
        if self.config.family == "vitamin":
            return self.model.forward_features(images)
        return self._convolutions(images) if self.config.family == "efficientnet" else self._vit(images)

    def train(self, mode: bool = True) -> Self:
        """Batch norms of `efficientnet` stay in eval mode."""
        return super().train(mode and self.config.family != "efficientnet")

    def _convolutions(self, images: Tensor) -> Tensor:
        side = max(2 * self.config.size, 2 * EFFICIENTNET_STRIDE)
        # Depthwise convolutions gain nothing from half precision, on a CPU they lose.
        with torch.autocast(images.device.type, enabled=False):
            images = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
            images = images.to(next(self.model.parameters()).dtype)
            (features,) = self.model(images.contiguous(memory_format=torch.channels_last))
            features = F.interpolate(features, size=(self.config.grid,) * 2, mode="bilinear")
        return features.flatten(2).transpose(1, 2)

    def _vit(self, images: Tensor) -> Tensor:
        model = self.model
        grid = model.patch_embed.proj(images)
        side = grid.shape[-1]
        x = grid.flatten(2).transpose(1, 2)
        if model.cls_token is not None:
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = model.norm_pre(x + resize_positions(model.pos_embed, side, prefix=model.num_prefix_tokens))
        blocks = model.blocks[:-1] if self.facts.penultimate else model.blocks
        for block in blocks:
            x = block(x)
        return x if self.facts.penultimate else model.norm(x)[:, model.num_prefix_tokens :]


def build_tower(config: TowerConfig) -> nn.Module:
    """The timm module of a tower, without a classification head, random weights."""
    name = FAMILIES[config.family].model
    if config.family == "vitamin":
        model = timm.create_model(name, num_classes=0, img_size=config.size)
        model.fc_norm = nn.Identity()
        return model
    if config.family == "efficientnet":
        cut: dict[str, Any] = {"features_only": True, "out_indices": (EFFICIENTNET_STAGE,), "bn_eps": 1e-3}
        return cast(Any, timm.create_model(name, **cut)).to(memory_format=torch.channels_last)
    shape: dict[str, Any] = {
        "img_size": config.size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.hidden / config.width,
    }
    if config.family == "siglip":
        shape["act_layer"] = "gelu_tanh"  # SigLIP was trained with the tanh form; timm's name builds the exact one
    return timm.create_model(name, num_classes=0, **shape)


def normalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Pictures in [-1, 1], clamped to the range of uint8, normalised by mean and std of the unit range."""
    unit = ((images + 1) * 127.5).clamp(0, 255) / 255
    shape = (1, 3, 1, 1)
    return (unit - unit.new_tensor(mean).view(shape)) / unit.new_tensor(std).view(shape)


def resize_positions(table: Tensor, side: int, *, prefix: int) -> Tensor:
    """Interpolate a position table to another grid, with the reference's odd factor.

    Args:
        table: Shape (1, prefix + n * n, W).
        side: Side of the wanted grid.
        prefix: Rows that belong to no place, kept as they are.

    Returns:
        Shape (1, prefix + side * side, W).
    """
    own = round((table.shape[1] - prefix) ** 0.5)
    if own == side:
        return table
    kept, places = table[:, :prefix], table[:, prefix:]
    grid = places.float().transpose(1, 2).reshape(1, -1, own, own)
    factor = (side + RESIZE_EXTRA) / own
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


@dataclass(frozen=True, kw_only=True)
class SemanticDecoderConfig:
    """The decoder from quantised semantic vectors to teacher features.

    Attributes:
        width, depth, heads: Of its transformer; the feed-forward layers are four times as wide.
        grid: Side of the grid that its position table is made for; other sides interpolate.
        teacher: Channels of the teacher's features.
    """

    width: int = 768
    depth: int = 3
    heads: int = 12
    grid: int = 14
    teacher: int = 512

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if min(self.depth, self.grid, self.teacher) < 1:
            raise ValueError("depth, grid and teacher must be at least 1")


def build_semantic_decoder(config: SemanticDecoderConfig, *, channels: int) -> Beit:
    """BEiT v2 transformer on a grid of quantised vectors: 1x1 patches, absolute positions, no layer scale."""
    return Beit(
        img_size=config.grid,
        patch_size=1,
        in_chans=channels,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        global_pool="avg",
        init_values=None,
        use_abs_pos_emb=True,
        num_classes=0,
    )


def decode_semantics(decoder: Beit, grid: Tensor) -> Tensor:
    """Quantised semantic vectors, shape (B, C, g, g), to normed patch states, shape (B, g * g, width)."""
    project = decoder.patch_embed.proj
    x = project(grid.to(project.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([decoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    if decoder.pos_embed is None:
        raise ValueError("the decoder has no position table; build it with `build_semantic_decoder`")
    x = x + resize_positions(decoder.pos_embed, grid.shape[-1], prefix=1)
    for block in decoder.blocks:
        x = block(x)
    return decoder.fc_norm(x[:, 1:])


def task_layer(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear: between a transformer and the quantiser (or the teacher's space)."""
    first, last = nn.Linear(width, width), nn.Linear(width, out)
    for linear in (first, last):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.Tanh(), last)
