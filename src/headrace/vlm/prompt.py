"""What a decoder reads before it writes: embeddings with their positions, and which of them are visual."""
# Shape letters in this file: B rows, L prompt length, D width, A position axes (1, or 3 for multimodal RoPE).

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        ids: int64 (L,), token ids; visual positions hold the placeholder's id.
        embeds: (L, D), what the decoder reads.
        positions: int64 (A, L), rotary positions.
        visual: bool (L,), positions that came from pictures.
    """

    ids: Tensor
    embeds: Tensor
    positions: Tensor
    visual: Tensor

    def part(self, start: int, end: int | None = None) -> "Prompt":
        """Positions `start` to `end`."""
        return Prompt(self.ids[start:end], self.embeds[start:end], self.positions[:, start:end], self.visual[start:end])

    def keep(self, kept: Tensor) -> "Prompt":
        """Positions where `kept`, bool (L,), is true. Rotary positions stay as they were."""
        return Prompt(self.ids[kept], self.embeds[kept], self.positions[:, kept], self.visual[kept])


class PromptBatch(NamedTuple):
    """Left-padded prompts.

    Attributes:
        embeds: (B, L, D). ids: int64 (B, L).
        positions: int64 (B, L), or (3, B, L) for multimodal RoPE.
        mask: bool (B, L), False at padding.
    """

    ids: Tensor
    embeds: Tensor
    positions: Tensor
    mask: Tensor


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Length of what all prompts begin with alike; each keeps at least its last token for itself."""
    limit = min(len(p.ids) for p in prompts) - 1
    alike = torch.ones(limit, dtype=torch.bool, device=prompts[0].ids.device)
    for other in prompts[1:]:
        alike &= other.ids[:limit] == prompts[0].ids[:limit]
    return limit if bool(alike.all()) else int(alike.int().argmin())


def require_room(prompts: Sequence[Prompt], most: int | None) -> None:
    """Refuse prompts that are longer than what a model was made for.

    Raises:
        ValueError: One has more than `most` positions.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    if most is not None and longest > most:
        raise ValueError(
            f"with its worked examples a prompt has {longest} positions, the model was made for {most}; "
            "give fewer examples or prune visual tokens"
        )


def left_pad(prompts: Sequence[Prompt]) -> PromptBatch:
    """Stack prompts so that all end in the last column."""
    longest = max(len(p.ids) for p in prompts)
    rows = []
    for prompt in prompts:
        gap = longest - len(prompt.ids)
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(prompt.visual), (gap, 0))
        rows.append(
            (pad(prompt.ids, (gap, 0)), pad(prompt.embeds, (0, 0, gap, 0)), pad(prompt.positions, (gap, 0)), mask)
        )
    ids, embeds, positions, mask = (torch.stack(column) for column in zip(*rows, strict=True))
    positions = positions.transpose(0, 1)
    return PromptBatch(ids, embeds, positions[0] if positions.shape[0] == 1 else positions, mask)
