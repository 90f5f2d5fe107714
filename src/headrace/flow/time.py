"""Samplers of training times in [0, 1], 0 noise and 1 data. Each returns a float32 tensor of shape (count,)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def uniform_time(count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Times drawn evenly from [0, 1)."""
    return torch.rand(count, generator=generator, device=device)


def beta_time(
    count: int,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    scale: float = 0.999,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`t = scale * (1 - s)` with `s ~ Beta(alpha, beta)`: more mass near noise, never above `scale`.

    Mean 0.4 at the defaults. Source: ViPRA (sroutray/vipra, finetuning); openpi in the opposite time direction.
    Only `beta = 1` (or `alpha = 1`) has the closed inverse used here.

    Raises:
        ValueError: Neither `alpha` nor `beta` is 1.
    """
    u = torch.rand(count, generator=generator, device=device)
    if beta == 1.0:
        s = u ** (1.0 / alpha)
    elif alpha == 1.0:
        s = 1.0 - (1.0 - u) ** (1.0 / beta)
    else:
        raise ValueError(f"one of alpha and beta must be 1 for the closed inverse, got alpha={alpha}, beta={beta}")
    return scale * (1.0 - s)


def logit_normal_time(
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sigmoid of a normal draw: most mass in the middle. Source: Esser et al. 2024, arXiv 2403.03206, sec. 3.1."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))


def fat_logit_normal_time(
    count: int,
    *,
    uniform_share: float = 0.1,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logit-normal times of which a share is drawn evenly instead, so that the ends of [0, 1] are seen too.

    UniFlow and FlowMo call it `fat_lognormal`. Symmetric, so it does not matter which end is noise.

    Raises:
        ValueError: `uniform_share` is outside [0, 1].

    Source: FlowMo (kylesargent/FlowMo), noise schedule of the rectified-flow loss.
    """
    if not 0.0 <= uniform_share <= 1.0:
        raise ValueError(f"uniform_share must lie in [0, 1], got {uniform_share}")
    middle = logit_normal_time(count, generator=generator, device=device)
    even, choice = torch.rand(2, count, generator=generator, device=device)
    return torch.where(choice < uniform_share, even, middle)


def stratified_time(
    count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """One even draw inside each of `count` equal parts of [0, 1), in random order: uniform with less variance."""
    parts = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    return parts[torch.randperm(count, generator=generator, device=device)] / count


class SegmentTimes(NamedTuple):
    """Times grouped by segment.

    Attributes:
        t: Shape (count,), rising from segment to segment.
        segment: Segment of each time, int64, shape (count,), sorted.
    """

    t: Tensor
    segment: Tensor


def segment_time(
    count: int,
    borders: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> SegmentTimes:
    """The batch split evenly over time segments, with even draws inside each (Blockwise Flow Matching, training).

    Segments of different lengths get equally many draws; weight the loss by the length if the plain mean is wanted.

    Args:
        count: Batch size, at least the number of segments.
        borders: Rising times, one more than there are segments.
        generator: Source of randomness.
        device: Where the times are made.

    Raises:
        ValueError: Fewer draws than segments, or borders that do not rise within [0, 1].

    Source: mlvlab/Blockwise-Flow-Matching@5e7ae87, training loss.
    """
    if len(borders) < 2 or any(a >= b for a, b in pairwise(borders)) or borders[0] < 0 or borders[-1] > 1:
        raise ValueError(f"borders must rise strictly within [0, 1], got {list(borders)}")
    segments = len(borders) - 1
    if count < segments:
        raise ValueError(f"{segments} segments need a batch of at least {segments}, got {count}")
    segment = torch.arange(count, device=device) * segments // count
    edges = torch.tensor(borders, dtype=torch.float32, device=device)
    start, end = edges[segment], edges[segment + 1]
    return SegmentTimes(start + (end - start) * torch.rand(count, generator=generator, device=device), segment)
