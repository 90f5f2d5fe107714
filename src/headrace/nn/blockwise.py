"""Blockwise velocity networks: a shared trunk, and one small stack of blocks for each segment of time.

The trunk reads state, time, condition and context into features; the stack of the present segment turns state and
features into a velocity. The features change slowly, so inside a segment they can be approximated: held, or
corrected by a small residual network. One class serves picture latents (attention on a plane), per-patch
decoders (no mixing between tokens) and action chunks (attention over the horizon, with context tokens for the trunk).
`trunk_depth=0` with one segment is the plain network of the same kind, for comparisons.

Source: Blockwise Flow Matching, arXiv 2510.21167; mlvlab/Blockwise-Flow-Matching@5e7ae87 (facts only).
"""

# Shape letters in this file: B batch, N tokens, C channels of a token, W width, S context tokens.

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.axial_rope import axial_angles
from headrace.nn.modulated_block import ModulatedBlock
from headrace.nn.pretrained import Pretrained
from headrace.nn.shapes import expect_shape
from headrace.nn.time_embedding import TimeEmbedding

TIME_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class BlockwiseConfig:
    """Sizes of the network; the defaults are the published XL model on 32x32x4 latents in 2x2 patches.

    Attributes:
        channels: C.
        width: W.
        heads: Attention heads.
        grid: Rows and columns of the tokens; one row for a sequence such as an action chunk.
        trunk_depth: Blocks of the shared trunk; 0 for a plain network without features.
        velocity_depth: Blocks of each segment's stack.
        residual_depth: Blocks of the feature residual network; 0 for none.
        borders: Segment borders rising from 0 to 1, such as the times of a Bellman grid.
        condition_dim: Numbers of the condition, given per sample (B, condition_dim) or per token.
        context_dim: Width of the context tokens that the trunk attends to; 0 for none.
        mixing: `attention` between tokens, or `none` (each token for itself, the per-patch decoder).
        mlp_ratio: Hidden width of the MLP over W.
        modulation_rank: Rank of each block's own modulation.
        align_dim: Width of a foreign encoder's tokens that the trunk is aligned to; 0 for none.
    """

    channels: int = 16
    width: int = 1152
    heads: int = 16
    grid: tuple[int, int] = (16, 16)
    trunk_depth: int = 20
    velocity_depth: int = 5
    residual_depth: int = 4
    borders: tuple[float, ...] = tuple(k / 6 for k in range(7))
    condition_dim: int = 1152
    context_dim: int = 0
    mixing: Literal["attention", "none"] = "attention"
    mlp_ratio: float = 4.0
    modulation_rank: int = 288
    align_dim: int = 768

    def __post_init__(self) -> None:
        for name in ("channels", "width", "heads", "velocity_depth", "condition_dim", "modulation_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("trunk_depth", "residual_depth", "context_dim", "align_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        if self.mixing == "attention" and self.width // self.heads % 4:
            raise ValueError(f"width / heads must be divisible by 4, got {self.width // self.heads}")
        if self.borders[0] != 0.0 or self.borders[-1] != 1.0 or any(a >= b for a, b in pairwise(self.borders)):
            raise ValueError(f"borders must rise strictly from 0 to 1, got {list(self.borders)}")
        if self.trunk_depth == 0 and (self.residual_depth or self.align_dim or self.context_dim):
            raise ValueError("without a trunk there are no features: residual_depth, align_dim, context_dim must be 0")
        if self.mixing == "none" and self.context_dim:
            raise ValueError("context needs attention: set mixing='attention' or context_dim=0")

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def segments(self) -> int:
        """Number of time segments."""
        return len(self.borders) - 1

    @classmethod
    def tiny(cls) -> Self:
        """A 4x4 plane, two segments; builds in a moment."""
        return cls(channels=3, width=32, heads=2, grid=(4, 4), trunk_depth=2, velocity_depth=1, residual_depth=1,
                   borders=(0.0, 0.5, 1.0), condition_dim=5, modulation_rank=4, align_dim=6)  # fmt: skip

    @classmethod
    def actions(cls, *, action_dim: int, horizon: int, context_dim: int, width: int = 256) -> Self:
        """A light decoder of action chunks: six trunk blocks that see the context, one velocity block per segment."""
        return cls(channels=action_dim, width=width, heads=width // 32, grid=(1, horizon), trunk_depth=6,
                   velocity_depth=1, residual_depth=1, borders=(0.0, 0.25, 0.5, 0.75, 1.0), condition_dim=context_dim,
                   context_dim=context_dim, modulation_rank=max(1, width // 8), align_dim=0)  # fmt: skip

    @classmethod
    def patches(
        cls,
        *,
        patch_dim: int,
        condition_dim: int,
        width: int,
        grid: tuple[int, int],
        depth: int = 12,
        segments: int = 4,
        residual_depth: int = 2,
    ) -> Self:
        """A per-patch pixel decoder like UniFlow's: of `depth` blocks a third per segment, each patch for itself."""
        own = max(1, depth // 3)
        return cls(channels=patch_dim, width=width, heads=1, grid=grid, trunk_depth=depth - own, velocity_depth=own,
                   residual_depth=residual_depth, borders=tuple(k / segments for k in range(segments + 1)),
                   condition_dim=condition_dim, mixing="none", mlp_ratio=1.0, modulation_rank=max(1, width // 4),
                   align_dim=0)  # fmt: skip


def _block(config: BlockwiseConfig, condition_width: int) -> ModulatedBlock:
    return ModulatedBlock(
        width=config.width,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        rank=config.modulation_rank,
        condition_width=condition_width,
        attends=config.mixing == "attention",
    )


class Moment(NamedTuple):
    """Time and condition as all parts of the network read them.

    Attributes:
        active: Embedding after its SiLU, shape (B, 1 or N, W).
        shared: The part of the modulation that all blocks share, shape (B, 1 or N, 6W), 3W without attention.
    """

    active: Tensor
    shared: Tensor


class BoundBlockwise(NamedTuple):
    """The network with its condition filled in: what `headrace.flow.blockwise` samples and trains.

    Attributes:
        network: The blockwise network.
        condition: Shape (B, condition_dim) or (B, N, condition_dim).
        context: Context tokens, shape (B, S, context_dim), or None.
    """

    network: "BlockwiseVelocity"
    condition: Tensor
    context: Tensor | None = None

    @property
    def borders(self) -> tuple[float, ...]:
        """The network's segment borders."""
        return self.network.config.borders

    def at(self, t: Tensor) -> Moment:
        """Times (B,) and the condition, embedded."""
        return self.network.embed(t, self.condition)

    def features(self, x: Tensor, moment: Moment) -> Tensor:
        """Trunk features, shape (B, N, W)."""
        return self.network.features(x, moment, self.context)

    def residual(self, x: Tensor, moment: Moment) -> Tensor:
        """Approximate change of the features since the segment's start, shape (B, N, W)."""
        return self.network.residual(x, moment)

    def velocity(self, x: Tensor, moment: Moment, features: Tensor, segment: int) -> Tensor:
        """Velocity by one segment's stack, shape of `x`."""
        return self.network.velocity(x, moment, features, segment)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity at any times, with full features."""
        return self.network(x, t, self.condition, self.context)


class BlockwiseVelocity(Pretrained):
    """Velocity from noise (t=0) to data (t=1), shape (B, N, C) to the same."""

    Config = BlockwiseConfig
    config: BlockwiseConfig
    angles: Tensor
    inner_borders: Tensor

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        width, parts = config.width, 6 if config.mixing == "attention" else 3
        self.time_embed = TimeEmbedding(width, scale=TIME_SCALE)
        self.condition_in = nn.Linear(config.condition_dim, width)
        self.shared = nn.Linear(width, parts * width)
        self.velocity_in = nn.Linear(config.channels, width)
        stacked = 2 * width if config.trunk_depth else width
        self.stacks = nn.ModuleList(
            nn.ModuleList(_block(config, stacked) for _ in range(config.velocity_depth)) for _ in config.borders[1:]
        )
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.channels)
        if config.trunk_depth:
            self.trunk_in = nn.Linear(config.channels, width)
            self.trunk = nn.ModuleList(_block(config, width) for _ in range(config.trunk_depth))
        if config.context_dim:
            self.context_in = nn.Linear(config.context_dim, width)
        if config.residual_depth:
            self.residual_blocks = nn.ModuleList(_block(config, width) for _ in range(config.residual_depth))
            self.residual_out = nn.Linear(width, width)
        if config.align_dim:
            self.align_head = nn.Sequential(
                nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, config.align_dim)
            )
        attends = config.mixing == "attention"
        angles = axial_angles(config.grid, width // config.heads) if attends else torch.zeros(config.tokens, 0)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("inner_borders", torch.tensor(config.borders[1:-1]), persistent=False)
        zeroed = [self.shared, self.out_modulation, self.out]
        if config.residual_depth:
            zeroed.append(self.residual_out)  # stage 2 begins where holding the features stands
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def bind(self, condition: Tensor, context: Tensor | None = None) -> BoundBlockwise:
        """Fill in the condition for sampling or for a loss."""
        return BoundBlockwise(self, condition, context)

    def residual_parameters(self) -> list[nn.Parameter]:
        """What stage 2 trains; everything else stays frozen."""
        if not self.config.residual_depth:
            raise ValueError("this network has no feature residual: residual_depth is 0")
        return [*self.residual_blocks.parameters(), *self.residual_out.parameters()]

    def embed(self, t: Tensor, condition: Tensor) -> Moment:
        """Time and condition for the parts of the network.

        Args:
            t: Times in [0, 1], shape (B,).
            condition: Shape (B, condition_dim) or (B, N, condition_dim).
        """
        embedded = self.condition_in(condition)
        embedded = embedded if embedded.ndim == 3 else embedded[:, None]
        active = F.silu(embedded + self.time_embed(t)[:, None])
        return Moment(active, self.shared(active))

    def features(self, x: Tensor, moment: Moment, context: Tensor | None = None) -> Tensor:
        """Trunk features.

        Args:
            x: State, shape (B, N, C).
            moment: From `embed`.
            context: Shape (B, S, context_dim), where the network takes one.

        Returns:
            Shape (B, N, W); width 0 for a network without a trunk.

        Raises:
            ValueError: A shape differs, or a context is missing or unexpected.
        """
        config = self.config
        expect_shape("x", x, (None, config.tokens, config.channels))
        if (context is None) != (config.context_dim == 0):
            raise ValueError(f"context_dim is {config.context_dim}, so a context is {'' if context is None else 'not '}"
                             "expected")  # fmt: skip
        if not config.trunk_depth:
            return x.new_zeros((*x.shape[:2], 0))
        active, shared = moment
        h, angles = self.trunk_in(x), self.angles
        if context is not None:
            h = torch.cat([self.context_in(context), h], 1)
            angles = F.pad(angles, (0, 0, context.shape[1], 0))
            active, shared = (
                part if part.shape[1] == 1 else F.pad(part, (0, 0, context.shape[1], 0)) for part in (active, shared)
            )
        for block in self.trunk:
            h = block(h, active, shared, angles)
        return h[:, -config.tokens :]

    def residual(self, x: Tensor, moment: Moment) -> Tensor:
        """Approximate change of the features since the segment's start, shape (B, N, W); arguments as `features`."""
        if not self.config.residual_depth:
            raise ValueError("this network has no feature residual: residual_depth is 0")
        active, shared = (part.detach() for part in moment)
        h = self.trunk_in(x).detach()
        for block in self.residual_blocks:
            h = block(h, active, shared, self.angles)
        return self.residual_out(h)

    def velocity(self, x: Tensor, moment: Moment, features: Tensor, segment: int) -> Tensor:
        """Velocity by one segment's stack, shape (B, N, C); `features` from the trunk or approximated."""
        if not 0 <= segment < self.config.segments:
            raise ValueError(f"segment must be in 0..{self.config.segments - 1}, got {segment}")
        h, active = self.velocity_in(x), moment.active
        if features.shape[-1]:
            active = torch.cat([active.expand(-1, x.shape[1], -1), F.silu(features)], -1)
        for block in self.stacks[segment]:  # type: ignore[attr-defined]
            h = block(h, active, moment.shared, self.angles)
        shift, scale = self.out_modulation(moment.active).chunk(2, dim=-1)
        return self.out(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)

    def segment_of(self, t: Tensor) -> Tensor:
        """Segment of each time, int64, shape (B,); a border belongs to the segment that it starts."""
        return torch.bucketize(t.contiguous(), self.inner_borders, right=True)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        """Velocity with full features; each row goes through the stack of its own time.

        Arguments as `features`; returns the shape of `x`.
        """
        moment = self.embed(t, condition)
        return self.velocity_from(self.features(x, moment, context), x, t, moment)

    def velocity_from(self, features: Tensor, x: Tensor, t: Tensor, moment: Moment) -> Tensor:
        """As `forward`, from features at hand: in training they are needed for the alignment as well."""
        if self.config.segments == 1:
            return self.velocity(x, moment, features, 0)
        segment = self.segment_of(t)
        velocity = torch.zeros_like(x)
        for index in range(self.config.segments):
            rows = (segment == index).nonzero()[:, 0]
            if len(rows):
                part = self.velocity(x[rows], Moment(*(p[rows] for p in moment)), features[rows], index)
                velocity = velocity.index_copy(0, rows, part.to(velocity))
        return velocity

    def alignment_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Minus the mean cosine between projected features and a frozen encoder's tokens; the published weight is 0.05.

        Do not align to the encoder that the result is later scored with.

        Args:
            features: Shape (B, N, W).
            target: Shape (B, N, align_dim), such as DINOv2 patch tokens resampled to the token grid.

        Raises:
            ValueError: The network has no alignment head, or a shape differs.
        """
        if not self.config.align_dim:
            raise ValueError("this network has no alignment head: align_dim is 0")
        expect_shape("target", target, (features.shape[0], self.config.tokens, self.config.align_dim))
        return -F.cosine_similarity(self.align_head(features).float(), target.float(), dim=-1).mean()
