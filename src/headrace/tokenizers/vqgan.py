"""The convolutional encoder and decoder of VQGAN, 16 times smaller and back, as LlamaGen and TokenFlow use them.

Module names follow the published checkpoints (`conv_blocks.2.res.0.norm1`), so weights load without a table.
Sources: Esser et al. 2021 (arXiv 2012.09841), Sun et al. 2024 (arXiv 2406.06525), TokenFlow (arXiv 2412.03069).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of one side, encoder or decoder.

    Attributes:
        width: Channels of the finest level, a multiple of `groups`.
        multipliers: Width of each level as a multiple of `width`, finest first; each but the last halves the side.
        blocks: Residual blocks per level; the decoder has one more per level.
        latent: Channels of the latent map.
        attention: Whether the coarsest level and the middle have attention; LWM's does not.
        groups: Of the group norms; 32 as published, at 128 channels. With one channel a group a norm is an instance
            norm: it takes every channel's mean away, and with the last one the colour of the whole picture.
        shortcut: A linear layer from each patch to its latent, and one back, beside the convolutions; not published.
            Colours of large areas, which norms take away and training wins back slowly, go this way at once. The idea
            is the residual autoencoding of DC-AE (arXiv 2410.10733), here with learned layers.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent: int = 256
    attention: bool = True
    groups: int = 32
    shortcut: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if self.width < self.groups or self.width % self.groups:
            raise ValueError(f"width must be a multiple of {self.groups}, got {self.width}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be at least 1 each, got {self.multipliers}")
        if self.blocks < 1 or self.latent < 1:
            raise ValueError(f"blocks and latent must be at least 1, got {self.blocks} and {self.latent}")

    @property
    def factor(self) -> int:
        """How many times smaller a side of the latent map is."""
        return 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice, plus the input (through a 1x1 convolution when the width changes)."""

    def __init__(self, width_in: int, width_out: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention over all places of a map, one head, plus the input."""

    def __init__(self, width: int, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), same shape back."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """3x3 convolution with stride 2 after one row and column of zeros below and right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the side, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked, then a change of resolution."""

    def __init__(self, widths: Sequence[int], *, attention: bool, groups: int, resample: nn.Module | None) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.res = nn.ModuleList(ResidualBlock(a, b, groups=groups) for a, b in pairs)
        attended = widths[1:] if attention else ()
        self.attn = nn.ModuleList(AttentionBlock(b, groups=groups) for b in attended)
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif isinstance(resample, Upsample):
            self.upsample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self._modules[name](x)  # type: ignore[misc]
        return x


def middle(width: int, *, attention: bool, groups: int) -> nn.ModuleList:
    """Residual block, attention where asked, residual block at the coarsest resolution."""
    first, last = (ResidualBlock(width, width, groups=groups) for _ in range(2))
    between = [AttentionBlock(width, groups=groups)] if attention else []
    return nn.ModuleList([first, *between, last])


class VQGANEncoder(nn.Module):
    """Pictures (B, 3, H, W) to a latent map (B, latent, H / f, W / f)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        before = config.width
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            chain = [before] + [width] * config.blocks
            resample = None if last else Downsample(width)
            attention = last and config.attention
            self.conv_blocks.append(Level(chain, attention=attention, groups=config.groups, resample=resample))
            before = width
        self.mid = middle(before, attention=config.attention, groups=config.groups)
        self.norm_out = nn.GroupNorm(config.groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, config.latent, 3, padding=1)
        factor = config.factor
        self.shortcut = nn.Conv2d(3, config.latent, factor, stride=factor) if config.shortcut else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, latent, H / f, W / f); H and W are multiples of f."""
        x = self.conv_in(images)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        out = self.conv_out(F.silu(self.norm_out(x)))
        return out if self.shortcut is None else out + self.shortcut(images)


class VQGANDecoder(nn.Module):
    """A latent map (B, latent, h, w) to pictures (B, 3, f h, f w), without a final squashing."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid = middle(widths[0], attention=config.attention, groups=config.groups)
        self.conv_blocks = nn.ModuleList()
        before = widths[0]
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            chain = [before] + [width] * (config.blocks + 1)
            attention = index == 0 and config.attention
            resample = None if last else Upsample(width)
            self.conv_blocks.append(Level(chain, attention=attention, groups=config.groups, resample=resample))
            before = width
        self.norm_out = nn.GroupNorm(config.groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)
        factor = config.factor
        self.shortcut = nn.ConvTranspose2d(config.latent, 3, factor, stride=factor) if config.shortcut else None

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent, h, w) to (B, 3, f h, f w)."""
        x = self.conv_in(latents)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        out = self.conv_out(F.silu(self.norm_out(x)))
        return out if self.shortcut is None else out + self.shortcut(latents)
