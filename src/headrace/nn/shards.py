"""Tensors that are spread over processes (FSDP2's DTensor), seen whole or as this process's part."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _spread(tensor: Tensor) -> Any:
    """The tensor if it is spread, else None; torch's part for it is not imported only to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process must ask for the same tensors in the same order; a plain one is returned as is."""
    spread = _spread(tensor)
    return tensor if spread is None else spread.full_tensor()


def part(tensor: Tensor) -> Tensor:
    """This process's part, which shares memory with the tensor; a plain one is returned as is."""
    spread = _spread(tensor)
    return tensor if spread is None else spread.to_local()


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor spread as `example` is; unchanged where `example` is plain or has another shape (a counter)."""
    from torch.distributed.tensor import distribute_tensor

    spread = _spread(example)
    if spread is None or tensor.shape != example.shape:
        return tensor
    return distribute_tensor(tensor.to(example.device), spread.device_mesh, spread.placements)


def shard_blocks(module: nn.Module, classes: Sequence[str], device: torch.device) -> None:
    """Spread a module over all processes, its blocks one by one, so that only one block at a time is whole (FSDP2).

    Args:
        module: Its parameters are replaced by spread ones of the same names and values.
        classes: Class names of the blocks, such as `LlamaDecoderLayer`.
        device: Where the processes compute.

    Raises:
        ValueError: The module has no block of a named class.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {type(block).__name__ for block in module.modules()}
    absent = sorted(set(classes) - found)
    if absent or not classes:
        raise ValueError(
            f"no module of class {', '.join(absent) or '(none named)'} to shard in {type(module).__name__}"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in module.modules():
        if type(block).__name__ in classes:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
