import copy

import pytest
import torch
from torch import nn

from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_critic import CriticConfig, ImageTokenizerTraining
from headrace.tokenizers.tokenflow_critic import PatchCritic
from headrace.training.batches import batches
from headrace.training.log import read_log
from headrace.training.loop import fit


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
    assert all(first[name] == 0 for name in ("adversarial", "critic", "lecam"))
    terms = first["squared"] + 1.1 * first["perceptual"] + 1e-6 * first["kl"]
    assert first["total"].item() == pytest.approx(terms.item(), abs=1e-6)
    second = training(images, text)
    assert second.keys() == first.keys()
    assert second["critic"] > 0
    second["adversarial"].backward(retain_graph=True)
    assert all(p.grad is None for p in training.critic.parameters())
    assert training.model.image.decoder.smooth.weight.grad.abs().max() > 0
    training.zero_grad(set_to_none=True)
    second["critic"].backward()
    assert all(p.grad is None for p in training.model.parameters())
    assert any(p.grad.abs().max() > 0 for p in training.critic.parameters())


def test_a_run_goes_on_when_the_critic_starts(training, tmp_path):
    class Noise:
        def __len__(self):
            return 6

        def batch(self, indices):
            return torch.rand(len(indices), 3, 32, 32)

    def loss(model, images, generator):
        return model(images, model.model.text_tokens(["red square top left"] * len(images)), generator)

    before = copy.deepcopy(training.critic.state_dict())
    trained = [*training.model.image.parameters(), *training.critic.parameters()]
    fit(
        training,
        loss,
        torch.optim.AdamW(trained, lr=1e-3),
        batches(Noise(), 3, seed=0),
        steps=3,
        out=tmp_path,
        progress=False,
    )
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["critic"] > 0 for row in rows] == [False, True, True]
    assert not torch.equal(training.critic.net[0].weight, before["net.0.weight"])


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
