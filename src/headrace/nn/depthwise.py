"""Depthwise 3-D convolution whose backward pass is fast on CPUs.

PyTorch's own backward of `conv3d` with as many groups as channels takes longer there than everything else in a small
space-time block together; the gradients are two convolutions and are written as such.
"""
# Shape letters: B batch, D channels, T frames, R rows, C columns, K side of the kernel.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _DepthwiseConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(video, weight)
        return F.conv3d(video, weight, bias, groups=video.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video, weight = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        side, (frames, rows, columns) = weight.shape[-1], grad.shape[2:]
        wide = F.pad(grad, (side - 1,) * 6)
        to_video = F.conv3d(wide, weight.flip(2, 3, 4), groups=video.shape[1]).to(video.dtype)
        taps = [
            (video[:, :, i : i + frames, j : j + rows, k : k + columns] * grad).sum((0, 2, 3, 4))
            for i in range(side)
            for j in range(side)
            for k in range(side)
        ]
        return to_video, torch.stack(taps, 1).view_as(weight), grad.sum((0, 2, 3, 4))


def depthwise_conv3d(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv3d(video, weight, bias, groups=D)` without padding, the same on every device.

    Args:
        video: Shape (B, D, T, R, C), already padded.
        weight: Shape (D, 1, K, K, K).
        bias: Shape (D,).
    """
    if video.device.type == "cpu" and torch.is_grad_enabled():
        return _DepthwiseConv3d.apply(video, weight, bias)  # type: ignore[no-any-return]
    return F.conv3d(video, weight, bias, groups=video.shape[1])
