"""RAFT's optical flow through torchvision, frozen, with weights from a file."""

import os
from typing import Self

import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large

from headrace.nn.perceptual import Frozen, read_plain_weights
from headrace.nn.pretrained import load_strictly
from headrace.nn.shapes import expect_shape


class Raft(Frozen):
    """RAFT-large in float32; its weights are frozen, gradients flow into both pictures.

    Args:
        state: State of torchvision's `raft_large`, such as that of `raft_large_C_T_SKHT_V2`; None leaves it random.
        updates: Refinements; only the last one is used.

    Raises:
        ValueError: The weights do not fit, or `updates` is below 1.

    Source: Teed and Deng 2020 (arXiv 2003.12039), torchvision.models.optical_flow; ViPRA uses 12 updates.
    """

    def __init__(self, state: dict[str, Tensor] | None = None, *, updates: int = 12) -> None:
        super().__init__()
        if updates < 1:
            raise ValueError(f"updates must be at least 1, got {updates}")
        self.updates = updates
        self.net = raft_large(weights=None)
        if state is not None:
            load_strictly(self.net, state, what="the RAFT file")
        self.freeze()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, updates: int = 12) -> Self:
        """Load a `.pth` or safetensors file; nothing is downloaded."""
        return cls(read_plain_weights(path), updates=updates)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Flow from `a` to `b`, both (B, 3, H, W) in [0, 1]; shape (B, 2, H, W) [px].

        Raises:
            ValueError: Shapes differ, or a side is under 128 px or no multiple of 8.
        """
        expect_shape("a", a, (None, 3, None, None))
        expect_shape("b", b, a.shape)
        if min(a.shape[-2:]) < 128 or a.shape[-2] % 8 or a.shape[-1] % 8:
            raise ValueError(
                f"RAFT needs sides of at least 128 px in multiples of 8, got {tuple(a.shape[-2:])}; "
                "enlarge the frames or use LucasKanade"
            )
        with torch.autocast(a.device.type, enabled=False):
            return self.net(2 * a.float() - 1, 2 * b.float() - 1, num_flow_updates=self.updates)[-1]
