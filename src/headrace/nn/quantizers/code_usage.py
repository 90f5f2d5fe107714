"""How much of a codebook is used, counted per scale."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Usage(NamedTuple):
    """Use of a codebook at one scale or over all.

    Attributes:
        used: Number of codes seen at least once.
        share: `used` divided by the size of the codebook.
        perplexity: exp of the entropy of the code frequencies; equals the size when all are used equally.
        tokens: Number of codes counted. A share cannot exceed `tokens` divided by the size.
    """

    used: int
    share: float
    perplexity: float
    tokens: int


class UsageCounter:
    """Counts codes of a multi-scale tokenizer, per scale. Counts of several processes can be added."""

    def __init__(self, *, scales: Sequence[int], codes: int) -> None:
        self.scales = tuple(scales)
        self.counts = torch.zeros(len(self.scales), codes, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Count codes of shape (B, N), scale by scale; N is the number of codes of all scales."""
        parts = codes.detach().cpu().split([side * side for side in self.scales], dim=1)
        for row, part in zip(self.counts, parts, strict=True):
            row += torch.bincount(part.flatten(), minlength=len(row))

    def per_scale(self) -> dict[int, Usage]:
        """Usage by side of the scale."""
        return {side: usage_of(row) for side, row in zip(self.scales, self.counts, strict=True)}

    def overall(self) -> Usage:
        """Usage over all scales."""
        return usage_of(self.counts.sum(0))


def usage_of(counts: Tensor) -> Usage:
    """Usage from how often each code was seen, integer shape (K,)."""
    total = int(counts.sum())
    used = int((counts > 0).sum())
    shares = counts[counts > 0].double() / max(total, 1)
    perplexity = float(torch.exp(-(shares * shares.log()).sum())) if total else 0.0
    return Usage(used, used / len(counts), perplexity, total)
