"""A run whose model is spread over its processes: parameters, gradients, optimizer and averaged weights (FSDP2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.nn.shards import shard_blocks, spread_like
from headrace.training.ema import Ema


def shard_run(
    module: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    classes: Sequence[str],
    device: torch.device,
) -> None:
    """Spread a run in place, after a checkpoint was loaded and before the first step.

    Args:
        module: What is called with a batch; holds `model`.
        model: The model itself.
        optimizer: Its groups and state go over to the spread parameters.
        ema: The average, if there is one.
        classes: Class names of the blocks that are gathered one at a time.
        device: Where the processes compute.
    """
    before = dict(model.named_parameters())
    shard_blocks(module, classes, device)
    after = dict(model.named_parameters())
    new: dict[Tensor, nn.Parameter] = {before[name]: after[name] for name in before}
    state: dict[Tensor, Any] = {new[p]: _spread(entries, new[p]) for p, entries in optimizer.state.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(state)
    if ema is not None:
        ema.shadow = {name: spread_like(value, after[name]) for name, value in ema.shadow.items()}


def _spread(entries: dict[str, object], parameter: Tensor) -> dict[str, object]:
    return {key: spread_like(v, parameter) if isinstance(v, Tensor) else v for key, v in entries.items()}
