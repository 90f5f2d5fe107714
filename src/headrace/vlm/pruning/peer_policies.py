"""The peers' settings, and the policies that run them at the output of an encoder."""
# Shape letters in this file: B pictures, U units, P patches per unit, N patches, D widths, H heads.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.observe import Qkv
from headrace.vlm.pruning.peers import grid_units, outlier_count, picture_numbers, prumerge, random_units, visionzip
from headrace.vlm.pruning.policy import Decision, Patches, Peek
from headrace.vlm.pruning.scores import evidence


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Selection that asks for no attention: an even `grid`, or `random`, drawn from `seed` and the picture.

    Another picture gets another draw, the same picture the same one, wherever it stands in a run.
    """

    budget: Budget
    choice: Literal["random", "grid"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.choice not in ("random", "grid"):
            raise ValueError(f"choice must be 'random' or 'grid', got {self.choice!r}")


@dataclass(frozen=True, kw_only=True)
class VisionZipConfig:
    """VisionZip; `contextual_share` of the budget are merged tokens (10 of 64 in its tables)."""

    budget: Budget
    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.contextual_share < 1:
            raise ValueError(f"contextual_share must lie in [0, 1), got {self.contextual_share}")


@dataclass(frozen=True, kw_only=True)
class PruMergeConfig:
    """PruMerge; without a budget each picture keeps its attention outliers, which needs one picture at a time."""

    budget: Budget | None = None
    neighbours: int = 32

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")


@dataclass(frozen=True, kw_only=True)
class FastVConfig:
    """FastV: the encoder keeps all; tokens leave after block `decoder_layer` of the language model.

    The paper counts from the block that no longer sees them: its K is `decoder_layer + 1`. The prompt keeps the budget
    times the pictures (crops, frames) in it, whichever of them the tokens belong to.
    """

    budget: Budget
    decoder_layer: int = 1

    def __post_init__(self) -> None:
        if self.decoder_layer < 0:
            raise ValueError(f"decoder_layer must not be negative, got {self.decoder_layer}")


OutputConfig = ControlConfig | VisionZipConfig | PruMergeConfig


class OutputPolicy:
    """A method that acts once, on the output of the block whose features are used."""

    def __init__(self, config: OutputConfig, *, batch: int, units: int, consumed: int) -> None:
        self.config = config
        self.batch, self.units, self.consumed = batch, units, consumed

    def wants(self, layer: int) -> bool:
        """Only the consumed block, and only for methods that look."""
        return layer == self.consumed and not isinstance(self.config, ControlConfig)

    def decide(self, layer: int, patches: Patches, seen: Qkv | None, hidden: Tensor, peek: Peek) -> Decision | None:
        """Select, and merge where the method merges."""
        if layer != self.consumed:
            return None
        config = self.config
        if isinstance(config, ControlConfig):
            count = config.budget.of(self.units)
            if config.choice == "grid":
                chosen = grid_units(self.batch, self.units, count)
            else:
                numbers = picture_numbers(hidden[:, patches.prefix :])
                chosen = random_units(numbers, self.units, count, seed=config.seed)
            return Decision(chosen.to(hidden.device)) if count < self.units else None
        features = by_unit(hidden[:, patches.prefix :], patches)
        if isinstance(config, VisionZipConfig):
            return self._visionzip(config, patches, seen, features)
        return self._prumerge(config, patches, peek(), features)

    def facts(self) -> dict:
        """Units before."""
        return {"units": self.units}

    def _visionzip(
        self, config: VisionZipConfig, patches: Patches, seen: Qkv | None, features: Tensor
    ) -> Decision | None:
        count = config.budget.of(self.units)
        if count == self.units:
            return None
        assert seen is not None
        contextual = min(round(count * config.contextual_share), count - 1)
        attention = attention_per_unit(seen, patches)
        metric = by_unit(seen.key[:, :, patches.prefix :].mean(1), patches).mean(2)
        merged = visionzip(attention, metric, features, dominant=count - contextual, contextual=contextual)
        return Decision(merged.units, None, in_patch_order(merged.features, merged.units, patches))

    def _prumerge(self, config: PruMergeConfig, patches: Patches, seen: Qkv, features: Tensor) -> Decision | None:
        attention = attention_per_unit(one_head(seen), patches)
        if config.budget is not None:
            count = config.budget.of(self.units)
        elif self.batch == 1:
            count = min(self.units, outlier_count(attention[0]) + 1)
        else:
            raise ValueError("PruMerge without a budget keeps another number per picture; encode one at a time")
        if count == self.units:
            return None
        keys = by_unit(one_head(seen).key[:, 0, patches.prefix :], patches).mean(2)
        merged = prumerge(attention, keys, features, count=count, neighbours=config.neighbours)
        return Decision(merged.units, None, in_patch_order(merged.features, merged.units, patches))


def one_head(seen: Qkv) -> Qkv:
    """All heads side by side as one head of width H * D, scaled by (H * D)^-0.5: the view that PruMerge takes."""
    query, key, value = (t.transpose(1, 2).flatten(2)[:, None] for t in seen[:3])
    return Qkv(query, key, value, query.shape[-1] ** -0.5)


def attention_per_unit(seen: Qkv, patches: Patches) -> Tensor:
    """Attention that each unit receives, (B, U): from CLS, or from the mean query where there is none."""
    found = evidence(
        seen.query, seen.key, seen.value, scaling=seen.scaling, relay="cls" if patches.has_cls else "mean",
        semantic=False, prefix=patches.prefix,
    )  # fmt: skip
    everything = torch.arange(patches.units, device=found.attention.device).expand(len(found.attention), -1)
    return patches.per_unit(found.attention, everything)


def by_unit(values: Tensor, patches: Patches) -> Tensor:
    """Group patches by unit: (B, N, D) -> (B, U, P, D), patches of a unit in raster order."""
    order = patches.unit.argsort(dim=1, stable=True)
    rows = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    return rows.view(len(values), patches.units, -1, values.shape[-1])


def in_patch_order(features: Tensor, units: Tensor, patches: Patches) -> Tensor:
    """Features of kept units, (B, K, P, D), as rows in the order of their patches, (B, K * P, D)."""
    batch, _, per_unit, width = features.shape
    order = patches.unit.argsort(dim=1, stable=True).view(batch, patches.units, per_unit)
    places = order.gather(1, units[..., None].expand(-1, -1, per_unit)).reshape(batch, -1)
    back = places.argsort(dim=1)
    return features.reshape(batch, -1, width).gather(1, back[..., None].expand(-1, -1, width))
