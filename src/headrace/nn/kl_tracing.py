"""Optical flow from a predictor of the next frame: put a bump into the first frame and see where the forecast changes.

Source: KL-tracing, arXiv 2507.09082 (version 2): two forecasts of the second frame, with and without the bump, both
given the same few true patches of it; the flow ends in the patch whose distribution moved most. Written from the paper.
"""
# Shape letters: B pictures, Q points, P patches of the second frame, K codes, H rows, W columns.

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.nn.shapes import expect_shape

FramePredictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`predict(first, second, revealed)`: logits of the code of each patch of the second frame, shape (B, P, K).

`first` and `second` are frames in [0, 1], (B, 3, H, W); `revealed`, bool (B, P), says which patches of `second` may be
looked at. Patches are row-major on the tracer's grid. The predictor must be frozen, and not be the model that is
trained with the flow it gives.
"""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""How far a forecast moved, (B, P, K) twice to (B, P); `categorical_kl` for logits."""


@dataclass(frozen=True, kw_only=True)
class KlTracingConfig:
    """How points are traced.

    Attributes:
        grid: Rows and columns of patches that the predictor forecasts.
        amplitude: Height of the bump, for pictures in [0, 1]; the sum is clamped.
        bump: Standard deviation of the bump as a share of the picture's height; the paper's 2 px of 256.
        reveal: Share of the second frame's patches shown to both forecasts.
        masks: Random choices of these patches, over which the maps are averaged. With one, a target is itself shown,
            and so cannot be found, with chance `reveal`.
        zooms: Further rounds, each on a crop of both frames around the point and its estimate.
        crop: Side of a crop as a share of the round before.
        seed: Of the choices of patches.
    """

    grid: tuple[int, int]
    amplitude: float = 1.0
    bump: float = 2 / 256
    reveal: float = 0.1
    masks: int = 5
    zooms: int = 0
    crop: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.masks < 1 or self.zooms < 0:
            raise ValueError(f"grid and masks must be at least 1 and zooms at least 0, got {self}")
        if not 0 <= self.reveal < 1 or not 0 < self.crop <= 1 or self.bump <= 0 or not 0 < self.amplitude <= 1:
            raise ValueError(f"reveal lies in [0, 1), crop and amplitude in (0, 1], bump above 0, got {self}")


class Traced(NamedTuple):
    """Where points went.

    Attributes:
        flow: From each point to its target [px], right and down, shape (B, Q, 2).
        peak: Largest divergence over the patches, shape (B, Q); low where the point is hidden in the second frame.
        weight: How much the largest divergence stands out, 1 less second over first, in [0, 1], shape (B, Q).
    """

    flow: Tensor
    peak: Tensor
    weight: Tensor


def categorical_kl(clean: Tensor, moved: Tensor) -> Tensor:
    """KL divergence of the distributions of logits `clean` from those of `moved`, (B, P, K) to (B, P)."""
    log_p, log_q = clean.float().log_softmax(-1), moved.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def squared_difference(clean: Tensor, moved: Tensor) -> Tensor:
    """The same for forecasts of pixels, (B, P, K) to (B, P): the KL divergence of Gaussians of one variance, scaled."""
    return (clean.float() - moved.float()).square().sum(-1)


@torch.no_grad()
def trace(
    predict: FramePredictor,
    first: Tensor,
    second: Tensor,
    points: Tensor,
    config: KlTracingConfig,
    *,
    divergence: Divergence = categorical_kl,
) -> Traced:
    """Trace points of the first frame to the second; 2 * masks * (zooms + 1) forecasts per point at most.

    Args:
        predict: The predictor.
        first: Frames in [0, 1], shape (B, 3, H, W).
        second: Same shape.
        points: Of the first frame [px], right and down from the first pixel's centre, shape (B, Q, 2).
        config: How.
        divergence: Of the predictor's outputs.

    Raises:
        ValueError: Shapes do not fit, or the predictor forecasts another number of patches than the grid has.
    """
    expect_shape("first", first, (None, 3, None, None))
    expect_shape("second", second, first.shape)
    expect_shape("points", points, (first.shape[0], None, 2))
    count, side = points.shape[1], torch.tensor(first.shape[:1:-1], device=first.device, dtype=points.dtype)
    a, b = (frames.repeat_interleave(count, 0) for frames in (first, second))
    start = (points.flatten(0, 1) + 0.5) / side  # in shares of the picture
    target, extent = start, 1.0
    here = there = torch.full_like(start, 0.5)
    for zoom in range(config.zooms + 1):
        local = (start - here) / extent + 0.5
        maps = _maps(predict, _cut(a, here, extent), _cut(b, there, extent), local, config, zoom, divergence)
        peak, best = maps.max(1)
        rows, columns = config.grid
        cell = torch.stack((best % columns + 0.5, best // columns + 0.5), 1) / torch.tensor(
            [columns, rows], device=first.device, dtype=points.dtype
        )
        target = there + (cell - 0.5) * extent
        # The next, smaller crops lie within the pictures, around the point and around its estimate.
        extent *= config.crop
        here, there = (place.clamp(extent / 2, 1 - extent / 2) for place in (start, target))
    second_best = maps.topk(2, 1).values[:, 1] if maps.shape[1] > 1 else torch.zeros_like(peak)
    weight = 1 - second_best / peak.clamp_min(1e-12)
    flow = (target - start) * side
    return Traced(flow.unflatten(0, (-1, count)), peak.view(-1, count), weight.view(-1, count))


class KlTracing:
    """Dense flow from traced points; a `FlowEstimator` without gradients, so good for targets and not for predictions.

    A lattice of points is traced forth, and back from where they arrived; the flow at a pixel is the mean of those of
    the points around it, weighted by nearness, by how much their peak stands out, and by whether they came back.

    Args:
        predict: The frozen predictor.
        config: How points are traced.
        points: Points along each side of the lattice.
        cycle: Distance from its start at which a point that was traced forth and back counts as lost, as a share of
            the picture's height; None does not trace back.
        divergence: Of the predictor's outputs.
    """

    def __init__(
        self,
        predict: FramePredictor,
        config: KlTracingConfig,
        *,
        points: int = 8,
        cycle: float | None = 0.125,
        divergence: Divergence = categorical_kl,
    ) -> None:
        if points < 1 or (cycle is not None and cycle <= 0):
            raise ValueError(f"points must be at least 1 and cycle above 0 or None, got {points} and {cycle}")
        self.predict, self.config, self.points, self.cycle = predict, config, points, cycle
        self.divergence = divergence

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Flow from `a` to `b`, both (B, 3, H, W) in [0, 1]; shape (B, 2, H, W) [px]."""
        height, width = a.shape[-2:]
        place = (torch.arange(self.points, device=a.device, dtype=torch.float32) + 0.5) / self.points
        lattice = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1).flatten(0, 1)
        start = (lattice * torch.tensor([width, height], device=a.device) - 0.5).expand(len(a), -1, -1)
        forth = trace(self.predict, a, b, start, self.config, divergence=self.divergence)
        weight = forth.weight.clamp_min(1e-3)
        if self.cycle is not None:
            back = trace(self.predict, b, a, start + forth.flow, self.config, divergence=self.divergence)
            lost = torch.linalg.vector_norm(forth.flow + back.flow, dim=-1) > self.cycle * height
            weight = weight * torch.where(lost, 1e-3, 1.0)
        return _spread(start, forth.flow, weight, (height, width), height / self.points)


def _maps(
    predict: FramePredictor,
    first: Tensor,
    second: Tensor,
    place: Tensor,
    config: KlTracingConfig,
    zoom: int,
    divergence: Divergence,
) -> Tensor:
    """Mean divergence of each patch over the masks, shape (B, P); a patch counts where it is not shown."""
    patches = config.grid[0] * config.grid[1]
    generator = torch.Generator().manual_seed(config.seed * 1_000 + zoom)
    bumped = (first + config.amplitude * _bump(first, place, config.bump)).clamp(0, 1)
    total = first.new_zeros(len(first), patches)
    for _ in range(config.masks):
        shown = torch.rand(patches, generator=generator).argsort() < round(config.reveal * patches)
        revealed = shown.to(first.device).expand(len(first), -1)
        clean, moved = predict(first, second, revealed), predict(bumped, second, revealed)
        expect_shape("the predictor's output", clean, (len(first), patches, None))
        total += divergence(clean, moved).masked_fill(revealed, 0)
    return total / config.masks


def _bump(like: Tensor, place: Tensor, deviation: float) -> Tensor:
    """Gaussian of height 1 at `place` (shares of the picture, right and down), shape (B, 1, H, W)."""
    height, width = like.shape[-2:]
    down = (torch.arange(height, device=like.device) + 0.5) / height
    right = (torch.arange(width, device=like.device) + 0.5) / width
    square = (right - place[:, :1]).mul(width / height).square()[:, None] + (down - place[:, 1:]).square()[:, :, None]
    return torch.exp(-square / (2 * deviation**2))[:, None].to(like)


def _cut(frames: Tensor, centre: Tensor, extent: float) -> Tensor:
    """A window of `extent` of the picture around `centre` (shares), brought back to the picture's size."""
    if extent == 1.0:
        return frames
    theta = frames.new_zeros(len(frames), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = extent
    theta[:, :, 2] = 2 * centre - 1
    at = F.affine_grid(theta, list(frames.shape), align_corners=False)
    return F.grid_sample(frames, at, padding_mode="border", align_corners=False)


def _spread(points: Tensor, flow: Tensor, weight: Tensor, size: tuple[int, int], reach: float) -> Tensor:
    """Flow of points (B, Q, 2) to every pixel by weights and nearness, shape (B, 2, H, W)."""
    down, right = torch.meshgrid(
        torch.arange(size[0], device=flow.device), torch.arange(size[1], device=flow.device), indexing="ij"
    )
    gap = torch.stack((right, down), -1).flatten(0, 1)[None, :, None] - points[:, None]
    near = torch.softmax(-gap.square().sum(-1) / (2 * (reach / 2) ** 2) + weight.log()[:, None], -1)
    return (near @ flow).transpose(1, 2).unflatten(2, size)
