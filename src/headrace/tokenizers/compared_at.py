"""A tokenizer seen through pictures of another size, so that figures at 256 px can be compared across encoders."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.tokenizers.base import Preprocessing, Tokenizer

COMPARED_AT = 256


class ComparedAt:
    """Protocol B: pictures of one size go up to the tokenizer's, through it, and down again (bicubic, antialiased).

    Protocol A is the tokenizer itself, at its own size. Published tables mix the two; a figure must say which.
    Offers what `evaluate` asks of a tokenizer: `preprocessing`, `encode`, `decode`, `device`.

    Args:
        model: Any tokenizer.
        size: Side at which pictures are compared [px].

    Source: section on evaluation in docs/uniflow.md.
    """

    def __init__(self, model: Tokenizer, *, size: int = COMPARED_AT) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 px, got {size}")
        self.model, self.size = model, size

    @property
    def preprocessing(self) -> Preprocessing:
        """The tokenizer's own, at the size of comparison."""
        return dataclasses.replace(self.model.preprocessing, size=self.size)

    @property
    def device(self) -> torch.device:
        """The tokenizer's."""
        return self.model.device

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) in the tokenizer's value range to its tokens."""
        return self.model.encode(self._resized(images, self.model.preprocessing.size))

    def decode(self, tokens: Tensor, **options: Any) -> Tensor:
        """Tokens to pictures (B, 3, size, size); `options` are those of the tokenizer's own `decode`."""
        return self._resized(self.model.decode(tokens, **options), self.size)

    def _resized(self, images: Tensor, side: int) -> Tensor:
        """Bicubic overshoot is clamped channel by channel to what a picture can hold."""
        p = self.model.preprocessing
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (p.mean, p.std))
        if images.shape[-1] != side:
            images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        return torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std)
