"""How the passes of a next-scale generator are computed: against a cache, or anew from the first word.

The released code computes the whole sequence anew in every pass. With the cache every pass computes the places of one
scale only. Passes that refine a scale read other features at its places, but what later scales see of a scale is its
first pass, because there only the features of the scales before are read, which no longer change.
"""
# Shape letters: B prompts (with guidance: wanted and unwanted ones), n codes of the known scales, W width.

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from headrace.nn.quantizers.multi_scale import MultiScaleQuantizer
from headrace.vlm.next_scale import NextScaleGenerator, Prompt, positions_of


class Passes(Protocol):
    """Computes one pass after the other for a batch of prompts."""

    def states(self, codes: Tensor, *, refine: bool) -> Tensor:
        """Last states of a scale's places.

        Args:
            codes: Known scales, int64 (B, n).
            refine: Compute the last known scale once more, with its own codes read; otherwise the scale after it.

        Returns:
            Shape (B, places of the scale, W).
        """


class RecomputedPasses:
    """Every pass over the whole sequence."""

    def __init__(self, model: NextScaleGenerator, quantizer: MultiScaleQuantizer, prompt: Prompt) -> None:
        self.model, self.quantizer, self.prompt = model, quantizer, prompt

    def states(self, codes: Tensor, *, refine: bool) -> Tensor:
        """See `Passes`."""
        config = self.model.config
        if not codes.shape[1]:
            rows = torch.zeros(len(codes), 0, config.feature_dim, device=codes.device)
            return self.model.image_states(self.prompt, rows)
        scale = self.quantizer.prefix_scales(codes.shape[1]) - refine
        rows = self.quantizer.next_scale_inputs(codes, refine=refine)
        return self.model.image_states(self.prompt, rows)[:, -config.counts[scale] :]


class SlotCache(DynamicCache):
    """Keys and values in memory that is taken once; passes write at `position`, over what is there.

    Args:
        entries: Room per layer.
    """

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.position = entries, 0
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, q, D) at `position`; returns everything up to there, without a copy."""
        if layer_idx not in self.slots:
            shape = (*key_states.shape[:2], self.entries, key_states.shape[3])
            self.slots[layer_idx] = key_states.new_empty(shape), value_states.new_empty(shape)
        end = self.position + key_states.shape[2]
        kept = []
        for slot, states in zip(self.slots[layer_idx], (key_states, value_states), strict=True):
            slot[:, :, self.position : end] = states
            kept.append(slot[:, :, :end])
        return kept[0], kept[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries before the place that is written next."""
        return self.position

    def copy(self, start: int, stop: int) -> dict[int, tuple[Tensor, Tensor]]:
        """What all layers hold in these entries."""
        return {i: (k[:, :, start:stop].clone(), v[:, :, start:stop].clone()) for i, (k, v) in self.slots.items()}

    def put(self, start: int, entries: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Write back what `copy` gave."""
        for index, states in entries.items():
            for slot, own in zip(self.slots[index], states, strict=True):
                slot[:, :, start : start + own.shape[2]] = own


class CachedPasses:
    """Every pass over the places of one scale only; features are summed up from pass to pass, too."""

    def __init__(self, model: NextScaleGenerator, quantizer: MultiScaleQuantizer, prompt: Prompt) -> None:
        self.model, self.quantizer, self.prompt = model, quantizer, prompt
        total = sum(model.config.counts)
        self.length = prompt.ids.shape[1]
        self.cache = SlotCache(self.length + total - 1)
        self.positions = positions_of(prompt.real, total)
        self.seen = F.pad(prompt.real, (0, total - 1), value=True)
        self.before: Tensor | None = None  # sum of the scales before the present one, on its grid, (B, D, side, side)
        self.first_pass: tuple[int, dict[int, tuple[Tensor, Tensor]]] | None = None

    def states(self, codes: Tensor, *, refine: bool) -> Tensor:
        """See `Passes`."""
        if not codes.shape[1]:
            return self._prompt()
        config = self.model.config
        scale = self.quantizer.prefix_scales(codes.shape[1]) - refine
        features = self._features(codes, scale, refine=refine)
        start, count = sum(config.counts[:scale]), config.counts[scale]
        first = self.length - 1 + start  # the prompt's last position predicts the first code
        if refine and self.first_pass is None:
            self.first_pass = first, self.cache.copy(first, first + count)
        if not refine and self.first_pass is not None:
            self.cache.put(*self.first_pass)
            self.first_pass = None
        self.cache.position = first
        return self.model.hidden(
            self.model.embed_rows(features.flatten(2).transpose(1, 2), start=start),
            self.seen[:, None, : first + count].expand(-1, count, -1),
            self.positions[:, first : first + count],
            self.cache,
        )

    def _prompt(self) -> Tensor:
        embeds, mask = self.model.embed_prompt(self.prompt), self.model.mask(self.prompt.real, 0)
        return self.model.hidden(embeds, mask, self.positions[:, : self.length], self.cache)[:, -1:]

    def _features(self, codes: Tensor, scale: int, *, refine: bool) -> Tensor:
        """What the places of a scale read, (B, D, side, side)."""
        scales, counts = self.model.config.scales, self.model.config.counts
        known = scale if refine else scale - 1
        own = self.quantizer.on_own_grid(codes[:, -counts[known] :], scales[known])
        total = own if self.before is None else self.before + own
        if refine:
            return total
        self.before = self.quantizer.resize(total, scales[scale])
        return self.before
