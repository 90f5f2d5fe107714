"""Restart of codes that nobody chooses: an option against collapse, off in published TokenFlow training."""

import torch
from torch import Tensor

from headrace.nn.quantizers.multi_scale import MultiScaleQuantizer


class CodeRestart:
    """Every `every` steps, move codes unseen since the last time onto queries of the present batch.

    All codebooks are moved at the same row from the same query, because they share the index. The optimizer's running
    averages of the moved rows are cleared, so that old momentum does not carry them away.

    Small batches or a high learning rate make codebooks collapse within 150 steps; restarting keeps them in use. Spread
    over scales matters: queries are drawn with equal weight per place, so fine scales give most of them.
    """

    def __init__(self, quantizer: MultiScaleQuantizer, *, every: int, seed: int = 0) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.quantizer = quantizer
        self.every = every
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = torch.zeros(quantizer.config.codes, dtype=torch.bool)
        self.steps = 0

    @torch.no_grad()
    def after_step(self, codes: Tensor, queries: Tensor, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Note what a training step used and restart when it is time; call it after the optimizer's step.

        Args:
            codes: Codes of the batch, shape (B, N).
            queries: `Quantized.queries` of the batch, shape (B, N, D).
            optimizer: The optimizer of the codebooks, whose state is cleared at moved rows.

        Returns:
            Number of codes moved.
        """
        self.seen[codes.detach().flatten().cpu()] = True
        self.steps += 1
        if self.steps % self.every:
            return 0
        dead = (~self.seen).nonzero()[:, 0]
        self.seen.zero_()
        if len(dead) == 0:
            return 0
        pool = queries.flatten(0, 1)
        picked = torch.randint(len(pool), (len(dead),), generator=self.generator)
        parts = pool[picked.to(pool.device)].split(self.quantizer.config.dims, dim=-1)
        for book, part in zip(self.quantizer.books, parts, strict=True):
            rows = dead.to(book.device)
            book[rows] = part.to(book.dtype)
            for value in (optimizer.state.get(book, {}) if optimizer else {}).values():
                if isinstance(value, Tensor) and value.shape == book.shape:
                    value[rows] = 0
        return len(dead)
