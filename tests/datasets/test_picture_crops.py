import numpy as np
import pytest
import torch

from headrace.datasets.picture_crops import HELD_OUT, TRAINING, PictureCrops


def test_training_and_held_out_pictures_are_disjoint():
    assert not set(TRAINING) & set(HELD_OUT)


def test_a_crop_depends_on_seed_and_index_only_and_is_in_range():
    crops = PictureCrops(size=24, count=10, part="held_out", seed=1)
    both = crops.batch(np.array([2, 7]))
    assert both.shape == (2, 3, 24, 24) and both.min() >= 0 and both.max() <= 1
    assert torch.equal(crops.batch(np.array([7]))[0], both[1])
    assert not torch.equal(PictureCrops(size=24, count=10, part="held_out", seed=2).batch(np.array([7]))[0], both[1])


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match="'training' or 'held_out'"):
        PictureCrops(size=24, count=1, part="validation")
