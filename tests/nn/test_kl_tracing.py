"""Tracing through predictors whose motion is known exactly."""

import pytest
import torch
import torch.nn.functional as F

from headrace.nn.kl_tracing import KlTracing, KlTracingConfig, categorical_kl, squared_difference, trace

SIDE, PATCH = 32, 4
GRID = (SIDE // PATCH, SIDE // PATCH)
BOOK = torch.rand(64, 3 * PATCH * PATCH, generator=torch.Generator().manual_seed(1))


def patches(frames):
    return F.unfold(frames, PATCH, stride=PATCH).transpose(1, 2)


class PanPredictor:
    """Knows that everything moves by (right, down) px: a patch's code is likely the nearer it is to what arrives there.

    Shown patches are certain, so that nothing can be read off them.
    """

    def __init__(self, right, down):
        self.shift, self.calls = (down, right), 0

    def __call__(self, first, second, revealed):
        self.calls += 1
        arriving = patches(first.roll(self.shift, (2, 3)))
        logits = -8 * torch.cdist(arriving, BOOK.expand(len(first), -1, -1))
        certain = -8 * torch.cdist(patches(second), BOOK.expand(len(first), -1, -1))
        return torch.where(revealed[..., None], certain, logits)


def pair(right, down, seed=0):
    first = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return first, first.roll((down, right), (2, 3))


def inner_points():
    """Centres of patches from which nothing wraps around."""
    place = torch.arange(2, 6) * PATCH + (PATCH - 1) / 2
    return torch.stack(torch.meshgrid(place, place, indexing="xy"), -1).flatten(0, 1).expand(2, -1, -1)


CONFIG = KlTracingConfig(grid=GRID, bump=1.5 / SIDE)


@pytest.mark.parametrize("motion", [(0, 0), (4, 0), (-4, 8), (0, -4)])
def test_points_arrive_where_the_pan_takes_them(motion):
    traced = trace(PanPredictor(*motion), *pair(*motion), inner_points(), CONFIG)
    expected = torch.tensor(motion).float().expand_as(traced.flow)
    assert ((traced.flow - expected).abs() < 1e-3).all(-1).double().mean() > 0.95
    assert traced.peak.min() > 0 and 0 <= traced.weight.min() <= traced.weight.max() <= 1


def test_one_mask_hides_the_share_of_targets_that_it_shows_and_five_do_not():
    def hits(masks):
        config = KlTracingConfig(grid=GRID, bump=1.5 / SIDE, reveal=0.4, masks=masks)
        traced = trace(PanPredictor(4, 0), *pair(4, 0), inner_points(), config)
        return (traced.flow - torch.tensor([4.0, 0.0])).abs().amax(-1).lt(1e-3).double().mean()

    assert hits(1) < 0.8 < 0.95 < hits(8)


def matching(first, second, revealed):
    """Looks for each patch of the second picture everywhere in the first, and forecasts the code of what is there."""
    windows = F.unfold(first, PATCH).transpose(1, 2)
    found = torch.cdist(patches(second), windows).argmin(-1)
    content = windows.gather(1, found[..., None].expand(-1, -1, windows.shape[-1]))
    return -8 * torch.cdist(content, BOOK.expand(len(first), -1, -1))


def test_a_zoom_undoes_its_crop_and_gets_below_a_patch():
    coarse = F.interpolate(
        torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(3)), size=48, mode="bicubic"
    )
    first, second = coarse[..., 8:40, 8:40].clamp(0, 1), coarse[..., 8:40, 6:38].clamp(0, 1)  # 2 px to the right

    def error(zooms):
        config = KlTracingConfig(grid=GRID, bump=1.5 / SIDE, reveal=0.0, masks=1, zooms=zooms)
        flow = trace(matching, first, second, inner_points()[:1], config).flow
        return torch.linalg.vector_norm(flow - torch.tensor([2.0, 0.0]), dim=-1).median()

    assert error(3) < 0.75 * error(0)


def test_a_predictor_of_pixels_can_be_traced_too():
    def pixels(first, second, revealed):
        return patches(first.roll((0, 4), (2, 3)))

    traced = trace(pixels, *pair(4, 0), inner_points(), CONFIG, divergence=squared_difference)
    assert (traced.flow - torch.tensor([4.0, 0.0])).abs().max() < 1e-3


def test_dense_flow_in_the_middle_is_the_pan():
    class Both(PanPredictor):
        """Pans forth from the first picture given and back from the second."""

        def __init__(self, first):
            super().__init__(4, 0)
            self.first = first

        def __call__(self, first, second, revealed):
            forth = (first - self.first[:1]).abs().flatten(1).mean(1) < (first - second).abs().flatten(1).mean(1)
            ahead = PanPredictor(4, 0)(first, second, revealed)
            return torch.where(forth[:, None, None], ahead, PanPredictor(-4, 0)(first, second, revealed))

    first, second = (frames[:1] for frames in pair(4, 0))
    flow = KlTracing(Both(first), CONFIG, points=8)(first, second)
    assert flow.shape == (1, 2, SIDE, SIDE)
    inner = flow[:, :, 8:24, 8:24]
    assert (inner[:, 0] - 4).abs().mean() < 0.3 and inner[:, 1].abs().mean() < 0.3


def test_kl_is_0_only_between_equal_distributions():
    logits = torch.randn(2, 3, 5)
    torch.testing.assert_close(categorical_kl(logits, logits + 7), torch.zeros(2, 3), atol=1e-6, rtol=0)
    assert (categorical_kl(logits, logits.flip(-1)) > 0).all()


def test_a_predictor_on_another_grid_is_refused():
    config = KlTracingConfig(grid=(4, 4))
    with pytest.raises(ValueError, match=r"must have shape .*16"):
        trace(lambda first, second, revealed: torch.zeros(len(first), 64, 3), *pair(0, 0), inner_points(), config)
