"""The latent action model: what moved between two frames, as a few codes, and the next frame from the codes.

Source: ViPRA, stage 1 (arXiv 2511.07732; sroutray/vipra@d5d8c0d, laq/model/latent_action_quantization.py).
"""
# Shape letters: B batch, T frames, N tokens of a transition, Q width of a code, D width, P patches of a frame.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.patches import unpatchify
from headrace.nn.pretrained import Pretrained
from headrace.nn.quantizers.finite_scalar import FiniteScalar, FiniteScalarConfig
from headrace.nn.quantizers.noise_substitution import NoiseSubstitution, NoiseSubstitutionConfig
from headrace.nn.quantizers.rows import QuantizedRows
from headrace.nn.quantizers.vector import Vector
from headrace.nn.shapes import expect_shape
from headrace.nn.spatiotemporal import GatedNetwork, SpatiotemporalStack
from headrace.robot.frame_features import FrameFeatures
from headrace.robot.latent_action_config import LatentActionConfig, QuantizerConfig
from headrace.robot.token_reducer import ConvolutionReducer, QueryReducer


class LatentActions(NamedTuple):
    """The latent actions of a clip.

    Attributes:
        codes: Shape (B, T-1, N), int64; entry k is the transition from frame k to frame k + 1.
        vectors: What the decoder takes, shape (B, T-1, N, Q).
        loss: What the quantiser adds to the training loss, a scalar.
    """

    codes: Tensor
    vectors: Tensor
    loss: Tensor


class Prediction(NamedTuple):
    """Frames 1 .. T-1 of a clip, each predicted from the true frames before it and its latent action.

    Attributes:
        frames: Shape (B, T-1, 3, H, W), about [0, 1] and not clipped; or features (B, T-1, P, D), as the config says.
        actions: The latent actions.
    """

    frames: Tensor
    actions: LatentActions


def build_quantizer(config: QuantizerConfig) -> NoiseSubstitution | Vector | FiniteScalar:
    """The quantiser of a config."""
    if isinstance(config, NoiseSubstitutionConfig):
        return NoiseSubstitution(config)
    return FiniteScalar(config) if isinstance(config, FiniteScalarConfig) else Vector(config)


class InverseDynamicsEncoder(nn.Module):
    """From a clip to the rows that the quantiser takes."""

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        width, code_width = config.encoder.width, config.quantizer.width
        self.features = FrameFeatures(config.features)
        self.blocks = SpatiotemporalStack(config.encoder)
        self.reducer: nn.Module = (
            ConvolutionReducer(width, config.grid, config.tokens, code_width)
            if config.reduction == "convolution"
            else QueryReducer(width, config.tokens, code_width, heads=config.encoder.heads)
        )

    def frame_features(self, clip: Tensor) -> Tensor:
        """Features of single frames, shape (B, T, P, D); `from_features` goes on from them."""
        return self.features(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])

    def in_context(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Features (B, T, P, D) of every frame in the light of the others, shape (B, T, rows, columns, D)."""
        return self.blocks(features, self.config.grid, frame_mask=frame_mask).unflatten(2, self.config.grid)

    def states(self, clip: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Both of these for a clip, shape (B, T, rows, columns, D)."""
        return self.in_context(self.frame_features(clip), frame_mask)

    def from_features(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Rows of every transition, shape (B, T-1, N, Q), from features (B, T, P, D) of single frames."""
        states = self.in_context(features, frame_mask)
        rows = self.reducer(states[:, 1:] - states[:, :-1] if self.config.differences else states[:, 1:])
        return F.layer_norm(rows, rows.shape[-1:]) if self.config.unit_rows else rows

    def forward(self, clip: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Rows of every transition, shape (B, T-1, N, Q)."""
        return self.from_features(self.frame_features(clip), frame_mask)


class ForwardDynamicsDecoder(nn.Module):
    """From frames and latent actions to the next frames."""

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.decoder.width, config.features.patch
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.patch_norm = nn.LayerNorm(width)
        self.condition = nn.Linear(config.tokens * config.quantizer.width, width)
        self.condition_network = GatedNetwork(width, dropout=config.decoder.dropout)
        self.blocks = SpatiotemporalStack(config.decoder)
        out = 3 * patch * patch if config.target == "pixels" else config.features.width
        self.out = nn.Linear(width, out)
        if config.residual:  # training begins at the present frame, not at noise added to it
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def conditions(self, vectors: Tensor) -> Tensor:
        """Vectors of shape (B, T, N, Q) to one vector per transition, shape (B, T, D)."""
        return self.condition_network(self.condition(vectors.flatten(2)))

    def forward(self, frames: Tensor, vectors: Tensor) -> Tensor:
        """The frame after each of `frames` (B, T, 3, H, W), given (B, T, N, Q); see `Prediction.frames`."""
        patches = self.patches(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = self.patch_norm(patches).unflatten(0, frames.shape[:2])
        condition = self.conditions(vectors)
        tokens = torch.cat((tokens, condition[:, :, None]), 2)
        out = self.out(self.blocks(tokens, self.config.grid, condition=condition)[:, :, :-1])
        if self.config.target == "features":
            return out
        pixels = unpatchify(out.flatten(0, 1), self.config.grid).unflatten(0, frames.shape[:2])
        return frames + pixels if self.config.residual else pixels


class LatentActionModel(Pretrained):
    """Encoder, quantiser and decoder; trained to predict each next frame, used to label videos with codes."""

    Config = LatentActionConfig
    config: LatentActionConfig

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__(config)
        self.encoder = InverseDynamicsEncoder(config)
        self.quantizer = build_quantizer(config.quantizer)
        self.decoder = ForwardDynamicsDecoder(config)

    def encode(
        self, clip: Tensor, *, frame_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> LatentActions:
        """Latent actions of a clip.

        The encoder sees the whole clip in both directions, so the codes of a transition depend on the window around it.

        Args:
            clip: Frames in [0, 1], shape (B, T, 3, S, S), at least 2 frames; S is the config's `image_size`.
            frame_mask: Shape (B, T), False hides padding from the other frames.
            generator: Randomness of the quantiser in training mode.

        Raises:
            ValueError: Another shape, or fewer than 2 frames.
        """
        self._check(clip, "clip", at_least=2)
        return self.quantize(self.encoder(clip, frame_mask), generator=generator)

    def quantize(self, rows: Tensor, *, generator: torch.Generator | None = None) -> LatentActions:
        """Codes and vectors of encoder rows of shape (B, T-1, N, Q)."""
        expect_shape("rows", rows, (None, None, self.config.tokens, self.config.quantizer.width))
        result: QuantizedRows = self.quantizer(rows.flatten(0, 2).float(), generator=generator)
        shape = rows.shape[:3]
        return LatentActions(result.codes.unflatten(0, shape), result.rows.unflatten(0, shape), result.loss)

    def vectors(self, codes: Tensor) -> Tensor:
        """The decoder's vectors of codes (B, T, N), shape (B, T, N, Q).

        Raises:
            ValueError: Another number of tokens, or a code outside the codebook.
        """
        expect_shape("codes", codes, (None, None, self.config.tokens))
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.quantizer.codes:
            raise ValueError(f"codes must lie in 0..{self.quantizer.codes - 1}, got {codes.min()}..{codes.max()}")
        return self.quantizer.lookup(codes)

    def decode(self, frames: Tensor, vectors: Tensor) -> Tensor:
        """The frame after each given frame, from the frames up to it and their latent actions.

        Args:
            frames: In [0, 1], shape (B, T, 3, S, S).
            vectors: One transition per frame, shape (B, T, N, Q).

        Returns:
            Shape (B, T, 3, S, S), not clipped; or features (B, T, P, D), as the config says.

        Raises:
            ValueError: Shapes do not fit.
        """
        self._check(frames, "frames", at_least=1)
        expect_shape("vectors", vectors, (*frames.shape[:2], self.config.tokens, self.config.quantizer.width))
        return self.decoder(frames, vectors)

    def forward(self, clip: Tensor, *, generator: torch.Generator | None = None) -> Prediction:
        """Encode a clip (B, T, 3, S, S), quantise, and predict frames 1 .. T-1 from the true frames before them."""
        actions = self.encode(clip, generator=generator)
        return Prediction(self.decode(clip[:, :-1], actions.vectors), actions)

    @torch.no_grad()
    def rollout(self, frames: Tensor, vectors: Tensor) -> Tensor:
        """Predict on from a few frames, feeding predictions back; also carries one clip's actions over to another.

        Args:
            frames: First F frames in [0, 1], shape (B, F, 3, S, S).
            vectors: Latent actions from the first frame on, shape (B, A, N, Q), A at least F.

        Returns:
            Frames F .. A, shape (B, A - F + 1, 3, S, S), not clipped.

        Raises:
            ValueError: The model predicts features, shapes do not fit, or there are fewer actions than frames.
        """
        if self.config.target != "pixels":
            raise ValueError("rollout needs a model whose target is pixels; this one predicts features")
        self._check(frames, "frames", at_least=1)
        given, actions = frames.shape[1], vectors.shape[1]
        if actions < given:
            raise ValueError(f"{given} frames need at least {given} latent actions, got {actions}")
        for count in range(given, actions + 1):
            following = self.decode(frames, vectors[:, :count])[:, -1:]
            frames = torch.cat((frames, following), 1)
        return frames[:, given:]

    def optimizer_groups(self, lr: float, *, features_factor: float = 0.1) -> list[dict[str, object]]:
        """Parameter groups for AdamW: frame features learn at a fraction of `lr`; biases and codes do not decay."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                slow = name.startswith("encoder.features.")
                groups.setdefault((slow, parameter.ndim == 1 or "codebook" in name), []).append(parameter)
        return [
            {"params": members, "lr": lr * features_factor if slow else lr, **({"weight_decay": 0.0} if plain else {})}
            for (slow, plain), members in groups.items()
        ]

    def _check(self, frames: Tensor, name: str, *, at_least: int) -> None:
        side = self.config.image_size
        expect_shape(name, frames, (None, None, 3, side, side))
        if frames.shape[1] < at_least:
            raise ValueError(f"{name} must have at least {at_least} frames, got {frames.shape[1]}")
