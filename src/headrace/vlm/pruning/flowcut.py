"""FlowCut: which tokens to drop after which encoder layer, from each layer's evidence. Training-free.

Source: arXiv 2505.19536 and TungChintao/FlowCut@a2ecd24. Where the two differ the default follows the code, which made
the published tables, and a switch gives the paper's text. Tokens are dropped, never merged.
"""
# Shape letters in this file: B images, N present tokens, K kept tokens.

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.scores import Criterion, best, cut_size, entropy_ratio, smoothed

_CHOICES = {
    "relay": ("auto", "cls", "mean"), "relay_softmax": ("with_cls", "patch_only"), "semantic_scale": ("none", "sqrt_d"),
    "schedule": ("entropy", "uniform", "last"), "batch_rule": ("per_image", "max"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlowCutConfig:
    """FlowCut's settings, saved with results.

    Attributes:
        budget: Tokens that stay per picture.
        every: A cut may happen at every `every`-th layer, counted back from the last cut.
        history: Weight of earlier layers' scores, in [0, 1).
        relay: Who is asked: the CLS token, or the mean of all tokens; `auto` takes CLS where the encoder has one.
        relay_softmax, semantic_scale: See `scores.evidence`.
        criteria: Terms of the score. `("attention", "density")` is the released rule for Qwen2-VL's encoder.
        schedule: `entropy` is FlowCut; `uniform` cuts the same number each time; `last` cuts once, at the end.
        batch_rule: `per_image` sizes each picture's cuts by itself; `max` gives all pictures of a batch the largest
            cut, as the released code does, so that what is kept depends on what else is in the batch.
        last_layer: Index of the layer after which the last cut happens; None is one layer before the one whose features
            are used, or that one if it is the encoder's last and nothing later exists.
        decoder: Cut once more inside the language model, to the budget counted over all visual tokens of the prompt.
        encoder_factor: With `decoder`, the encoder keeps this many times the budget per picture that it sees. None is
            2, but 0.5 of a number of tokens for models such as LLaVA-NeXT, which see a picture as several crops.
        decoder_layer: Index of the decoder layer after which that cut happens.
    """

    budget: Budget
    every: int = 2
    history: float = 0.5
    relay: Literal["auto", "cls", "mean"] = "auto"
    relay_softmax: Literal["with_cls", "patch_only"] = "with_cls"
    semantic_scale: Literal["none", "sqrt_d"] = "none"
    criteria: tuple[Criterion, ...] = ("attention", "semantic", "density")
    schedule: Literal["entropy", "uniform", "last"] = "entropy"
    batch_rule: Literal["per_image", "max"] = "per_image"
    last_layer: int | None = None
    decoder: bool = False
    encoder_factor: float | None = None
    decoder_layer: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 <= self.history < 1:
            raise ValueError(f"history must lie in [0, 1), got {self.history}")
        unknown = set(self.criteria) - {"attention", "semantic", "density"}
        if unknown or not self.criteria:
            raise ValueError(f"criteria are attention, semantic and density, got {self.criteria}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.encoder_factor is not None and self.encoder_factor <= 0:
            raise ValueError(f"encoder_factor must be above 0, got {self.encoder_factor}")
        if self.decoder_layer < 0:
            raise ValueError(f"decoder_layer must not be negative, got {self.decoder_layer}")

    def encoder_budget(self, count: int, *, crops: bool = False) -> int:
        """Tokens of `count` that the encoder keeps; other than the budget when the decoder cuts again.

        Args:
            count: Tokens of one picture (crop, frame).
            crops: Whether the model sees a picture as several crops, which share the budget of the decoder.
        """
        if not self.decoder:
            return self.budget.of(count)
        factor = self.encoder_factor
        if self.budget.tokens is None:
            return min(count, max(1, round((self.budget.share or 1.0) * count * (2.0 if factor is None else factor))))
        factor = factor if factor is not None else 0.5 if crops else 2.0
        return min(count, max(1, int(self.budget.tokens * factor)))


@dataclass
class FlowCutTrace:
    """What happened layer by layer for one batch of pictures.

    Attributes:
        kept: Original indices of the present tokens, int64 (B, N), ascending; beyond a row's own count lies padding.
        valid: bool (B, N), or None while all rows have the same count.
        cumulative: Smoothed score of the present tokens (B, N), None before the first scored layer.
        counts: Layer to present tokens per image after it, for layers that cut.
        entropy: Layer to entropy ratio per image, for scored layers.
    """

    kept: Tensor
    valid: Tensor | None = None
    cumulative: Tensor | None = None
    counts: dict[int, list[int]] = field(default_factory=dict)
    entropy: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, batch: int, count: int, device: torch.device | None = None) -> "FlowCutTrace":
        """All of `count` tokens present in each of `batch` pictures."""
        return cls(kept=torch.arange(count, device=device).expand(batch, -1))

    def present(self) -> Tensor:
        """Present tokens per image, int64 (B,)."""
        if self.valid is not None:
            return self.valid.sum(1)
        return torch.full((self.kept.shape[0],), self.kept.shape[1], device=self.kept.device)


class Cut(NamedTuple):
    """What stays after a cut.

    Attributes:
        keep: Indices into the present tokens, int64 (B, K), ascending among the real ones.
        valid: Which of them are real, bool (B, K); None when all are.
    """

    keep: Tensor
    valid: Tensor | None


def step(
    trace: FlowCutTrace,
    attention: Tensor,
    score: Tensor,
    *,
    layer: int,
    last_layer: int,
    target: int,
    config: FlowCutConfig,
) -> Cut | None:
    """Take in what `layer` says, update `trace`, and say what stays.

    Args:
        trace: State, changed in place.
        attention: Attention of the relay to each present token, (B, N), summing to 1.
        score: Fused score of each present token, (B, N).
        layer: Index of the layer, whose output is to be cut.
        last_layer: Index of the layer with the forced last cut.
        target: Tokens to end with.

    Returns:
        What stays, or None when nothing is cut.
    """
    count = trace.present()
    if layer > last_layer or int(count.max()) <= target:
        return None
    ratio = entropy_ratio(attention, trace.valid)
    trace.entropy[layer] = ratio.tolist()
    trace.cumulative = smoothed(trace.cumulative, score, config.history)
    drop = _drop(count, ratio, remaining=last_layer - layer, target=target, config=config)
    if drop is None or int(drop.max()) == 0:
        return None
    return _cut(trace, count - drop, layer)


def _drop(count: Tensor, ratio: Tensor, *, remaining: int, target: int, config: FlowCutConfig) -> Tensor | None:
    if remaining % config.every or (config.schedule == "last" and remaining):
        return None
    if config.schedule == "uniform":
        cuts = remaining // config.every + 1
        drop = torch.div(count - target + cuts - 1, cuts, rounding_mode="floor").clamp(min=0)
    else:
        drop = cut_size(count, target, remaining, ratio)
    return drop if config.batch_rule == "per_image" else drop.max().expand_as(drop).minimum(count - target)


def _cut(trace: FlowCutTrace, left: Tensor, layer: int) -> Cut:
    assert trace.cumulative is not None
    most = int(left.max())
    ranked = trace.cumulative if trace.valid is None else trace.cumulative.masked_fill(~trace.valid, float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)[:, :most]
    real = torch.arange(most, device=left.device) < left[:, None]
    if bool(real.all()):
        keep, valid = best(trace.cumulative, most, trace.valid), None
    else:  # rows with fewer survivors end in padding, which sorts to the back
        size = ranked.shape[1]
        keep = order.masked_fill(~real, size).sort(-1).values
        valid = keep < size
        keep = keep.clamp(max=size - 1)
    trace.kept = trace.kept.gather(1, keep)
    trace.cumulative = trace.cumulative.gather(1, keep)
    trace.valid = valid
    trace.counts[layer] = left.tolist()
    return Cut(keep, valid)
