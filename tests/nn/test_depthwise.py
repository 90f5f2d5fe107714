"""The depthwise convolution and its gradients are those of PyTorch's own."""

import torch
import torch.nn.functional as F

from headrace.nn.depthwise import depthwise_conv3d


def test_values_and_gradients_are_pytorchs():
    torch.manual_seed(0)
    shapes = ((2, 5, 4, 6, 7), (5, 1, 3, 3, 3), (5,))
    ours = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    theirs = [value.detach().clone().requires_grad_() for value in ours]
    weights = torch.randn(2, 5, 2, 4, 5, dtype=torch.float64)
    (depthwise_conv3d(*ours) * weights).sum().backward()
    (F.conv3d(*theirs, groups=5) * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(depthwise_conv3d(*ours), F.conv3d(*theirs, groups=5))


def test_trains_under_autocast():
    video = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        depthwise_conv3d(video, weight, torch.zeros(3, requires_grad=True)).float().sum().backward()
    expected = torch.autograd.grad(F.conv3d(video, weight, groups=3).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=0.05, atol=0.05)
