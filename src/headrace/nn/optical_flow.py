"""Optical flow by pyramidal Lucas-Kanade: differentiable in both pictures, and no weights to load."""
# Shape letters: B batch, C channels, H rows, W columns.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.shapes import expect_shape

FlowEstimator = Callable[[Tensor, Tensor], Tensor]
"""Called with frames a and b in [0, 1], (B, 3, H, W), gives (B, 2, H, W) [px]: b at x + flow(x) looks like a at x.

Channel 0 points right, channel 1 down.
"""


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` read at x + flow(x), bilinear, with the border repeated.

    Args:
        image: Shape (B, C, H, W).
        flow: Shape (B, 2, H, W) [px], right and down.
    """
    height, width = image.shape[-2:]
    down, right = torch.meshgrid(
        torch.arange(height, device=flow.device, dtype=flow.dtype),
        torch.arange(width, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    x = (right + flow[:, 0] + 0.5) * 2 / width - 1
    y = (down + flow[:, 1] + 0.5) * 2 / height - 1
    return F.grid_sample(image, torch.stack((x, y), -1), padding_mode="border", align_corners=False)


class LucasKanade(nn.Module):
    """The displacement that explains brightness changes within a window, from coarse to fine.

    At each level the second picture is warped by the flow so far, and a least-squares step within a Gaussian window
    corrects it. Where the window has no texture the step is damped towards none.

    Args:
        levels: Sizes of the pyramid, each half the one before; the coarsest side must be at least 4 px.
        steps: Corrections per level.
        window: Standard deviation of the window [px].
        damping: Added to the diagonal of the windowed gradient products, for pictures in [0, 1].

    Source: Lucas and Kanade 1981; Bouguet 2000 for the pyramid. Gradients are those of both pictures averaged.
    """

    def __init__(self, *, levels: int = 3, steps: int = 4, window: float = 2.5, damping: float = 1e-5) -> None:
        super().__init__()
        if levels < 1 or steps < 1:
            raise ValueError(f"levels and steps must be at least 1, got {levels} and {steps}")
        if window <= 0 or damping <= 0:
            raise ValueError(f"window and damping must be above 0, got {window} and {damping}")
        self.levels, self.steps, self.window, self.damping = levels, steps, window, damping

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Flow from `a` to `b`, both (B, 3, H, W) in [0, 1]; shape (B, 2, H, W) [px], float32.

        Raises:
            ValueError: Shapes differ, or the coarsest level would be under 4 px.
        """
        expect_shape("a", a, (None, 3, None, None))
        expect_shape("b", b, a.shape)
        smallest = min(a.shape[-2:]) >> (self.levels - 1)
        if smallest < 4:
            raise ValueError(f"{self.levels} levels need sides of at least {4 << (self.levels - 1)} px, got {a.shape}")
        pyramid = [(a.float().mean(1, keepdim=True), b.float().mean(1, keepdim=True))]
        for _ in range(self.levels - 1):
            pyramid.append(tuple(_halved(picture) for picture in pyramid[-1]))  # type: ignore[arg-type]
        flow = torch.zeros_like(pyramid[-1][0]).expand(-1, 2, -1, -1)
        for first, second in reversed(pyramid):
            flow = _enlarged(flow, first)
            for _ in range(self.steps):
                flow = flow + self._correction(first, warp(second, flow))
        return flow

    def _correction(self, a: Tensor, b: Tensor) -> Tensor:
        dx, dy = _gradient((a + b) / 2)
        gap = a - b
        products = torch.cat((dx * dx, dx * dy, dy * dy, dx * gap, dy * gap), 1)
        xx, xy, yy, xt, yt = _blurred(products, self.window).unbind(1)
        xx, yy = xx + self.damping, yy + self.damping
        step = torch.stack((yy * xt - xy * yt, xx * yt - xy * xt), 1) / (xx * yy - xy * xy)[:, None]
        return step.clamp(-1.5, 1.5)


def _gradient(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences to the right and downwards, borders repeated."""
    wide = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    return (wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2]) / 2, (wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]) / 2


def _blurred(maps: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of each channel, borders repeated."""
    reach = max(1, round(2 * deviation))
    place = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (place / deviation).square())
    kernel, channels = kernel / kernel.sum(), maps.shape[1]
    wide = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    wide = F.conv2d(wide, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(wide, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _halved(picture: Tensor) -> Tensor:
    return F.avg_pool2d(_blurred(picture, 0.7), 2, ceil_mode=True, count_include_pad=False)


def _enlarged(flow: Tensor, like: Tensor) -> Tensor:
    if flow.shape[-2:] == like.shape[-2:]:
        return flow
    return 2 * F.interpolate(flow, size=like.shape[-2:], mode="bilinear", align_corners=False)
