import pytest
import torch

from headrace.flow.loss import flow_matching_loss


def test_padding_does_not_count(draw):
    a, b = torch.randn(2, 4, 5, 3, generator=draw)
    mask = torch.ones(4, 5, 1)
    mask[:, 3:] = 0
    torch.testing.assert_close(flow_matching_loss(a, b, weight=mask), flow_matching_loss(a[:, :3], b[:, :3]))


def test_pair_weights_are_a_weighted_mean_of_rows(draw):
    a, b = torch.randn(2, 3, 5, generator=draw)
    weight = torch.tensor([0.5, 2.0, 0.5])
    rows = (a - b).square().mean(1)
    torch.testing.assert_close(flow_matching_loss(a, b, pair_weight=weight), (rows * weight).mean())
    mask = torch.ones(3, 5)
    torch.testing.assert_close(
        flow_matching_loss(a, b, pair_weight=weight, weight=mask), flow_matching_loss(a, b, pair_weight=weight)
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="one shape"):
        flow_matching_loss(torch.zeros(3, 1), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        flow_matching_loss(torch.zeros(3, 2), torch.zeros(3, 2, device="meta"))
    with pytest.raises(ValueError, match=r"\(3,\), got \(2,\)"):
        flow_matching_loss(torch.zeros(3, 2), torch.zeros(3, 2), pair_weight=torch.ones(2))
