"""TokenFlow: discrete image tokens that serve understanding and generation (arXiv 2412.03069).

Two encoders, one of meaning and one of pixels, give two maps on one grid; a multi-scale quantiser picks at each place
one index that is good for both; its semantic half is decoded to a teacher's features, its pixel half to the picture.
"""

# Shape letters: B batch, N codes of all scales, D channels of both halves, g side of the finest grid, T teacher width.

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer, Quantized
from headrace.nn.shapes import expect_shape
from headrace.tokenizers.base import Preprocessing, Tokenizer, check_codes, check_images
from headrace.tokenizers.tokenflow_semantic import (
    SemanticDecoderConfig,
    SemanticTower,
    TowerConfig,
    build_semantic_decoder,
    decode_semantics,
    task_layer,
)
from headrace.tokenizers.vqgan import VQGANConfig, VQGANDecoder, VQGANEncoder

B_SCALES = (1, 2, 4, 6, 8, 10, 12, 14)
XL_SCALES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
PLAIN = VQGANConfig()
ENHANCED = VQGANConfig(width=256, blocks=4)
FeatureChoice = Literal["last", "semantic", "all", "residual"]


@dataclass(frozen=True, kw_only=True)
class TokenFlowConfig:
    """A TokenFlow model.

    Attributes:
        size: Side of the pictures [px].
        tower: The semantic encoder.
        semantic_decoder: From quantised semantic vectors to the teacher's features.
        pixel_encoder, pixel_decoder: The two sides of the VQGAN.
        quantizer: Scales and codebooks; `dims` and `weights` are (semantic, pixel).
        fit: How pictures are made square, see `Preprocessing`.
    """

    size: int
    tower: TowerConfig
    semantic_decoder: SemanticDecoderConfig
    pixel_encoder: VQGANConfig = PLAIN
    pixel_decoder: VQGANConfig = PLAIN
    quantizer: MultiScaleConfig
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        grid = self.quantizer.grid
        if self.size // self.tower.patch != grid:
            raise ValueError(
                f"pictures of {self.size} px in patches of {self.tower.patch} px make a grid of "
                f"{self.size // self.tower.patch}, but the last scale is {grid}"
            )
        if self.tower.family != "clip" and self.size != self.tower.size:
            raise ValueError(f"the {self.tower.family} tower works at {self.tower.size} px only, got {self.size}")
        if self.pixel_encoder.factor != self.pixel_decoder.factor:
            raise ValueError("pixel encoder and decoder must have the same number of levels")
        if self.pixel_encoder.latent != self.pixel_decoder.latent:
            raise ValueError("pixel encoder and decoder must have the same latent channels")

    @property
    def pixel_size(self) -> int:
        """Side at which the pixel branch works [px]; the XL model resizes 384 to 432."""
        return self.quantizer.grid * self.pixel_encoder.factor

    @classmethod
    def b(cls) -> Self:
        """TokenFlow-B with the plain decoder: CLIP ViT-B/16, 224 px, 561 codes."""
        return cls(
            size=224,
            tower=TowerConfig(),
            semantic_decoder=SemanticDecoderConfig(),
            quantizer=MultiScaleConfig(scales=B_SCALES),
        )

    @classmethod
    def b_enhanced(cls) -> Self:
        """TokenFlow-B with the enhanced decoder (twice the width, 5 blocks a level), 224 px, 561 codes."""
        return replace(cls.b(), pixel_decoder=ENHANCED)

    @classmethod
    def b_256(cls) -> Self:
        """The same weights as `b_enhanced` at 256 px with interpolated positions: 817 codes, for generation."""
        quantizer = MultiScaleConfig(scales=(*B_SCALES, 16))
        return replace(cls.b_enhanced(), size=256, quantizer=quantizer)

    @classmethod
    def l(cls) -> Self:  # noqa: E743
        """TokenFlow-L: ViTamin-XL, 256 px, 817 codes. The scales of the code; the paper's table 11 adds a 3."""
        return cls(
            size=256,
            tower=TowerConfig(family="vitamin", size=256, width=1152, depth=32, heads=16, hidden=2304),
            semantic_decoder=SemanticDecoderConfig(width=1152, grid=16, teacher=1152),
            quantizer=MultiScaleConfig(scales=(*B_SCALES, 16)),
        )

    @classmethod
    def xl(cls) -> Self:
        """TokenFlow-XL: SigLIP so400m, 384 px, 2,227 codes; the pixel branch works at 432 px."""
        return cls(
            size=384,
            tower=TowerConfig(family="siglip", size=384, patch=14, width=1152, depth=27, heads=16, hidden=4304),
            semantic_decoder=SemanticDecoderConfig(width=1152, grid=27, teacher=1152),
            quantizer=MultiScaleConfig(scales=XL_SCALES),
            fit="squash",
        )

    @classmethod
    def mini(cls) -> Self:
        """Trains on two CPU cores: 64 px, 16x16 grid, 817 codes of 256; EfficientNet-Lite0 is tower and teacher."""
        # At this width 32 groups of one channel would erase the colour of a picture; a few thousand updates win it
        # back with 8 groups only in part, with the shortcut whole.
        pixels = VQGANConfig(width=32, multipliers=(1, 1, 2), blocks=1, latent=64, groups=8, shortcut=True)
        return cls(
            size=64,
            tower=TowerConfig(family="efficientnet", size=64, patch=4, width=112, heads=1),
            semantic_decoder=SemanticDecoderConfig(width=128, depth=1, heads=4, grid=16, teacher=112),
            pixel_encoder=pixels,
            pixel_decoder=pixels,
            quantizer=MultiScaleConfig(scales=(*B_SCALES, 16), dims=(16, 8), codes=256),
        )

    @classmethod
    def tiny(cls) -> Self:
        """The smallest that runs every part: 64 px, 4x4 grid, 256 codes, 30 codes a picture."""
        pixels = VQGANConfig(width=32, latent=64)
        return cls(
            size=64,
            tower=TowerConfig(size=64, width=128, depth=2, heads=2, hidden=512),
            semantic_decoder=SemanticDecoderConfig(width=128, heads=2, grid=4, teacher=64),
            pixel_encoder=pixels,
            pixel_decoder=pixels,
            quantizer=MultiScaleConfig(scales=(1, 2, 3, 4), dims=(16, 8), codes=256),
        )


class Decoded(NamedTuple):
    """What a feature map decodes to.

    Attributes:
        images: Shape (B, 3, size, size), about [-1, 1], not clamped.
        semantics: Prediction of the teacher's features, shape (B, g * g, T).
    """

    images: Tensor
    semantics: Tensor


class TokenFlow(Tokenizer):
    """The tokenizer. `encode` gives int64 codes, scale by scale; pictures are in [-1, 1]."""

    Config = TokenFlowConfig
    VARIANTS = ("b_256", "b", "b_enhanced", "l", "xl", "mini", "tiny")
    kind = "discrete"

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__(config)
        semantic, pixel = config.quantizer.dims
        latent = config.pixel_encoder.latent
        self.tower = SemanticTower(config.tower)
        self.encode_task = task_layer(config.tower.width, semantic)
        self.pixel_encoder = VQGANEncoder(config.pixel_encoder)
        self.to_code = nn.Conv2d(latent, pixel, 1)
        self.quantizer = MultiScaleQuantizer(config.quantizer)
        self.semantic_decoder = build_semantic_decoder(config.semantic_decoder, channels=semantic)
        self.decode_task = task_layer(config.semantic_decoder.width, config.semantic_decoder.teacher)
        self.from_code = nn.Conv2d(pixel, latent, 1)
        self.pixel_decoder = VQGANDecoder(config.pixel_decoder)

    @property
    def preprocessing(self) -> Preprocessing:
        """Values in [-1, 1]."""
        return Preprocessing(size=self.config.size, fit=self.config.fit)

    @property
    def tokens_per_image(self) -> int:
        """Codes of all scales."""
        return sum(self.config.quantizer.counts)

    @property
    def feature_dim(self) -> int:
        """Channels of both halves."""
        return self.config.quantizer.dim

    def feature_map(self, images: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """What is quantised: semantic and pixel channels side by side, shape (B, D, g, g).

        Args:
            images: Shape (B, 3, size, size) in [-1, 1].
            seen: What the tower gives for them, shape (B, g * g, width), where that is known already.
        """
        grid = self.config.quantizer.grid
        seen = self.tower(images) if seen is None else seen
        meaning = self.encode_task(seen).transpose(1, 2).unflatten(2, (grid, grid))
        side = self.config.pixel_size
        if images.shape[-1] != side:
            images = F.interpolate(images, size=(side, side), mode="bicubic")
        return torch.cat([meaning, self.to_code(self.pixel_encoder(images))], dim=1)

    def quantize(self, images: Tensor, *, drop: int | None = None, seen: Tensor | None = None) -> Quantized:
        """Encode with everything that training needs.

        Args:
            images: Shape (B, 3, size, size) in [-1, 1].
            drop: Leave one scale out, see `MultiScaleQuantizer`.
            seen: What the tower gives, see `feature_map`.
        """
        check_images(images, self.preprocessing)
        return self.quantizer(self.feature_map(images, seen=seen), drop=drop)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures, shape (B, 3, size, size) in [-1, 1], to codes, int64 (B, N).

        Raises:
            ValueError: Wrong shape, size, channels or value range.
        """
        return self.quantize(images).codes

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes of the first scales or all, int64 (B, n), to pictures (B, 3, size, size) about in [-1, 1].

        Raises:
            ValueError: n is not the length of a prefix of scales, or a code lies outside the codebook.
        """
        check_codes(tokens, size=self.config.quantizer.codes)
        return self.decode_pixels(self.quantizer.accumulate(tokens))

    def decode_pixels(self, features: Tensor) -> Tensor:
        """Quantised map, shape (B, D, g, g), to pictures (B, 3, size, size)."""
        size = self.config.size
        _, pixels = features.split(self.config.quantizer.dims, dim=1)
        # The quantizer computes in float32; a model in half precision goes on in its own.
        images = self.pixel_decoder(self.from_code(pixels.to(self.from_code.weight.dtype)))
        return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="bicubic")

    def decode_semantics(self, features: Tensor) -> Tensor:
        """Quantised map, shape (B, D, g, g), to the prediction of the teacher's features, shape (B, g * g, T)."""
        meaning, _ = features.split(self.config.quantizer.dims, dim=1)
        return self.decode_task(decode_semantics(self.semantic_decoder, meaning))

    def decode_features(self, features: Tensor) -> Decoded:
        """Quantised map, shape (B, D, g, g), to pictures and semantics."""
        expect_shape("features", features, (None, self.feature_dim, *(self.config.quantizer.grid,) * 2))
        return Decoded(self.decode_pixels(features), self.decode_semantics(features))

    def features(self, images: Tensor, *, choice: FeatureChoice = "last") -> Tensor:
        """Features for a language model, as the paper's table 8 compares them.

        Args:
            images: Shape (B, 3, size, size) in [-1, 1].
            choice: `last`: the sum of all scales on the finest grid, (B, g * g, D), the paper's choice and best;
                `semantic`: its semantic half, (B, g * g, D_semantic); `residual`: the vectors that each scale adds,
                (B, N, D); `all`: the sum after each scale on that scale's own grid, (B, N, D).

        Raises:
            ValueError: Bad pictures or an unknown choice.
        """
        quantized = self.quantize(images)
        return self.features_of(quantized.codes, choice=choice)

    def features_of(self, codes: Tensor, *, choice: FeatureChoice = "last") -> Tensor:
        """The same from codes of all scales, int64 (B, N).

        Raises:
            ValueError: Not the codes of all scales, a code outside the codebook, or an unknown choice.
        """
        check_codes(codes, size=self.config.quantizer.codes)
        expect_shape("codes", codes, (None, self.tokens_per_image))
        if choice == "residual":
            return self.quantizer.embed(codes)
        if choice == "all":
            return self._sums_per_scale(codes)
        rows = self.quantizer.accumulate(codes).flatten(2).transpose(1, 2)
        if choice == "last":
            return rows
        if choice == "semantic":
            return rows[..., : self.config.quantizer.dims[0]]
        raise ValueError(f"choice must be 'last', 'semantic', 'residual' or 'all', got {choice!r}")

    def _sums_per_scale(self, codes: Tensor) -> Tensor:
        rows, used = [], 0
        for side in self.config.quantizer.scales:
            used += side * side
            total = self.quantizer.accumulate(codes[:, :used])
            rows.append(F.adaptive_avg_pool2d(total, side).flatten(2).transpose(1, 2))
        return torch.cat(rows, dim=1)
