"""Restart of codes that nobody chooses: an option against collapse, off in published TokenFlow training."""

import torch
from torch import Tensor, nn

from headrace.nn.quantizers.multi_scale import MultiScaleQuantizer


class CodeRestart(nn.Module):
    """Every `every` steps, move codes unseen since the last time onto queries of the present batch.

    All codebooks are moved at the same row from the same query, because they share the index. The optimizer's running
    averages of the moved rows are cleared, so that old momentum does not carry them away. Queries are drawn with equal
    weight per place, so fine scales give most of them. What it remembers is in its state, so training resumes exactly.

    Small batches or a high learning rate make codebooks collapse within 150 steps; restarting keeps them in use.
    """

    seen: Tensor
    steps: Tensor

    def __init__(self, codes: int, *, every: int, seed: int = 0) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every, self.start = every, seed
        self.register_buffer("seen", torch.zeros(codes, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after_step(
        self,
        quantizer: MultiScaleQuantizer,
        codes: Tensor,
        queries: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> int:
        """Note what a training step used and restart when it is time; call it after the optimizer's step.

        Args:
            quantizer: Whose codes are moved.
            codes: Codes of the batch, shape (B, N).
            queries: `Quantized.queries` of the batch, shape (B, N, D).
            optimizer: The optimizer of the codebooks, whose state is cleared at moved rows.

        Returns:
            Number of codes moved.

        Raises:
            RuntimeError: Several processes train together: each would move its codes onto its own pictures.
        """
        group = torch.distributed
        if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
            raise RuntimeError("codes can be restarted in one process only; train without restart on several")
        self.seen[codes.flatten()] = True
        self.steps += 1
        if int(self.steps) % self.every:
            return 0
        dead = (~self.seen).nonzero()[:, 0]
        self.seen.zero_()
        if len(dead) == 0:
            return 0
        pool = queries.flatten(0, 1)
        generator = torch.Generator().manual_seed(self.start * 1_000_003 + int(self.steps))
        picked = torch.randint(len(pool), (len(dead),), generator=generator)
        parts = pool[picked.to(pool.device)].split(quantizer.config.dims, dim=-1)
        for book, part in zip(quantizer.books, parts, strict=True):
            book[dead] = part.to(book.dtype)
            for value in (optimizer.state.get(book, {}) if optimizer else {}).values():
                if isinstance(value, Tensor) and value.shape == book.shape:
                    value[dead] = 0
        return len(dead)
