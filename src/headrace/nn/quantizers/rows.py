"""What quantisers of plain rows have in common: rows in, quantised rows, codes and a loss out."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class QuantizedRows(NamedTuple):
    """Rows after a quantiser.

    Attributes:
        rows: What goes on, shape (R, D); exact codebook rows in eval mode.
        codes: Index of each row's code, shape (R,), int64.
        loss: What the quantiser wants added to the training loss, a scalar; 0 where it needs nothing.
    """

    rows: Tensor
    codes: Tensor
    loss: Tensor


class RowQuantizer(Protocol):
    """Anything that replaces rows of `width` numbers by one of `codes` vectors."""

    codes: int
    width: int

    def __call__(self, rows: Tensor, *, generator: torch.Generator | None = None) -> QuantizedRows:
        """Quantise rows of shape (R, D); `generator` is the randomness of training, where there is any."""
        ...

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors of codes of any shape (...), shape (..., D)."""
        ...


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row, in float32; of equally near ones the first. Shapes (R, D), (K, D) to (R,)."""
    rows, codebook = rows.detach().float(), codebook.detach().float()
    with torch.autocast(rows.device.type, enabled=False):  # autocast would round the products to half precision
        distance = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook.T + codebook.square().sum(1)
    return distance.argmin(1)
