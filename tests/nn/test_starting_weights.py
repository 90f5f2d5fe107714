import pytest
import torch
from torch import nn

from headrace.nn.starting_weights import draw_weights


@pytest.mark.parametrize("layer", [nn.Linear(400, 300), nn.Conv2d(4, 300, 10, bias=False)])
@pytest.mark.parametrize(("gain", "std"), [(0.0, 0.02), (1.0, 0.05)])
def test_the_deviation_is_the_released_one_or_follows_the_fan_in(layer, gain, std):
    torch.manual_seed(0)
    draw_weights(layer, gain=gain)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    assert layer.bias is None or not layer.bias.any()


def test_other_modules_stay_as_they_are():
    norm = nn.LayerNorm(8)
    draw_weights(norm, gain=1.0)
    assert torch.equal(norm.weight, torch.ones(8))
