import pytest
import torch
from torch.nn import functional as F

from headrace.datasets.random_shift import random_shift


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 2, 3, 10, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_equals_padding_by_the_edge_and_cropping(images):
    shifted = random_shift(images, 3, torch.Generator().manual_seed(1))
    shifts = torch.randint(-3, 4, (6, 2), generator=torch.Generator().manual_seed(1))
    flat = images.permute(0, 1, 2, 5, 3, 4).reshape(6, -1, 10, 12).float()
    padded = F.pad(flat, (3, 3, 3, 3), mode="replicate")
    for sample, (down, right) in enumerate(shifts.tolist()):
        crop = padded[sample, :, 3 + down : 13 + down, 3 + right : 15 + right]
        expected = crop.reshape(2, 3, 3, 10, 12).permute(0, 1, 3, 4, 2).byte()
        assert torch.equal(shifted[sample], expected)


def test_the_generator_fixes_it_and_zero_changes_nothing(images):
    once, again = (random_shift(images, 4, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, images)
    assert torch.equal(random_shift(images, 0, torch.Generator()), images)


def test_all_frames_of_a_sample_move_together(images):
    same = images[:, :1, :1].expand_as(images).contiguous()
    shifted = random_shift(same, 4, torch.Generator().manual_seed(3))
    assert torch.equal(shifted, shifted[:, :1, :1].expand_as(shifted))


def test_a_shift_as_large_as_the_picture_is_refused(images):
    with pytest.raises(ValueError, match="below the picture's 10 x 12, got 10"):
        random_shift(images, 10, torch.Generator())
