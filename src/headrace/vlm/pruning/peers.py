"""Other pruning methods as functions of scores and features, to be run beside FlowCut on the same model and budget.

Each is written from its paper and, where the licence allows reading on, from its released code; sources are named per
function. All but FastV select at the output of the encoder; FastV scores inside the language model.
"""
# Shape letters in this file: B pictures, U units, K kept, P patches per unit, D widths, H heads, V visual tokens.

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.vlm.pruning.scores import best


class Merged(NamedTuple):
    """Kept units, int64 (B, K) ascending, and their new features, (B, K, P, D)."""

    units: Tensor
    features: Tensor


def random_units(pictures: Sequence[int], units: int, count: int, *, seed: int) -> Tensor:
    """The control: `count` of `units`, drawn without replacement, int64 (B, K).

    Args:
        pictures: A number for each picture, see `picture_numbers`; a row depends on it and on `seed` alone.
    """
    rows = []
    for picture in pictures:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + picture)
        rows.append(torch.randperm(units, generator=generator)[:count].sort().values)
    return torch.stack(rows)


def picture_numbers(features: Tensor) -> list[int]:
    """A number of 32 bits for each picture, by what it shows.

    Args:
        features: (B, N, D). The number depends on where each width is largest: rounding, which differs with the batch
            and the device, leaves that alone.
    """
    return [zlib.crc32(row.argmax(0).cpu().numpy().tobytes()) for row in features]


def grid_units(batch: int, units: int, count: int) -> Tensor:
    """The other control: `count` evenly spread units in raster order, int64 (B, K)."""
    return torch.linspace(0, units - 1, count).round().long().expand(batch, -1)


def fastv_scores(query: Tensor, key: Tensor, visual: Tensor, *, scaling: float) -> Tensor:
    """Head-mean attention of the last token over all keys, at the visual ones.

    Args:
        query: (B, H, D), the last token's.
        key: (B, H, S, D). `visual`: int64 (V,), their places.

    Returns:
        (B, V).

    Source: FastV, arXiv 2403.06764, sec. 4.
    """
    logits = torch.einsum("bhd,bhsd->bhs", query.float(), key.float()) * scaling
    return logits.softmax(-1).mean(1)[:, visual]


def visionzip(attention: Tensor, metric: Tensor, features: Tensor, *, dominant: int, contextual: int) -> Merged:
    """Keep the most attended units; let evenly spaced ones of the rest absorb the units most like them.

    Args:
        attention: Attention that each unit receives from CLS (or on average), (B, U).
        metric: Head-mean keys per unit, (B, U, D).
        features: (B, U, P, D).
        dominant, contextual: How many of each kind; their sum stays.

    Returns:
        Dominant units unchanged, contextual ones plus the mean of those assigned to them, in raster order.

    Source: arXiv 2412.04467 and dvlab-research/VisionZip. There CLS is one of the dominant tokens; here the features
    that the language model gets hold no CLS, so all of the budget goes to patches.
    """
    batch, units = features.shape[:2]
    top = best(attention, dominant)
    rest_mask = torch.ones(batch, units, dtype=torch.bool, device=features.device).scatter(1, top, False)
    rest = rest_mask.nonzero()[:, 1].view(batch, units - dominant)
    if contextual == 0:
        return Merged(top, _rows(features, top))
    step = max(1, (units - dominant) // contextual)
    place = torch.arange(0, units - dominant, step, device=features.device)[:contextual]
    anchors = rest[:, place]
    others_mask = torch.ones(units - dominant, dtype=torch.bool, device=features.device)
    others_mask[place] = False
    others = rest[:, others_mask]
    unit_metric = torch.nn.functional.normalize(metric.float(), dim=-1)
    similarity = _rows(unit_metric, others) @ _rows(unit_metric, anchors).transpose(1, 2)
    assigned = torch.nn.functional.one_hot(similarity.argmax(-1), len(place)).to(features.dtype)
    sums = torch.einsum("bok,bopd->bkpd", assigned, _rows(features, others))
    means = sums / assigned.sum(1).clamp(min=1)[:, :, None, None]
    merged = _rows(features, anchors) + means
    chosen = torch.cat([top, anchors], dim=1)
    values = torch.cat([_rows(features, top), merged], dim=1)
    order = chosen.argsort(dim=1)
    return Merged(chosen.gather(1, order), _rows(values, order))


def outlier_count(attention: Tensor) -> int:
    """How many entries of a row (U,) lie above the third quartile by 1.5 interquartile ranges; at least 1.

    Source: PruMerge, arXiv 2403.15388, sec. 3.2: its adaptive number of tokens.
    """
    low, high = torch.quantile(attention.float(), torch.tensor([0.25, 0.75], device=attention.device))
    return max(1, int((attention > high + 1.5 * (high - low)).sum()))


def prumerge(attention: Tensor, keys: Tensor, features: Tensor, *, count: int, neighbours: int = 32) -> Merged:
    """Keep the most attended units, add to each its nearest in key space by attention, and one unit for the rest.

    Args:
        attention: Single-head CLS attention of the last block, (B, U).
        keys: Its keys, all heads side by side, (B, U, D).
        features: (B, U, P, D).
        count: Units that stay, the one for the rest included.
        neighbours: Nearest units that each kept one absorbs.

    Returns:
        Kept units in raster order. The unit of the rest takes the place of the most attended dropped unit.

    Source: arXiv 2403.15388 and 42Shawn/LLaVA-PruMerge.
    """
    batch, units = attention.shape
    ranked = attention.argsort(dim=1, descending=True, stable=True)
    if count >= units:
        everything = torch.arange(units, device=attention.device).expand(batch, -1)
        return Merged(everything, features)
    kept = ranked[:, : max(count - 1, 1)].sort(1).values
    weight = attention.float()
    similarity = _rows(unit := torch.nn.functional.normalize(keys.float(), dim=-1), kept) @ unit.transpose(1, 2)
    similarity.scatter_(2, kept[:, :, None], -torch.inf)  # not itself
    near = similarity.topk(min(neighbours, units - 1), dim=-1).indices
    share = torch.zeros_like(similarity).scatter(2, near, 1.0) * weight[:, None]
    values = _rows(features, kept) + torch.einsum("bku,bupd->bkpd", share.to(features.dtype), features)
    if count == 1:
        return Merged(kept, values)
    dropped = weight.scatter(1, kept, 0.0)
    rest = torch.einsum("bu,bupd->bpd", dropped.to(features.dtype), features)[:, None]
    chosen = torch.cat([kept, dropped.argmax(1, keepdim=True)], dim=1)
    order = chosen.argsort(dim=1)
    return Merged(chosen.gather(1, order), _rows(torch.cat([values, rest], dim=1), order))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[b, index[b]]` for (B, U, ...) and (B, K)."""
    shape = (*index.shape, *values.shape[2:])
    return values.gather(1, index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(shape))
