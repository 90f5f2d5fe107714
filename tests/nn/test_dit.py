import pytest
import torch

from headrace.nn.axial_rope import axial_angles, rotate_pairs
from headrace.nn.dit import SequenceDiT, SequenceDiTConfig

CONFIG = SequenceDiTConfig(tokens=5, channels=3, width=16, depth=2, heads=4)


def test_it_starts_at_zero_velocity_with_identity_blocks():
    net = SequenceDiT(CONFIG)
    x = torch.randn(2, 5, 3)
    assert net(x, torch.rand(2), torch.tensor([0, 1])).abs().max() == 0
    h, active = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[0](h, active), h)


def test_time_and_class_both_matter_once_trained():
    torch.manual_seed(0)
    net = SequenceDiT(CONFIG)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, label = torch.randn(1, 5, 3), torch.tensor([0])
    base = net(x, torch.tensor([0.2]), label)
    assert (net(x, torch.tensor([0.3]), label) - base).abs().max() > 1e-3
    assert (net(x, torch.tensor([0.2]), label + 1) - base).abs().max() > 1e-3


def test_wrong_token_count_is_named():
    with pytest.raises(ValueError, match=r"x must have shape \(B, 5, 3\), got \(2, 4, 3\)"):
        SequenceDiT(CONFIG)(torch.randn(2, 4, 3), torch.rand(2), torch.zeros(2))


def test_rotated_products_depend_on_the_offset_only():
    angles = axial_angles((4, 4), 8)
    q, k = torch.randn(8), torch.randn(8)
    turned = [[rotate_pairs(y, a.cos(), a.sin()) for a in angles] for y in (q, k)]
    same_offset = [
        turned[0][row * 4 + column] @ turned[1][(row + 1) * 4 + column + 1] for row in (0, 2) for column in (0, 2)
    ]
    torch.testing.assert_close(torch.stack(same_offset), same_offset[0].expand(4), atol=1e-5, rtol=1e-5)
    other = turned[0][0] @ turned[1][1]
    assert (other - same_offset[0]).abs() > 1e-3
