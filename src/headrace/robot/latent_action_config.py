"""Sizes and settings of latent action models: ViPRA's published one, a tiny one, and those of its relatives."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from headrace.datasets.video_clips import check_window
from headrace.nn.patches import patch_grid
from headrace.nn.quantizers.finite_scalar import FiniteScalarConfig
from headrace.nn.quantizers.noise_substitution import NoiseSubstitutionConfig
from headrace.nn.quantizers.vector import VectorConfig
from headrace.nn.spatiotemporal import SpatiotemporalConfig
from headrace.robot.frame_features import FrameFeaturesConfig
from headrace.robot.token_reducer import Reduction

QuantizerConfig = NoiseSubstitutionConfig | VectorConfig | FiniteScalarConfig


def _encoder() -> SpatiotemporalConfig:
    return SpatiotemporalConfig(depth=6)


def _decoder() -> SpatiotemporalConfig:
    return SpatiotemporalConfig(depth=8, causal=True, conditioned=True)


@dataclass(frozen=True, kw_only=True)
class LatentActionConfig:
    """A latent action model; the defaults are ViPRA's published size.

    Attributes:
        image_size: Side of the frames [px].
        window: Left, top and side of the part of each picture that the frames show, as shares of it; None for all.
        frames: Frames of a training clip; other lengths run as well.
        features: The network that looks at single frames.
        encoder: Blocks over the clip's features; not causal.
        decoder: Blocks that predict the next frame; causal and conditioned.
        quantizer: Codebook.
        tokens: Codes per transition from one frame to the next.
        reduction: How a transition's features become `tokens` rows.
        differences: Whether a transition is the difference of its frames' features, or those of its second frame.
        unit_rows: Whether rows are brought to mean 0 and deviation 1 before the quantiser. ViPRA leaves them; a fresh
            reducer's are a fiftieth of the codes' size, and NSVQ's noise is as large as the codes.
        target: Whether the next frame's pixels are predicted or the features that `features` gives of it.
        residual: Whether predicted pixels are added to the present frame. ViPRA predicts the whole frame; a short run
            starts better from a copy of the present one.
        history_offset: Frames between the frames of a clip, in frames of the source.
        fps: Frame rate of the source the model was trained for [Hz]; None if it was trained on several.
    """

    image_size: int = 224
    window: tuple[float, float, float] | None = None
    frames: int = 8
    features: FrameFeaturesConfig = field(default_factory=FrameFeaturesConfig)
    encoder: SpatiotemporalConfig = field(default_factory=_encoder)
    decoder: SpatiotemporalConfig = field(default_factory=_decoder)
    quantizer: NoiseSubstitutionConfig | VectorConfig | FiniteScalarConfig = field(
        default_factory=NoiseSubstitutionConfig
    )
    tokens: int = 16
    reduction: Reduction = "convolution"
    differences: bool = False
    unit_rows: bool = False
    target: Literal["pixels", "features"] = "pixels"
    residual: bool = False
    history_offset: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        patch_grid(self.image_size, self.image_size, self.features.patch)
        check_window(self.window)
        if self.frames < 2:
            raise ValueError(f"a clip needs at least 2 frames, got {self.frames}")
        if self.tokens < 1 or self.history_offset < 1:
            raise ValueError(f"tokens and history_offset must be at least 1, got {self.tokens}, {self.history_offset}")
        if self.features.width != self.encoder.width:
            raise ValueError(
                f"features and encoder must have one width, got {self.features.width} and {self.encoder.width}"
            )
        if not (self.decoder.causal and self.decoder.conditioned) or self.encoder.conditioned:
            raise ValueError("the decoder must be causal and conditioned, the encoder not conditioned")
        if self.reduction not in ("convolution", "queries"):
            raise ValueError(f"unknown reduction {self.reduction!r} (known: convolution, queries)")
        if self.target not in ("pixels", "features"):
            raise ValueError(f"unknown target {self.target!r} (known: pixels, features)")
        if self.residual and self.target != "pixels":
            raise ValueError("residual adds to pixels; the target is features")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be above 0 Hz or None, got {self.fps}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a frame."""
        return patch_grid(self.image_size, self.image_size, self.features.patch)

    @classmethod
    def tiny(cls, *, image_size: int = 64, patch: int = 8) -> Self:
        """Frames of 64 px in patches of 8, about 4.1 million parameters, four tokens of eight codes."""
        shape: dict[str, Any] = {"width": 192, "heads": 4, "head_width": 32}
        return cls(
            image_size=image_size,
            features=FrameFeaturesConfig(kind="stem", name="", width=192, patch=patch),
            encoder=SpatiotemporalConfig(depth=2, **shape),
            decoder=SpatiotemporalConfig(depth=3, causal=True, conditioned=True, **shape),
            quantizer=NoiseSubstitutionConfig(codes=8, width=16),
            tokens=4,
        )

    def at_tiny_size(self) -> Self:
        """The same kind of model at the size of `tiny`: 64 px in patches of 8 through a stem, width 192, 2 + 3 blocks.

        Frames, quantiser, codes, reduction, target and whether features are frozen stay. Tokens of a convolution fall
        with the grid, as it strides over it; those of queries stay.
        """
        shape: dict[str, Any] = {"width": 192, "heads": 4, "head_width": 32}
        rows, columns = self.grid
        tokens = self.tokens if self.reduction == "queries" else max(1, self.tokens * 64 // (rows * columns))
        quantizer = self.quantizer
        if not isinstance(quantizer, FiniteScalarConfig):
            quantizer = replace(quantizer, width=16)
        return replace(
            self,
            image_size=64,
            features=FrameFeaturesConfig(kind="stem", name="", width=192, patch=8, frozen=self.features.frozen),
            encoder=replace(self.encoder, depth=2, **shape),
            decoder=replace(self.decoder, depth=3, **shape),
            quantizer=quantizer,
            tokens=tokens,
        )

    @classmethod
    def lapa(cls) -> Self:
        """As LAPA: pairs of frames of 256 px in patches of 32, differences, 4 NSVQ tokens; width 1024, 8 + 8 blocks.

        Source: LatentActionPretraining/LAPA@46aca51. Blocks, reducer and decoder are ViPRA's.
        """
        shape: dict[str, Any] = {"width": 1024, "depth": 8, "heads": 16, "head_width": 64}
        return cls(
            image_size=256,
            frames=2,
            features=FrameFeaturesConfig(kind="stem", name="", width=1024, patch=32),
            encoder=SpatiotemporalConfig(**shape),
            decoder=SpatiotemporalConfig(causal=True, conditioned=True, **shape),
            quantizer=NoiseSubstitutionConfig(codes=8, width=32),
            tokens=4,
            differences=True,
        )

    @classmethod
    def univla(cls) -> Self:
        """As UniVLA: pairs, 4 tokens of 16 codes by queries, VQ, predicts features; 12 + 12 blocks, no language.

        Source: OpenDriveLab/UniVLA@0ab9e9d, whose decoder also reads the instruction through T5; this one does not.
        """
        return cls(
            frames=2,
            features=FrameFeaturesConfig(frozen=True),
            encoder=SpatiotemporalConfig(depth=12),
            decoder=SpatiotemporalConfig(depth=12, causal=True, conditioned=True),
            quantizer=VectorConfig(codes=16, width=128, commitment=0.25, decay=None),
            tokens=4,
            reduction="queries",
            target="features",
        )

    @classmethod
    def moto(cls) -> Self:
        """As Moto: pairs, 8 tokens of 128 codes by queries, VQ, predicts pixels; 4 encoder blocks.

        Source: TencentARC/Moto@4471f76, whose frames go through a frozen MAE-L; here DINOv2-B, frozen too.
        """
        return cls(
            frames=2,
            features=FrameFeaturesConfig(frozen=True),
            encoder=SpatiotemporalConfig(depth=4),
            decoder=SpatiotemporalConfig(depth=12, causal=True, conditioned=True),
            quantizer=VectorConfig(codes=128, width=32, commitment=0.25, decay=None),
            tokens=8,
            reduction="queries",
        )
