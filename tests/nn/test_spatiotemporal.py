import pytest
import torch

from headrace.nn.spatiotemporal import PositionBias, SpatiotemporalConfig, SpatiotemporalStack, rotate_by_place

SMALL = {"width": 12, "depth": 2, "heads": 2, "head_width": 6}


def test_a_causal_stack_sees_no_later_frame():
    torch.manual_seed(0)
    stack = SpatiotemporalStack(SpatiotemporalConfig(causal=True, conditioned=True, **SMALL)).eval()
    x, condition = torch.randn(1, 5, 7, 12), torch.randn(1, 5, 12)
    before = stack(x, (2, 3), condition=condition)
    for part in (x, condition):
        part[:, 3] += 1
    after = stack(x, (2, 3), condition=condition)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_an_open_stack_sees_later_frames_unless_they_are_hidden():
    torch.manual_seed(0)
    stack = SpatiotemporalStack(SpatiotemporalConfig(**SMALL)).eval()
    x = torch.randn(2, 6, 6, 12)
    other = x.clone()
    other[:, 5] += 1
    assert not torch.allclose(stack(x, (2, 3))[:, 0], stack(other, (2, 3))[:, 0], atol=1e-6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 5] = False
    for block in stack.blocks:  # the mask is the attention's; convolutions reach into the neighbouring frame
        torch.nn.init.zeros_(block.position.convolution.weight)
    seen, hidden = (stack(clip, (2, 3), frame_mask=mask)[:, :5] for clip in (x, other))
    torch.testing.assert_close(seen, hidden)


def test_the_bias_depends_on_the_offset_alone():
    torch.manual_seed(0)
    bias = PositionBias(8, 3)(4, 5).detach()
    assert bias.shape == (3, 20, 20)
    torch.testing.assert_close(bias[:, 0, 6], bias[:, 7, 13])  # one down, one to the right
    assert not torch.allclose(bias[:, 0, 6], bias[:, 6, 0])


def test_rotation_keeps_length_and_depends_on_distance():
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    rows = rotate_by_place(torch.stack((q, k, q, k)))
    torch.testing.assert_close(rows.norm(dim=-1), torch.stack((q, k, q, k)).norm(dim=-1))
    torch.testing.assert_close(rows[0] @ rows[1], rows[2] @ rows[3])


def test_a_fresh_modulation_ignores_the_condition():
    torch.manual_seed(0)
    stack = SpatiotemporalStack(SpatiotemporalConfig(causal=True, conditioned=True, **SMALL)).eval()
    x = torch.randn(1, 2, 6, 12)
    one, two = (stack(x, (2, 3), condition=torch.randn(1, 2, 12)) for _ in range(2))
    assert torch.equal(one, two)


def test_misuse_is_named():
    stack = SpatiotemporalStack(SpatiotemporalConfig(**SMALL))
    with pytest.raises(ValueError, match="takes no condition"):
        stack(torch.randn(1, 2, 6, 12), (2, 3), condition=torch.randn(1, 2, 12))
    with pytest.raises(ValueError, match="at least 9 tokens"):
        stack(torch.randn(1, 2, 6, 12), (3, 3))
    with pytest.raises(ValueError, match="even"):
        SpatiotemporalConfig(head_width=5)
