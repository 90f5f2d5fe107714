import numpy as np
import pytest
import torch

from headrace.datasets.captioned_shapes import CAPTIONS, COLOURS, CaptionedShapes


def test_a_picture_depends_on_seed_and_index_only():
    shapes = CaptionedShapes(size=32, count=100, seed=3)
    together = shapes.batch(np.array([5, 41]))
    assert torch.equal(shapes.batch(np.array([41])).images[0], together.images[1])
    assert not torch.equal(together.images[0], together.images[1])
    assert not torch.equal(
        CaptionedShapes(size=32, count=100, seed=4).batch(np.array([5])).images[0], together.images[0]
    )


def test_the_caption_says_where_and_in_which_colour():
    shapes = CaptionedShapes(size=32, count=len(CAPTIONS))
    images, label = shapes.batch(np.arange(len(CAPTIONS)))
    assert label.tolist() == list(range(36))
    for image, caption in zip(images, CAPTIONS, strict=True):
        colour, _, row, column = caption.split()
        near = (image - torch.tensor(COLOURS[colour])[:, None, None]).abs().amax(0) < 0.13
        y, x = near.nonzero().float().mean(0)
        assert near.sum() > 20
        assert (y < 16) == (row == "top") and (x < 16) == (column == "left")


def test_shapes_of_one_place_differ_in_area():
    images, _ = CaptionedShapes(size=64, count=3 * 36).batch(np.arange(0, 12, 4))
    ground = images.flatten(2).median(-1).values[..., None, None]
    areas = ((images - ground).abs().amax(1) > 0.3).sum((1, 2))
    assert len(set(areas.tolist())) == 3


def test_sizes_too_small_to_see_are_refused():
    with pytest.raises(ValueError, match="at least 16 px"):
        CaptionedShapes(size=8, count=1)
