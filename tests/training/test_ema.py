import pytest
import torch
from torch import nn

from headrace.training.ema import Ema


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    return model


def test_average_follows_the_recurrence(model):
    ema = Ema(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for n in range(20):
        model[0].weight.data.add_(1.0)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.shadow["0.weight"], expected)


def test_averaged_weights_are_lent_and_given_back(model):
    ema = Ema(model, decay=0.9)
    start = model[0].weight.detach().clone()
    model[0].weight.data.add_(1.0)
    with pytest.raises(RuntimeError, match="stop"), ema.applied_to(model):
        assert torch.equal(model[0].weight, start)
        raise RuntimeError("stop")
    assert torch.equal(model[0].weight, start + 1.0)


def test_frozen_parameters_are_not_averaged(model):
    assert "1.bias" not in Ema(model, decay=0.9).shadow


def test_average_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match=r"another model.*1\.weight"):
        Ema(model, decay=0.9).load(Ema(model[:1], decay=0.9).shadow, 3)


def test_decay_of_one_is_refused(model):
    with pytest.raises(ValueError, match="below 1"):
        Ema(model, decay=1.0)
