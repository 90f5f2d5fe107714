"""Prompts for pictures that became shorter."""
# Shape letters in this file: B rows, L prompt length.

import torch
from torch import Tensor


def shrink(ids: Tensor, attention_mask: Tensor, *, placeholder: int, keep: int) -> tuple[Tensor, Tensor]:
    """Drop surplus placeholders from every picture of every prompt.

    Args:
        ids: int64 (B, L), in which each picture is one run of `placeholder`.
        attention_mask: (B, L), 0 at padding, which may be on either side.
        placeholder: Id that features replace.
        keep: Placeholders that stay per run.

    Returns:
        `ids` and `attention_mask`, shortened alike.

    Raises:
        ValueError: A run is shorter than `keep`, or rows hold different numbers of pictures.
    """
    image = ids == placeholder
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begun = torch.where(starts, place, -1).cummax(1).values
    surplus = image & (place - begun >= keep)
    runs, lengths = starts.sum(1), image.sum(1)
    removed = surplus.sum(1)
    if bool((lengths - removed != runs * keep).any()):
        raise ValueError(f"a picture has fewer than {keep} placeholders; the budget is above its tokens")
    if len(set(removed.tolist())) > 1:
        raise ValueError(
            f"rows would lose different numbers of placeholders {removed.tolist()}; shrink them one by one"
        )
    stay = ~surplus
    return ids[stay].view(len(ids), -1), attention_mask[stay].view(len(ids), -1)
