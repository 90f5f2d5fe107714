"""UniFlow's configuration: which encoder, how wide a bottleneck, which decoder, which losses."""

from dataclasses import dataclass, field
from typing import Literal, Self

from headrace.nn.distill import WEIGHTINGS, Weighting
from headrace.nn.patch_flow import PatchFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS, ViTConfig

TimeSampling = Literal["fat_lognormal", "lognormal", "uniform"]


@dataclass(frozen=True, kw_only=True)
class UniFlowConfig:
    """Everything that defines a UniFlow tokenizer and its loss.

    Attributes:
        encoder: The adapted vision transformer.
        latent_channels: Numbers per token in the bottleneck (64 in the release).
        latent_norm: `layernorm` normalises each latent without learned scale (a third-party fork does); release none.
        global_depth: Global transformer blocks, the only place in the decoder where patches see each other.
        global_heads: Their heads; 16 for official weights.
        flow_depth: Blocks of the per-patch flow head.
        flow_segments: Equal segments of time, each with a third of those blocks of its own (BFM), drawn evenly in
            training whatever `time_sampling` says; 1 is UniFlow.
        flow_width: Its width, at least the numbers in one patch; 0 takes the encoder width.
        steps: Default number of Euler steps in `decode`.
        schedule_power: Step schedule, 1 is uniform; see `power_grid`.
        target_scale: Factor on normalised pixels so that their deviation is about 1 (2 for encoders with std 0.5).
        interpolate_positions: False refuses grids other than the native one.
        zero_init: Zero-initialise the head's gates and output; see `PatchFlowConfig`.
        init_gain: How wide new layers start, see `draw_weights`; 0 is the release.
        allow_narrow_head: Accept a head that is narrower than a patch (only to read such checkpoints).
        time_sampling: Law of the training times.
        time_per: One time per `patch` (third-party training code) or per `image`.
        beta: Sharpness of the adaptive distillation weights.
        weighting: Layer weighting of the distillation; `adaptive` is the paper's.
        distill_weight: Factor on the distillation loss.
        flow_weight: Factor on the flow loss.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    latent_channels: int = 64
    latent_norm: Literal["none", "layernorm"] = "none"
    global_depth: int = 6
    global_heads: int = 16
    flow_depth: int = 12
    flow_segments: int = 1
    flow_width: int = 0
    steps: int = 1
    schedule_power: float = 1.0
    target_scale: float = 1.0
    interpolate_positions: bool = True
    zero_init: bool = False
    init_gain: float = 0.0
    allow_narrow_head: bool = False
    time_sampling: TimeSampling = "fat_lognormal"
    time_per: Literal["patch", "image"] = "patch"
    beta: float = 2.0
    weighting: Weighting = "adaptive"
    distill_weight: float = 1.0
    flow_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "global_heads", "flow_depth", "flow_segments", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.global_depth < 0 or self.flow_width < 0:
            raise ValueError("global_depth and flow_width must not be negative")
        if self.encoder.width % self.global_heads or self.encoder.width % 4:
            raise ValueError(f"encoder width {self.encoder.width} must divide by 4 and by {self.global_heads} heads")
        if self.steps < self.flow_segments:
            raise ValueError(f"{self.flow_segments} flow_segments need at least as many steps, got {self.steps}")
        if self.schedule_power <= 0 or self.target_scale <= 0:
            raise ValueError("schedule_power and target_scale must be positive")
        if min(self.distill_weight, self.flow_weight, self.beta) < 0:
            raise ValueError("distill_weight, flow_weight and beta must not be negative")
        for name, known in (
            ("weighting", WEIGHTINGS),
            ("latent_norm", ("none", "layernorm")),
            ("time_per", ("patch", "image")),
            ("time_sampling", ("fat_lognormal", "lognormal", "uniform")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        _ = self.flow_head

    @property
    def flow_head(self) -> PatchFlowConfig:
        """Sizes of the flow head; raises ValueError when it is narrower than a patch."""
        return PatchFlowConfig(
            patch_dim=3 * self.encoder.patch**2,
            condition_dim=self.encoder.width,
            width=self.flow_width or self.encoder.width,
            depth=self.flow_depth,
            zero_init=self.zero_init,
            init_gain=self.init_gain,
            allow_narrow=self.allow_narrow_head,
        )

    @classmethod
    def internvit_300m(cls) -> Self:
        """The released model: 452.6M parameters, 448 px, 1024 tokens of 64 numbers."""
        return cls(encoder=ENCODERS["internvit-300m"])

    @classmethod
    def dinov2_l(cls) -> Self:
        """DINOv2 ViT-L/14, 518 px, 1369 tokens."""
        return cls(encoder=ENCODERS["dinov2-l"])

    @classmethod
    def dfn_clip_l(cls) -> Self:
        """DFN CLIP ViT-L/14, 224 px, 256 tokens."""
        return cls(encoder=ENCODERS["dfn-clip-l"])

    @classmethod
    def siglip2_so400m(cls) -> Self:
        """SigLIP2 SO400M/16, 256 px, 256 tokens."""
        return cls(encoder=ENCODERS["siglip2-so400m"], target_scale=2.0)

    @classmethod
    def tiny(cls) -> Self:
        """64 px, 64 tokens of 32 numbers, 6.4M parameters; respects the width rule (256 >= 192)."""
        return cls(encoder=ENCODERS["tiny"], latent_channels=32, global_depth=2, flow_depth=3, init_gain=1.0)
