import pytest
import torch

from headrace.nn.patches import patchify, unpatchify


def test_round_trip_on_a_wide_picture():
    images = torch.randn(2, 3, 8, 20)
    assert torch.equal(unpatchify(patchify(images, 4), (2, 5)), images)


def test_order_is_row_major_patches_and_channel_row_column_inside():
    images = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6)
    second_row_first = patchify(images, 2)[0, 3]
    assert torch.equal(second_row_first, images[0, :, 2:4, 0:2].flatten())


def test_sides_that_patches_do_not_fill_are_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match=r"30 x 33 px.*32 x 32"):
        patchify(torch.zeros(1, 3, 30, 33), 8)


def test_a_wrong_grid_is_refused():
    with pytest.raises(ValueError, match="2 x 2 grid"):
        unpatchify(torch.zeros(1, 5, 12), (2, 2))
