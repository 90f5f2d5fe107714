"""Vector quantisation with a straight-through gradient; codes follow a running mean of their rows, or the gradient."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.quantizers.rows import QuantizedRows, nearest_codes
from headrace.nn.shapes import expect_shape


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """Size of the codebook and how it learns.

    Attributes:
        codes: Number of codes.
        width: Numbers per code.
        commitment: Weight that pulls rows to their code.
        decay: Share of the running means kept per step; None learns the codes by gradient instead.
    """

    codes: int = 16
    width: int = 128
    commitment: float = 0.25
    decay: float | None = 0.99

    def __post_init__(self) -> None:
        if self.codes < 2 or self.width < 1:
            raise ValueError(f"codes must be at least 2 and width at least 1, got {self.codes} and {self.width}")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay must lie in (0, 1) or be None, got {self.decay}")
        if self.commitment < 0:
            raise ValueError(f"commitment must be at least 0, got {self.commitment}")


class Vector(nn.Module):
    """VQ: the nearest code goes on, the gradient passes through unchanged.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), sec. 3.2 and appendix A.1 for the running means, which are
    divided by smoothed counts.
    """

    usage: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: VectorConfig) -> None:
        super().__init__()
        self.config = config
        self.codes, self.width = config.codes, config.width
        self.codebook = nn.Parameter(torch.randn(config.codes, config.width), requires_grad=config.decay is None)
        self.register_buffer("usage", torch.zeros(config.codes, dtype=torch.int64))
        if config.decay is not None:
            self.register_buffer("counts", torch.ones(config.codes))
            self.register_buffer("sums", self.codebook.detach().clone())

    def forward(self, rows: Tensor, *, generator: torch.Generator | None = None) -> QuantizedRows:
        """Quantise rows of shape (R, D); nothing here is random, so `generator` draws nothing."""
        expect_shape("rows", rows, (None, self.width))
        codes = nearest_codes(rows, self.codebook)
        # An index into the codebook is a copy: the update below does not touch it.
        chosen = self.codebook[codes]
        if not self.training:
            return QuantizedRows(chosen, codes, rows.new_zeros(()))
        loss = self.config.commitment * F.mse_loss(rows, chosen.detach())
        if self.config.decay is None:
            loss = loss + F.mse_loss(chosen, rows.detach())
        else:
            self._follow(rows.detach().float(), codes, self.config.decay)
        self.usage += torch.bincount(codes, minlength=self.codes)
        return QuantizedRows(rows + (chosen - rows).detach(), codes, loss)

    @torch.no_grad()
    def _follow(self, rows: Tensor, codes: Tensor, decay: float) -> None:
        counts = torch.bincount(codes, minlength=self.codes).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) / (total + self.codes * 1e-5) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook rows of codes of shape (...), shape (..., D)."""
        return self.codebook[codes]

    @torch.no_grad()
    def moved(self, codes: Tensor) -> None:
        """Restart the running means of codes that something else has moved."""
        if self.config.decay is not None:
            self.counts[codes] = 1.0
            self.sums[codes] = self.codebook[codes]
