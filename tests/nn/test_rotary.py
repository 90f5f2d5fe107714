import pytest
import torch

from headrace.nn.rotary import rotary_angles, rotate


def test_products_depend_on_the_difference_of_places_only():
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[2, 5], [4, 1], [7, 8], [9, 4]])  # two pairs, both apart by (2, -4)
    angles = rotary_angles(places, 8)
    products = [(rotate(q, angles[i : i + 1]) * rotate(k, angles[j : j + 1])).sum() for i, j in ((0, 1), (2, 3))]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(rotate(q, angles[:1]).norm(), q.norm())


def test_head_size_must_fit_the_axes():
    with pytest.raises(ValueError, match="divisible by 4"):
        rotary_angles(torch.zeros(3, 2), 6)
