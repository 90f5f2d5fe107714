"""What a pruning method answers when an encoder asks it after a block, and FlowCut's answer."""
# Shape letters in this file: B pictures, N present patches, U present units, K kept units, H heads, D widths.

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headrace.vlm.pruning.flowcut import FlowCutConfig, FlowCutTrace, step
from headrace.vlm.pruning.observe import Qkv
from headrace.vlm.pruning.scores import Evidence, evidence, fused_score


class Patches(NamedTuple):
    """The patches that are present at a block.

    Attributes:
        original: Index of each in the whole picture, int64 (B, N), ascending.
        unit: Unit of each, int64 (B, N); patches of one unit later become one token.
        units: Units of the whole picture.
        prefix: Tokens before the patches in q, k, v and hidden states. `has_cls`: the first is CLS.
        valid: bool (B, N), real ones; None when all are.
    """

    original: Tensor
    unit: Tensor
    units: int
    prefix: int
    has_cls: bool
    valid: Tensor | None

    def per_unit(self, values: Tensor, present: Tensor) -> Tensor:
        """Sums over the patches of each present unit: (B, N) -> (B, U), `present` being int64 (B, U) unit numbers."""
        if self.units == self.unit.shape[1] == present.shape[1]:  # one patch per unit and none gone
            return values
        real = values if self.valid is None else values.masked_fill(~self.valid, 0)
        sums = torch.zeros(len(values), self.units, dtype=values.dtype, device=values.device)
        return sums.scatter_add(1, self.unit, real).gather(1, present)


class Decision(NamedTuple):
    """What stays.

    Attributes:
        units: Unit numbers that stay, int64 (B, K), ascending among the real ones.
        valid: Which are real, bool (B, K); None when all are.
        hidden: New hidden states of the patches of the kept units, in the patches' order, (B, K * patches per unit, D);
            None leaves them as they were.
    """

    units: Tensor
    valid: Tensor | None = None
    hidden: Tensor | None = None


Peek = Callable[[], Qkv]


class Policy(Protocol):
    """A pruning method at work on one batch of pictures."""

    def wants(self, layer: int) -> bool:
        """Whether the method needs q, k and v of this block."""

    def decide(self, layer: int, patches: Patches, seen: Qkv | None, hidden: Tensor, peek: Peek) -> Decision | None:
        """Called after every block with its output (B, prefix + N, D); None keeps everything.

        `peek()` runs the next block on that output and gives its q, k and v.
        """

    def facts(self) -> dict:
        """What happened, JSON-ready, for the report."""


def ask(seen: Qkv, patches: Patches, config: FlowCutConfig) -> Evidence:
    """Evidence of a block under FlowCut's settings."""
    relay = config.relay if config.relay != "auto" else ("cls" if patches.has_cls else "mean")
    if relay == "cls" and not patches.has_cls:
        raise ValueError("relay='cls' needs an encoder with a CLS token, this one has none; use relay='mean'")
    return evidence(
        seen.query,
        seen.key,
        seen.value,
        scaling=seen.scaling,
        relay=relay,
        softmax=config.relay_softmax,
        semantic_scale=config.semantic_scale,
        semantic="semantic" in config.criteria,
        prefix=patches.prefix,
        valid=patches.valid,
    )


class FlowCutPolicy:
    """FlowCut over the units of a batch of pictures."""

    def __init__(
        self,
        config: FlowCutConfig,
        *,
        batch: int,
        units: int,
        last_layer: int,
        device: torch.device,
        crops: bool = False,
    ) -> None:
        self.config = config
        self.last_layer = last_layer
        self.target = config.encoder_budget(units, crops=crops)
        self.trace = FlowCutTrace.start(batch, units, device)

    def wants(self, layer: int) -> bool:
        """Every block up to the last cut, while more than the target is there."""
        return layer <= self.last_layer and int(self.trace.present().max()) > self.target

    def decide(self, layer: int, patches: Patches, seen: Qkv | None, hidden: Tensor, peek: Peek) -> Decision | None:
        """Score the block, smooth, and cut when the schedule says so."""
        if seen is None:
            return None
        found = ask(seen, patches, self.config)
        attention = patches.per_unit(found.attention, self.trace.kept)
        score = patches.per_unit(fused_score(found, self.config.criteria), self.trace.kept)
        cut = step(
            self.trace,
            attention,
            score,
            layer=layer,
            last_layer=self.last_layer,
            target=self.target,
            config=self.config,
        )
        return None if cut is None else Decision(self.trace.kept, cut.valid)

    def facts(self) -> dict:
        """Counts after each cut and entropy ratios, per block."""
        return {"counts": self.trace.counts, "entropy": self.trace.entropy}
