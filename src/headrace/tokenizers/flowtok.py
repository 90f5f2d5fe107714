"""FlowTok: text and images as one shape of token sequence, and a flow from either to the other.

Source: arXiv 2503.10772; TACJu/FlowTok for text-to-image. Image-to-text follows sec. 3.5 of the paper; its decoder and
training are our design, since nothing of it was released.
"""

# Shape letters in this file: B batch, K tokens, D channels, C text width.

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headrace.flow.solver import SolverSettings
from headrace.tokenizers.base import Preprocessing, check_images
from headrace.tokenizers.flow_tokenizer import FlowTokenizer, one_of
from headrace.tokenizers.flowtok_bridge import EVERYWHERE, ImageToText, TextToImage, transport
from headrace.tokenizers.flowtok_captions import CaptionEncoder
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_image import Posterior, TokenVAE


class FlowTok(FlowTokenizer):
    """One-dimensional image tokens, a text tower, and the flows between them. Images in [0, 1].

    Tokens (B, K, D) are scaled as the flow sees them (deviation about 1). A step grid saved with the weights is that of
    text-to-image.
    """

    Config = FlowTokConfig
    kind: ClassVar[Literal["discrete", "continuous"]] = "continuous"
    VARIANTS = ("xl", "b", "h", "tiny")

    scale: Tensor

    def __init__(self, config: FlowTokConfig) -> None:
        super().__init__(config)
        self.image = TokenVAE(config.image)
        self.captions = CaptionEncoder(config.captions)
        width = config.captions.width
        self.to_image = TextToImage(width, config.projector, config.net)
        self.to_text: ImageToText | None = None
        if config.to_text is not None:
            vocabulary = config.captions.vocabulary
            self.to_text = ImageToText(width, vocabulary, config.projector, config.net, config.to_text)
        self.register_buffer("scale", torch.tensor(config.scale_factor))

    @property
    def preprocessing(self) -> Preprocessing:
        """Centre crop, values in [0, 1]."""
        return Preprocessing(size=self.config.image.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    @property
    def tokens_per_image(self) -> int:
        """K."""
        return self.config.image.tokens

    @property
    def feature_dim(self) -> int:
        """Width of the image encoder."""
        return self.config.image.encoder.width

    def text_tokens(self, captions: Sequence[str]) -> Tensor:
        """Captions to the text tower's tokens, (B, K, C); errors as `CaptionIds`."""
        return self.captions(self.captions.ids(captions).to(self.device))

    def posterior(self, images: Tensor) -> Posterior:
        """Images (B, 3, S, S) in [0, 1] to the unscaled posterior; raises ValueError on a bad batch."""
        check_images(images, self.preprocessing)
        return self.image.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to the scaled means of their tokens, (B, K, D)."""
        return self.posterior(images).mean * self.scale

    def decode(self, tokens: Tensor, *, captions: Sequence[str] | None = None) -> Tensor:
        """Scaled tokens to images, (B, 3, S, S), about in [0, 1], not clamped.

        Args:
            tokens: (B, K, D).
            captions: One per image for the text-aware decoder; default empty captions.

        Raises:
            ValueError: Wrong shape, or another number of captions than images.
        """
        captions = [""] * len(tokens) if captions is None else captions
        if len(captions) != len(tokens):
            raise ValueError(f"{len(tokens)} images need as many captions, got {len(captions)}")
        return self.image.decode(tokens / self.scale, self.text_tokens(captions))

    def features(self, images: Tensor) -> Tensor:
        """What the encoder's queries hold before the bottleneck, (B, K, W)."""
        check_images(images, self.preprocessing)
        return self.image.encoder.queried(images)

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        *,
        steps: int | None = None,
        solver: SolverSettings | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] = EVERYWHERE,
        seed: int | None = 0,
    ) -> Tensor:
        """Captions to images.

        Args:
            captions: B texts.
            steps: Euler steps, default from the config (20).
            solver: In place of `steps`: how the flow is followed. Default: the step grid saved with the weights, else
                the config's steps.
            guidance: Scale, default from the config; 1 asks the network once per step, others twice in one batch.
            interval: Times that are guided, see `transport`.
            seed: Of the source's noise, the only diversity there is; None starts from the noise-free text tokens.

        Returns:
            (B, 3, S, S) in [0, 1].

        Raises:
            GridMismatch: The network is straightened for its own step grid, and another was asked for.
            ValueError: Guidance of a model that was trained without the indicator, bad captions, or as `transport`.
        """
        tokens = self.generate_tokens(
            captions, steps=steps, solver=solver, guidance=guidance, interval=interval, seed=seed
        )
        return self.decode(tokens, captions=captions).clamp(0, 1)

    @torch.no_grad()
    def generate_tokens(
        self,
        captions: Sequence[str],
        *,
        steps: int | None = None,
        solver: SolverSettings | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] = EVERYWHERE,
        seed: int | None = 0,
    ) -> Tensor:
        """Captions to scaled image tokens, (B, K, D), for `decode`; arguments and errors as `generate`.

        `decode(tokens)` without captions shows what the tokens alone hold: the decoder reads captions too.
        """
        source = self._source(self.text_tokens(captions), seed)
        if self.step_grid is not None:
            asked = one_of(solver, None if steps is None else SolverSettings(steps=steps))
            chosen = self.settings(asked, default=self.step_grid.settings)
            if chosen is not asked:  # a step count stays one: released weights read it in their own way
                steps, solver = None, chosen
        return self._carry(self.to_image, source, steps, solver, guidance, interval)

    @torch.no_grad()
    def caption(
        self,
        images: Tensor,
        *,
        steps: int | None = None,
        solver: SolverSettings | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] = EVERYWHERE,
    ) -> list[str]:
        """Images (B, 3, S, S) in [0, 1] to captions; arguments and errors as `generate`, but no saved step grid.

        Raises:
            ValueError: The model has no image-to-text half.
        """
        bridge = self.captioner()
        tokens = self._carry(bridge, self.encode(images), steps, solver, guidance, interval)
        return self.captions.ids.text(bridge.decoder(tokens).argmax(-1))

    @torch.no_grad()
    def measure_scale(self, images: Tensor) -> float:
        """Set the token scale to one over the deviation of these images' tokens, and return it.

        Call once between training the image tokenizer and the flow; the published 1.0143 fits the released one only.
        """
        self.scale.copy_(1 / self.posterior(images).mean.std())
        return float(self.scale)

    def captioner(self) -> ImageToText:
        """The image-to-text half; raises ValueError if there is none."""
        if self.to_text is None:
            raise ValueError("this FlowTok has no image-to-text half; build it with FlowTokConfig(to_text=...)")
        return self.to_text

    def _source(self, text: Tensor, seed: int | None) -> Tensor:
        posterior = self.to_image.projector(text)
        if seed is None:
            return posterior.mean
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
        return posterior.sample(noise.to(posterior.mean))

    def _carry(
        self,
        bridge: TextToImage | ImageToText,
        source: Tensor,
        steps: int | None,
        solver: SolverSettings | None,
        guidance: float | None,
        interval: tuple[float, float],
    ) -> Tensor:
        config = self.config
        guidance = config.guidance if guidance is None else guidance
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance must be a finite number of at least 0, got {guidance}")
        if guidance != 1 and not config.indicator_probability:
            raise ValueError(
                f"guidance {guidance:g} needs the matched/unmatched indicator, but this model was trained without it "
                "(indicator_probability 0); use guidance=1"
            )
        return transport(
            bridge.velocity,
            source,
            steps=config.steps if steps is None and solver is None else steps,
            solver=solver,
            guidance=guidance,
            interval=interval,
            legacy_grid=config.legacy_grid,
        )
