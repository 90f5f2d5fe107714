"""FlowTok's image side: a one-dimensional VAE, 77 tokens of 16 numbers for a 256 px image, with a text-aware decoder.

Source: FlowTok (arXiv 2503.10772, sec. 3.2; TACJu/FlowTok `FlowTiTok`), after TA-TiTok (bytedance/1d-tokenizer). The
decoder reads the text tokens again, so a generated image depends on the text twice.
"""

# Shape letters in this file: B batch, G grid side, K latent tokens, D latent channels, W width, C text width.

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.axial_rope import axial_angles, rotate_pairs
from headrace.nn.shapes import expect_shape
from headrace.nn.starting_weights import draw_weights

LOGVAR_RANGE = (-30.0, 20.0)
GREY = 0.5


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A stack of transformer blocks: width, blocks, heads."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"a tower needs depth and heads of at least 1 and a head width divisible by 4, got width {self.width}, "
                f"depth {self.depth}, heads {self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class TokenVAEConfig:
    """Sizes of the image tokenizer. Defaults are the published 256 px model.

    Attributes:
        image_size: Side [px].
        patch: Patch side [px].
        tokens: K, equal to the text context length, because the flow needs one shape at both ends.
        channels: D.
        text_width: C, width of the text encoder's tokens.
        encoder: Encoder blocks.
        decoder: Decoder blocks.
        initial_logvar: Where the log-variance of the tokens starts; 0 in the release. A decoder that reads captions can
            learn to ignore tokens that begin as pure noise, and in a short run never comes back: start it low there.
        init_gain: How wide layers start, see `draw_weights`; 0 is the release. Above 0 the last convolution also begins
            as a grey ground on which it copies its input, so that a short run need not learn that first.
    """

    image_size: int = 256
    patch: int = 16
    tokens: int = 77
    channels: int = 16
    text_width: int = 768
    encoder: TowerConfig = TowerConfig(width=768, depth=12, heads=12)
    decoder: TowerConfig = TowerConfig(width=1024, depth=24, heads=16)
    initial_logvar: float = 0.0
    init_gain: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch {self.patch}")
        if self.init_gain < 0:
            raise ValueError(f"init_gain must not be negative, got {self.init_gain}")
        for name in ("tokens", "channels", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not LOGVAR_RANGE[0] <= self.initial_logvar <= LOGVAR_RANGE[1]:
            raise ValueError(f"initial_logvar must lie in {LOGVAR_RANGE}, got {self.initial_logvar}")

    @property
    def grid(self) -> int:
        """G, patches per side."""
        return self.image_size // self.patch


class Posterior(NamedTuple):
    """A diagonal Gaussian over latent tokens: mean and clamped log-variance, both (B, K, D)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise`, (B, K, D)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL to the unit Gaussian, summed over tokens and channels, (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2))


class RotaryAttention(nn.Module):
    """Self-attention that rotates the first G * G tokens only; latent and text tokens carry no rotation.

    That asymmetry is what lets a position reach the net: a turned patch query meets unturned latent keys.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cells = cos.shape[0]
        q, k = (
            torch.cat([rotate_pairs(y[:, :, :cells], cos, sin), y[:, :, cells:]], dim=2).to(v.dtype) for y in (q, k)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`silu(a) * b` with a, b from one linear map, then back to `width`; hidden width int(8 / 3 * width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class RotaryBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = RotaryAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """Norm, blocks, and the rotation tables of a G x G grid (buffers that are not saved)."""

    def __init__(self, config: TowerConfig, grid: int) -> None:
        super().__init__()
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = nn.ModuleList(RotaryBlock(config.width, config.heads) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(config.width)
        angles = axial_angles((grid, grid), config.width // config.heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, G * G + rest, W) to the same shape, before `ln_post`."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, self.cos, self.sin)
        return x


class ImageEncoder(nn.Module):
    """Patches and learned queries through a tower; the queries become the posterior."""

    def __init__(self, config: TokenVAEConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.queries = nn.Parameter(torch.randn(config.tokens, width) * width**-0.5)
        self.query_positions = nn.Parameter(torch.randn(config.tokens, width) * width**-0.5)
        self.tower = Tower(config.encoder, config.grid)
        self.out = nn.Linear(width, 2 * config.channels)

    def queried(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to what the queries hold after the last norm, (B, K, W)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        queries = (self.queries + self.query_positions).expand(len(images), -1, -1).to(patches.dtype)
        out = self.tower(torch.cat([patches, queries], dim=1))[:, patches.shape[1] :]
        return self.tower.ln_post(out)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to mean and log-variance before clamping, (B, K, 2 D)."""
        return self.out(self.queried(images))


class ImageDecoder(nn.Module):
    """One repeated mask token, latents and text through a tower; the mask positions become pixels."""

    def __init__(self, config: TokenVAEConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.grid, self.patch = config.grid, config.patch
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.latent_in = nn.Linear(config.channels, width)
        self.latent_positions = nn.Parameter(torch.randn(config.tokens, width) * width**-0.5)
        self.text_in = nn.Linear(config.text_width, width)
        self.text_positions = nn.Parameter(torch.randn(config.tokens, width) * width**-0.5)
        self.tower = Tower(config.decoder, config.grid)
        self.to_pixels = nn.Linear(width, config.patch**2 * 3)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def cells(self, latents: Tensor, text: Tensor) -> Tensor:
        """Features of the mask tokens after the last norm, (B, G * G, W)."""
        masks = self.mask_token.expand(len(latents), self.grid**2, -1)
        parts = [masks, self.latent_in(latents) + self.latent_positions, self.text_in(text) + self.text_positions]
        out = self.tower(torch.cat([part.to(latents.dtype) for part in parts], dim=1))
        return self.tower.ln_post(out[:, : self.grid**2])

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Latents (B, K, D) and text tokens (B, K, C) to images (B, 3, S, S), about in [0, 1], not clamped."""
        pixels = self.to_pixels(self.cells(latents, text))
        g, p = self.grid, self.patch
        image = pixels.reshape(len(latents), g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, g * p, g * p)
        return self.smooth(image)


class TokenVAE(nn.Module):
    """The image tokenizer of FlowTok."""

    def __init__(self, config: TokenVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.decoder = ImageDecoder(config)
        for module in self.modules():
            draw_weights(module, gain=config.init_gain)
        if config.init_gain:
            nn.init.dirac_(self.decoder.smooth.weight)
            assert self.decoder.smooth.bias is not None
            nn.init.constant_(self.decoder.smooth.bias, GREY)
        nn.init.constant_(self.encoder.out.bias[config.channels :], config.initial_logvar)

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, 3, S, S) in [0, 1] to the posterior of their tokens.

        Raises:
            ValueError: Another size; the rotation tables fit one grid, so other sizes need another tokenizer.
        """
        size = self.config.image_size
        expect_shape("images", images, (None, 3, size, size))
        mean, logvar = self.encoder(images).chunk(2, dim=-1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latents: Tensor, text: Tensor) -> Tensor:
        """Latents (B, K, D) and text tokens (B, K, C) to images (B, 3, S, S), not clamped.

        Raises:
            ValueError: A shape differs.
        """
        expect_shape("latents", latents, (None, self.config.tokens, self.config.channels))
        expect_shape("text", text, (latents.shape[0], self.config.tokens, self.config.text_width))
        return self.decoder(latents, text)
