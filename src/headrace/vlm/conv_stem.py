"""Early convolutions in front of a ViT's blocks, instead of one large patch projection.

Source of the idea: Xiao et al., Early Convolutions Help Transformers See Better (arXiv 2106.14881). Normalisation
is over channels at each place, so that a picture's features do not depend on how much empty canvas lies around it.
"""
# Shape letters in this file: B pictures, C channels, H, W sides of a feature map, N tokens, D width.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """Stages of the stem; each halves both sides.

    Attributes:
        widths: Channels of each stage; 2 ** stages is the side of the patch that a token stands for [px].
        blocks: Residual blocks of two 3 x 3 convolutions in each stage.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be one positive number per stage, got {self.widths}")
        if len(self.blocks) != len(self.widths) or min(self.blocks) < 0:
            raise ValueError(f"blocks must be {len(self.widths)} numbers from 0 on, one per stage, got {self.blocks}")

    @property
    def patch(self) -> int:
        """Side of the patch that a token stands for [px]."""
        return 2 ** len(self.widths)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), both convolutions 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + self.second(F.gelu(self.first(self.norm(x))))


class ConvStem(nn.Module):
    """Takes the place of timm's `patch_embed`: (B, 3, H, W) to (B, N, D).

    Attributes:
        num_patches: Tokens of a picture of the model's size.
    """

    def __init__(self, config: StemConfig, *, size: int, width: int) -> None:
        super().__init__()
        if size % config.patch:
            raise ValueError(f"size {size} must divide by {config.patch}, the patch of {len(config.widths)} stages")
        stages: list[nn.Module] = []
        before = 3
        for channels, blocks in zip(config.widths, config.blocks, strict=True):
            if before > 3:
                stages.append(ChannelNorm(before))
            stages.append(nn.Conv2d(before, channels, 3, stride=2, padding=1))
            stages += [ResidualBlock(channels) for _ in range(blocks)] or [nn.GELU()]
            before = channels
        self.stages = nn.Sequential(*stages)
        self.norm = ChannelNorm(before)
        self.project = nn.Conv2d(before, width, 1)
        self.grid_size = (size // config.patch,) * 2
        self.num_patches = self.grid_size[0] ** 2

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens in raster order; sides of `pixels` must divide by the patch."""
        rows = self.stages(pixels.contiguous(memory_format=torch.channels_last))
        return self.project(self.norm(rows)).flatten(2).transpose(1, 2)
