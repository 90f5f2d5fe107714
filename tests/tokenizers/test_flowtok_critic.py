import pytest
import torch
from torch import nn

from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_critic import CriticConfig, ImageTokenizerTraining
from headrace.tokenizers.tokenflow_critic import PatchCritic


class Blurred(nn.Module):
    """Distance of strongly blurred pictures."""

    def forward(self, a, b):
        return nn.functional.avg_pool2d(a - b, 8).square().mean((1, 2, 3))


@pytest.fixture
def training():
    torch.manual_seed(0)
    return ImageTokenizerTraining(
        FlowTok(FlowTokConfig.tiny()),
        perceptual=Blurred(),
        critic=PatchCritic(width=8, layers=2),
        config=CriticConfig(start=2),
    ).train()


def batch(training):
    return torch.rand(3, 3, 32, 32), training.model.text_tokens(["red square top left"] * 3)


def test_the_critic_enters_at_its_step_and_each_net_gets_its_own_gradient(training):
    images, text = batch(training)
    first = training(images, text)
    assert "critic" not in first
    terms = first["squared"] + 1.1 * first["perceptual"] + 1e-6 * first["kl"]
    assert first["total"].item() == pytest.approx(terms.item(), abs=1e-6)
    second = training(images, text)
    second["adversarial"].backward(retain_graph=True)
    assert all(p.grad is None for p in training.critic.parameters())
    assert training.model.image.decoder.smooth.weight.grad.abs().max() > 0
    training.zero_grad(set_to_none=True)
    second["critic"].backward()
    assert all(p.grad is None for p in training.model.parameters())
    assert any(p.grad.abs().max() > 0 for p in training.critic.parameters())


def test_lecam_is_zero_where_verdicts_do_not_stray_and_grows_where_they_do(training):
    training.eval()
    training.real_mean.fill_(1.0)
    training.made_mean.fill_(-1.0)
    calm = training._lecam(torch.tensor([-1.0]), torch.tensor([1.0]))
    wild = training._lecam(torch.tensor([3.0]), torch.tensor([-3.0]))
    assert calm == 0
    assert wild.item() == pytest.approx(16 + 16)


def test_averages_follow_the_verdicts_only_in_training(training):
    training._lecam(torch.full((4,), 2.0), torch.full((4,), -2.0))
    assert training.real_mean.item() == pytest.approx(0.002) and training.made_mean.item() == pytest.approx(-0.002)
    training.eval()._lecam(torch.full((4,), 9.0), torch.full((4,), 9.0))
    assert training.real_mean.item() == pytest.approx(0.002)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="not be negative"):
        CriticConfig(adversarial=-1.0)
