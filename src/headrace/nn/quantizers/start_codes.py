"""A codebook placed where the rows are: k-means on a batch, for quantisers that begin after a time without one."""

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.nn.quantizers.noise_substitution import NoiseSubstitution
from headrace.nn.quantizers.rows import nearest_codes
from headrace.nn.quantizers.vector import Vector
from headrace.nn.shapes import expect_shape


@torch.no_grad()
def start_codes(
    quantizer: NoiseSubstitution | Vector,
    rows: Tensor,
    *,
    rounds: int = 10,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Overwrite the codebook by k-means centres of rows, begun as in k-means++, and start counting use anew.

    With several processes the first one's rows decide and the others follow.

    Args:
        quantizer: Whose `codebook` and `usage` are changed.
        rows: Shape (R, D), at least as many as codes.
        rounds: Of k-means.
        optimizer: Whose running averages of the codebook are cleared.
        generator: Randomness of the first centres.

    Raises:
        ValueError: Another width, or fewer rows than codes.

    Source: Arthur and Vassilvitskii 2007 for the first centres.
    """
    expect_shape("rows", rows, (None, quantizer.width))
    if len(rows) < quantizer.codes:
        raise ValueError(f"{quantizer.codes} codes need at least as many rows, got {len(rows)}")
    with torch.autocast(rows.device.type, enabled=False):
        centres = _centres(rows.float(), quantizer.codes, rounds, generator)
    centres = centres.to(quantizer.codebook).contiguous()
    if dist.is_initialized():
        dist.broadcast(centres, src=0)
    quantizer.codebook.copy_(centres)
    quantizer.usage.zero_()
    if isinstance(quantizer, Vector):
        quantizer.moved(torch.arange(quantizer.codes, device=rows.device))
    for value in (optimizer.state.get(quantizer.codebook, {}) if optimizer else {}).values():
        if isinstance(value, Tensor) and value.shape == quantizer.codebook.shape:
            value.zero_()


def _centres(rows: Tensor, count: int, rounds: int, generator: torch.Generator | None) -> Tensor:
    """k-means of rows (R, D), shape (count, D)."""
    centres = rows[torch.randint(len(rows), (1,), generator=generator, device=rows.device)]
    while len(centres) < count:
        gap = torch.cdist(rows, centres).min(1).values.square() + 1e-12
        centres = torch.cat((centres, rows[torch.multinomial(gap, 1, generator=generator)]))
    for _ in range(rounds):
        member = torch.nn.functional.one_hot(nearest_codes(rows, centres), count).to(rows)
        sizes = member.sum(0)[:, None]
        centres = torch.where(sizes > 0, member.T @ rows / sizes.clamp_min(1), centres)
    return centres
