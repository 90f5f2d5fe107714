import pytest
import torch
import torch.nn.functional as F

from headrace.nn.optical_flow import LucasKanade, warp


def texture(height, width, seed=0):
    """A smooth random picture in [0, 1]."""
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("shift", [(1.0, 0.0), (-2.5, 1.5), (4.0, 0.0), (-2.0, -3.4)])
def test_the_shift_of_a_texture_is_found_within_a_third_of_a_pixel(shift):
    # shift-invariant truth: sample one larger picture at two places
    big = texture(96, 96)
    constant = torch.tensor(shift).view(1, 2, 1, 1).expand(1, 2, 96, 96)
    a, b = big[..., 16:80, 16:80], warp(big, -constant)[..., 16:80, 16:80]
    error = (LucasKanade()(a, b) - constant[..., 16:80, 16:80]).norm(dim=1)[:, 8:-8, 8:-8]
    assert error.mean() < 0.3


def test_no_motion_gives_none_and_a_flat_picture_too():
    picture = texture(32, 32)
    assert LucasKanade()(picture, picture).abs().max() < 1e-3
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert LucasKanade()(flat, flat).abs().max() == 0


def test_gradients_reach_both_pictures():
    a, b = texture(32, 32).requires_grad_(), texture(32, 32, seed=1).requires_grad_()
    LucasKanade(steps=2)(a, b).square().mean().backward()
    for picture in (a, b):
        assert torch.isfinite(picture.grad).all() and picture.grad.abs().sum() > 0


def test_warp_reads_where_the_flow_points():
    picture = torch.arange(20.0).view(1, 1, 4, 5)
    right = torch.zeros(1, 2, 4, 5)
    right[:, 0] = 1
    torch.testing.assert_close(warp(picture, right)[..., :-1], picture[..., 1:])


def test_too_small_pictures_are_refused():
    with pytest.raises(ValueError, match="at least 16 px"):
        LucasKanade()(torch.rand(1, 3, 12, 12), torch.rand(1, 3, 12, 12))
