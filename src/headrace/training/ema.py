"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headrace.nn.shards import part


class Ema:
    r"""Float32 average of a model's trainable parameters, :math:`s \leftarrow d\,s + (1-d)\,p`.

    The decay grows with the number of updates n as `min(decay, (1 + n) / (10 + n))`, so that a short run is not
    dominated by the random start (the rule of TensorFlow's ExponentialMovingAverage). Frozen parameters and buffers
    are not averaged: they stay the model's own.

    Args:
        model: Its trainable parameters give names, shapes and start values.
        decay: Upper bound of the decay, 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average."""
        parameters = dict(model.named_parameters())
        present = [part(parameters[name].detach()).float() for name in self.shadow]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([part(value) for value in self.shadow.values()], present, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with averaged weights inside the block; its own weights come back afterwards, also on errors."""
        parameters = dict(model.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.shadow}
        _copy(self.shadow, parameters)
        try:
            yield model
        finally:
            _copy(own, parameters)

    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint's average.

        Raises:
            ValueError: The names are not those of this model's trainable parameters.
        """
        differing = sorted(shadow.keys() ^ self.shadow.keys())
        if differing:
            raise ValueError(f"the saved EMA is of another model: {', '.join(differing[:5])} on one side only")
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
        self.updates = updates


@torch.no_grad()
def _copy(source: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, value in source.items():
        parameters[name].copy_(value)
