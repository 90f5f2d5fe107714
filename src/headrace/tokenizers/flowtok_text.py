"""FlowTok's text side: projector to the shared token space, alignment head, and the decoder back to words.

Source: FlowTok (arXiv 2503.10772, sec. 3.3; TACJu/FlowTok `FlowEncoder`), projector after CrossFlow. The decoder of
text tokens was not released; its shape here is our own design.
"""

# Shape letters in this file: B batch, K tokens, C text width, D channels, V vocabulary.

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.shapes import expect_shape
from headrace.tokenizers.flowtok_image import Posterior

LOG_TEMPERATURE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Sizes of the text projector and of the alignment head; defaults are the published ones.

    Attributes:
        blocks: Post-norm transformer blocks.
        heads: Attention heads.
        hidden: Feed-forward width.
        dropout: In attention weights, feed-forward and both residual branches, in training.
        align_hidden: Hidden width of the alignment head.
    """

    blocks: int = 6
    heads: int = 8
    hidden: int = 1024
    dropout: float = 0.1
    align_hidden: int = 512

    def __post_init__(self) -> None:
        if min(self.blocks, self.heads, self.hidden, self.align_hidden) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"projector sizes must be at least 1 and dropout in [0, 1), got {self}")


class SpreadNorm(nn.Module):
    """Layer norm that divides by the unbiased deviation plus 1e-5 (not the root of variance plus epsilon)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * centred / (x.std(-1, keepdim=True) + 1e-5) + self.bias


class ProjectorBlock(nn.Module):
    """Attention, then a ReLU feed-forward, each added and normed afterwards."""

    def __init__(self, width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.heads, self.rate = config.heads, config.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = SpreadNorm(width), SpreadNorm(width)
        self.grow, self.shrink = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), self.key(x), self.value(x))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        h = self.norm1(x + self.drop(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norm2(h + self.drop(self.shrink(self.drop(F.relu(self.grow(h))))))


class TextProjector(nn.Module):
    """Text encoder tokens (B, K, C) to a Gaussian over flow tokens (B, K, D). Pad positions count like any token."""

    def __init__(self, width: int, channels: int, config: ProjectorConfig) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"text width {width} must be divisible by the projector's {config.heads} heads")
        self.layers = nn.ModuleList(ProjectorBlock(width, config) for _ in range(config.blocks))
        self.linear = nn.Linear(width, 2 * channels)

    def raw(self, text: Tensor) -> Tensor:
        """Mean and log-variance side by side, (B, K, 2 D)."""
        for layer in self.layers:
            text = layer(text)
        return self.linear(text)

    def forward(self, text: Tensor) -> Posterior:
        """Posterior of the flow's text end."""
        mean, logvar = self.raw(text).chunk(2, dim=-1)
        return Posterior(mean, logvar)


class AlignHead(nn.Module):
    """What sampled text tokens are pulled towards in training, and the temperature of that contrast."""

    def __init__(self, width: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
        )
        self.log_temperature = nn.Parameter(torch.tensor(LOG_TEMPERATURE))

    def forward(self, text: Tensor) -> Tensor:
        """Text encoder tokens (B, K, C) to targets (B, K, D)."""
        return self.mlp(text)


@dataclass(frozen=True, kw_only=True)
class TextDecoderConfig:
    """Sizes of the decoder from text tokens to words; only the 6 blocks are published, the rest is ours."""

    width: int = 768
    blocks: int = 6
    heads: int = 12

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}, with at least 1 block")


class TextDecoder(nn.Module):
    """Flow tokens (B, K, D) to a score for each word at each position (B, K, V), all positions at once."""

    def __init__(self, tokens: int, channels: int, vocabulary: int, config: TextDecoderConfig) -> None:
        super().__init__()
        self.tokens, self.channels = tokens, channels
        self.token_in = nn.Linear(channels, config.width)
        self.positions = nn.Parameter(torch.randn(tokens, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, config.blocks, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )
        self.words = nn.Linear(config.width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of all words; raises ValueError on another shape."""
        expect_shape("tokens", tokens, (None, self.tokens, self.channels))
        return self.words(self.blocks(self.token_in(tokens) + self.positions))


def contrastive_loss(tokens: Tensor, goal: Tensor, log_temperature: Tensor, *, same: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy between flattened, normalised token sequences of a batch.

    Args:
        tokens: Sampled text tokens, (B, K, D).
        goal: Alignment targets, (B, K, D).
        log_temperature: Scalar; similarities are multiplied by its exponential.
        same: True at [i, j] where captions i and j are equal, (B, B); such pairs are no negatives. The release has
            no such mask.

    Returns:
        Scalar.
    """
    a, b = (F.normalize(x.flatten(1).float(), dim=-1) for x in (tokens, goal))
    logits = log_temperature.exp() * a @ b.T
    if same is not None:
        others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        logits = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def wall_divergence(posterior: Posterior) -> Tensor:
    r"""CrossFlow's divergence: the mean is free inside about :math:`\pm 3` and hits a soft wall beyond.

    :math:`-\frac12 (1 + \log\sigma^2 - (0.3\mu)^6 - \sigma^2)` per entry, shape (B, K, D).
    """
    mean, logvar = posterior
    return -0.5 * (1 + logvar - (0.3 * mean).pow(6) - logvar.exp())


def gaussian_divergence(posterior: Posterior) -> Tensor:
    """KL to the unit Gaussian per entry, (B, K, D)."""
    mean, logvar = posterior
    return -0.5 * (1 + logvar - mean.square() - logvar.exp())
