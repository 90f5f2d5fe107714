"""FlowTok's configuration, with the published sizes."""

from dataclasses import dataclass, field
from typing import Literal, Self

from headrace.nn.dit import SequenceDiTConfig
from headrace.tokenizers.flowtok_captions import CaptionConfig
from headrace.tokenizers.flowtok_image import TokenVAEConfig, TowerConfig
from headrace.tokenizers.flowtok_text import ProjectorConfig, TextDecoderConfig

KLForm = Literal["wall6", "gaussian"]
KLReduction = Literal["per_sample_sum", "mean", "batch_sum"]
# Width, depth, heads of the velocity network. B, XL and H are in the paper, S and L in the code only.
NETS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16), "h": (1280, 36, 20)}
TINY_WORDS = ("red", "green", "blue", "square", "circle", "triangle", "top", "bottom", "left", "right")


def published_net(name: str, *, time_scale: float = 1000.0) -> SequenceDiTConfig:
    """The velocity network of size s, b, l, xl or h over 77 tokens of 16 numbers."""
    width, depth, heads = NETS[name]
    return SequenceDiTConfig(tokens=77, channels=16, width=width, depth=depth, heads=heads, time_scale=time_scale)


@dataclass(frozen=True, kw_only=True)
class FlowTokConfig:
    """Everything that defines a FlowTok.

    Attributes:
        image: Image tokenizer.
        captions: Frozen text tower.
        projector: Text projector and alignment head.
        net: Velocity network, the same size for both directions; its tokens and channels are those of `image`.
        to_text: Decoder of text tokens; None builds no image-to-text half (nothing of it was released).
        scale_factor: Image tokens are multiplied by it before the flow; 1 over their deviation.
        sigma_min: Width left around the target at t=1.
        indicator_probability: Share of training samples with somebody else's target; 0 trains without guidance.
        kl_form: `wall6` (code) or `gaussian` (paper).
        kl_reduction: `per_sample_sum` (CrossFlow), `mean`, or `batch_sum`, which the FlowTok code uses: its strength
            grows with the batch.
        kl_weight: 0.01 in the code (with `batch_sum`), 1e-4 in the paper (reduction not stated).
        align_weight: Factor on the contrastive loss.
        early_times: Image-to-text trains on times `u ** early_times`, u even in [0, 1): 1 is uniform, more means more
            near the beginning, where it is decided which caption. The paper does not say what it used.
        guidance: Default guidance scale in sampling.
        steps: Default Euler steps.
        legacy_grid: See `transport`.
    """

    image: TokenVAEConfig = field(default_factory=TokenVAEConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    net: SequenceDiTConfig = field(default_factory=lambda: published_net("xl"))
    to_text: TextDecoderConfig | None = None
    scale_factor: float = 1.0143
    sigma_min: float = 1e-5
    indicator_probability: float = 0.1
    kl_form: KLForm = "wall6"
    kl_reduction: KLReduction = "per_sample_sum"
    kl_weight: float = 1e-2
    align_weight: float = 1.0
    early_times: float = 2.5
    guidance: float = 2.0
    steps: int = 20
    legacy_grid: bool = False

    def __post_init__(self) -> None:
        for name, got in (("captions.context", self.captions.context), ("net.tokens", self.net.tokens)):
            if got != self.image.tokens:
                raise ValueError(f"image.tokens is {self.image.tokens} but {name} {got}: the flow needs one shape")
        if self.net.channels != self.image.channels or self.net.classes != 2:
            raise ValueError(f"net needs {self.image.channels} channels and 2 classes, got {self.net}")
        if self.captions.width != self.image.text_width:
            raise ValueError(f"image.text_width is {self.image.text_width}, captions.width {self.captions.width}")
        if self.captions.width % self.projector.heads:
            raise ValueError(f"captions.width {self.captions.width} must divide by {self.projector.heads} heads")
        if not 0 <= self.indicator_probability < 1 or not 0 <= self.sigma_min < 1:
            raise ValueError("indicator_probability and sigma_min must lie in [0, 1)")
        if self.kl_form not in ("wall6", "gaussian") or self.kl_reduction not in (
            "per_sample_sum",
            "mean",
            "batch_sum",
        ):
            raise ValueError(f"unknown kl_form {self.kl_form!r} or kl_reduction {self.kl_reduction!r}")
        if self.early_times <= 0:
            raise ValueError(f"early_times must be positive, got {self.early_times}")
        if self.scale_factor <= 0 or self.steps < 1 or min(self.kl_weight, self.align_weight, self.guidance) < 0:
            raise ValueError("scale_factor and steps must be positive, weights and guidance not negative")
        if not self.indicator_probability and self.guidance != 1:
            raise ValueError("without an indicator in training there is nothing to guide with: set guidance=1")

    @classmethod
    def b(cls) -> Self:
        """153M parameters with the projector; both directions."""
        return cls(net=published_net("b"), to_text=TextDecoderConfig())

    @classmethod
    def xl(cls) -> Self:
        """698M parameters with the projector; both directions."""
        return cls(net=published_net("xl"), to_text=TextDecoderConfig())

    @classmethod
    def h(cls) -> Self:
        """1.1B parameters with the projector; both directions."""
        return cls(net=published_net("h"), to_text=TextDecoderConfig())

    @classmethod
    def tiny(cls) -> Self:
        """32 px, 12 tokens of 4 numbers, 36 captions of colour, shape and place; both directions."""
        return cls(
            image=TokenVAEConfig(
                image_size=32,
                patch=8,
                tokens=12,
                channels=4,
                text_width=32,
                encoder=TowerConfig(width=64, depth=2, heads=4),
                decoder=TowerConfig(width=64, depth=3, heads=4),
                initial_logvar=-10.0,
                init_gain=1.0,
            ),
            captions=CaptionConfig(words=TINY_WORDS, context=12, width=32, depth=1, heads=4, hidden=64),
            projector=ProjectorConfig(blocks=2, heads=4, hidden=48, align_hidden=32),
            net=SequenceDiTConfig(tokens=12, channels=4, width=64, depth=3, heads=4),
            to_text=TextDecoderConfig(width=32, blocks=2, heads=4),
            indicator_probability=0.25,
            kl_weight=0.3,
            scale_factor=1.0,
        )
