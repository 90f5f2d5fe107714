import math

import numpy as np
import pytest
import torch

from headrace.datasets.recoloured import Recoloured, about_grey


class Two:
    """A grey picture and a red one."""

    def __len__(self):
        return 2

    def batch(self, indices):
        grey = torch.full((3, 4, 4), 0.5)
        red = torch.tensor([0.7, 0.4, 0.4]).view(3, 1, 1).expand(3, 4, 4)
        return torch.stack([(grey, red)[int(i) % 2] for i in indices])


def test_a_turn_about_grey_keeps_grey_and_length():
    turn = about_grey(1.1, 1.0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(turn.sum(1), torch.ones(3, dtype=torch.float64))
    third = about_grey(2 * math.pi / 3, 1.0)
    red = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(third @ red, torch.tensor([0.0, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(about_grey(0.3, 0.0), torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_colours_follow_from_seed_and_index():
    pictures = Recoloured(Two(), seed=3, share=1.0)
    both, second = pictures.batch(np.array([0, 1])), pictures.batch(np.array([1]))
    assert len(pictures) == 2 and torch.equal(both[1:], second)
    assert both.min() >= 0 and both.max() <= 1
    assert not torch.equal(second, Recoloured(Two(), seed=4, share=1.0).batch(np.array([1])))
    assert both[0].std(0).max() > 0.01  # the grey picture has a tint now
    assert (both[:, :, :1, :1] == both).all()  # one colour gives one colour


def test_no_share_changes_nothing():
    indices = np.array([0, 1])
    assert torch.equal(Recoloured(Two(), seed=0, share=0.0).batch(indices), Two().batch(indices))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        Recoloured(Two(), seed=0, share=1.5)
