"""When and how codes that hardly anyone chooses are moved to where rows are."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.nn.quantizers.noise_substitution import NoiseSubstitution
from headrace.nn.quantizers.vector import Vector

PAPER_JITTER = 1e-8


@dataclass(frozen=True, kw_only=True)
class DeadCodeSchedule:
    """Steps at which dead codes are replaced, and what counts as dead.

    Attributes:
        below: A code is dead if its share of all rows since the last replacement is under this.
        phases: (first step, last step, every), in which a step is due if it lies within and `every` divides it.
        jitter: Noise on the copies, as a multiple of their root mean square. The paper's 1e-8 (`PAPER_JITTER`) is below
            the resolution of float32: it leaves exact twins, of which only the first is ever chosen.
    """

    below: float = 0.015
    phases: tuple[tuple[int, int, int], ...] = (
        (100, 1_000, 100),
        (1_001, 10_000, 1_000),
        (10_001, 40_000, 2_000),
        (40_001, 90_000, 3_000),
        (90_001, 119_999, 5_000),
    )
    jitter: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.below < 1:
            raise ValueError(f"below must lie in (0, 1), got {self.below}")
        if any(first < 1 or last < first or every < 1 for first, last, every in self.phases):
            raise ValueError(f"phases must be (first, last, every) with 1 <= first <= last, got {self.phases}")
        if self.jitter < 0:
            raise ValueError(f"jitter must be at least 0, got {self.jitter}")

    @classmethod
    def for_run(cls, steps: int) -> Self:
        """A short run's schedule: every 10 steps for the first tenth, then every 50, ending at 40 % of `steps`."""
        early, last = max(10, steps // 10), max(10, int(0.4 * steps))
        later = ((early + 1, last, 50),) if last > early else ()
        return cls(phases=((10, min(early, last), 10), *later))

    def due(self, step: int) -> bool:
        """Whether codes are replaced after training step `step`, counted from 1."""
        return any(first <= step <= last and step % every == 0 for first, last, every in self.phases)

    def events(self, steps: int) -> int:
        """How many replacements a run of `steps` steps has."""
        return sum(self.due(step) for step in range(1, steps + 1))


class Replacement(NamedTuple):
    """What a replacement did.

    Attributes:
        dead: Indices of the codes that were dead, shape (M,).
        shares: Share of rows per code before, shape (K,).
    """

    dead: Tensor
    shares: Tensor


@torch.no_grad()
def replace_dead_codes(
    quantizer: NoiseSubstitution | Vector,
    schedule: DeadCodeSchedule,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Replacement:
    """Overwrite dead codes by copies of codes in use plus noise, and start counting anew.

    With several processes the counts are added up, the first process decides and the others follow. If every code is
    dead (no counts), noise alone is added.

    Args:
        quantizer: Whose `codebook` and `usage` are changed.
        schedule: What counts as dead, and the noise.
        optimizer: Whose running averages of the moved codes are cleared.
        order: Permutation of the codes in use, which are repeated if there are fewer of them than dead ones; drawn if
            not given.
        generator: Randomness of the permutation and the noise.

    Returns:
        What was dead.

    Source: ViPRA, laq/model/nsvq.py; the size of the noise is ours.
    """
    book, usage = quantizer.codebook, quantizer.usage.float()
    if dist.is_initialized():
        dist.all_reduce(usage)
    shares = usage / usage.sum().clamp_min(1e-8)
    dead = (shares < schedule.below).nonzero()[:, 0]
    used = (shares >= schedule.below).nonzero()[:, 0]
    new = book.detach().clone()
    if len(used) == 0:
        new += _noise(new, schedule.jitter, generator)
    elif len(dead):
        pool = new[used].repeat(-(-len(dead) // len(used)), 1)
        if order is None:
            device = generator.device if generator is not None else pool.device
            order = torch.randperm(len(pool), generator=generator, device=device)
        copies = pool[order.to(pool.device)[: len(dead)]]
        new[dead] = copies + _noise(copies, schedule.jitter, generator)
    if dist.is_initialized():
        dist.broadcast(new, src=0)
    book.copy_(new)
    quantizer.usage.zero_()
    moved = dead if len(used) else torch.arange(len(book), device=book.device)
    if isinstance(quantizer, Vector):
        quantizer.moved(moved)
    for value in (optimizer.state.get(book, {}) if optimizer else {}).values():
        if isinstance(value, Tensor) and value.shape == book.shape:
            value[moved] = 0
    return Replacement(dead, shares)


def _noise(like: Tensor, jitter: float, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of `jitter` times the root mean square of some codes."""
    scale = like.square().mean().sqrt().clamp_min(1e-6)
    return jitter * scale * torch.empty_like(like).normal_(generator=generator)
