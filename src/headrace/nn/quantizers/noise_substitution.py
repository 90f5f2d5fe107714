"""Noise-substitution vector quantisation: train with noise as large as the quantisation error, use codes afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.nn.quantizers.rows import QuantizedRows, nearest_codes
from headrace.nn.shapes import expect_shape


@dataclass(frozen=True, kw_only=True)
class NoiseSubstitutionConfig:
    """Size of the codebook.

    Attributes:
        codes: Number of codes.
        width: Numbers per code.
    """

    codes: int = 8
    width: int = 32

    def __post_init__(self) -> None:
        if self.codes < 2 or self.width < 1:
            raise ValueError(f"codes must be at least 2 and width at least 1, got {self.codes} and {self.width}")


class NoiseSubstitution(nn.Module):
    r"""NSVQ: in training :math:`\hat x = x + \frac{\|x-e\|}{\|n\|} n` with Gaussian n, in eval mode :math:`\hat x = e`.

    There is no codebook or commitment loss: codes learn through the length of the error alone.

    Source: Vali and Backstrom 2022, "NSVQ", IEEE Access 10; ViPRA, laq/model/nsvq.py.
    """

    usage: Tensor

    def __init__(self, config: NoiseSubstitutionConfig) -> None:
        super().__init__()
        self.config = config
        self.codes, self.width = config.codes, config.width
        self.codebook = nn.Parameter(torch.randn(config.codes, config.width))
        self.register_buffer("usage", torch.zeros(config.codes, dtype=torch.int64))

    def forward(self, rows: Tensor, *, generator: torch.Generator | None = None) -> QuantizedRows:
        """Quantise rows of shape (R, D); in training mode noise stands in for the error and use is counted."""
        expect_shape("rows", rows, (None, self.width))
        if self.training:
            return self.substitute(rows, torch.empty_like(rows).normal_(generator=generator))
        codes = nearest_codes(rows, self.codebook)
        return QuantizedRows(self.codebook[codes], codes, rows.new_zeros(()))

    def substitute(self, rows: Tensor, noise: Tensor) -> QuantizedRows:
        """The training branch with given noise, both of shape (R, D)."""
        expect_shape("noise", noise, rows.shape)
        codes = nearest_codes(rows, self.codebook)
        error = torch.linalg.vector_norm(rows - self.codebook[codes], dim=1, keepdim=True)
        length = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        self.usage += torch.bincount(codes, minlength=self.codes)
        return QuantizedRows(rows + error / (length + 1e-8) * noise, codes, rows.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook rows of codes of shape (...), shape (..., D)."""
        return self.codebook[codes]
