from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headrace.nn.quantizers.code_restart import CodeRestart
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_critic import PatchCritic, hinge_loss
from headrace.tokenizers.tokenflow_loss import (
    USAGE_WINDOW,
    TokenFlowLossConfig,
    TokenFlowTraining,
    build_optimizer,
    with_new_decoder,
)
from headrace.tokenizers.tokenflow_semantic import CLIP_MEAN, CLIP_STD, TowerConfig, normalise
from headrace.tokenizers.tokenflow_teacher import TowerTeacher, pretrained_teacher


class Difference(nn.Module):
    """A perceptual distance of nothing but pixels."""

    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


def build(stage="all", **options):
    torch.manual_seed(0)
    model = TokenFlow(TokenFlowConfig.tiny())
    teacher = TowerTeacher(model.tower, torch.randn(64, 128) / 128**0.5) if stage == "all" else None
    config = TokenFlowLossConfig(stage=stage, adversarial_start=2, **options)
    critic = PatchCritic(width=8, layers=2)
    return TokenFlowTraining(model, teacher=teacher, perceptual=Difference(), critic=critic, config=config)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_total_is_the_weighted_sum_and_the_critic_waits(images):
    training = build(scale_drop=0.0)
    first, second = training(images), training(images)
    assert first["adversarial"] == 0 and first["critic"] == 0 and first.keys() == second.keys()
    parts = second["vector"] + second["commitment"] + second["semantic"] + second["pixel"] + second["perceptual"]
    wanted = parts + 0.5 * second["adversarial"] + 0.5 * second["critic"]
    torch.testing.assert_close(second["total"], wanted)


def test_one_backward_gives_both_networks_their_own_gradients(images):
    training = build(scale_drop=0.0)
    training(images)
    training(images)["total"].backward()
    ours = [p.grad.clone() for p in training.critic.parameters()]
    last = training.model.pixel_decoder.conv_out.weight.grad.clone()
    training.zero_grad()
    made = training.model.decode_pixels(training.model.quantize(images).features)
    (0.5 * hinge_loss(training.critic(images), training.critic(made.detach()))).backward()
    for mine, parameter in zip(ours, training.critic.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-5)
    training.zero_grad()
    terms = F.mse_loss(made, images) + (made - images).abs().mean() - 0.5 * training.critic(made).mean()
    torch.testing.assert_close(torch.autograd.grad(terms, training.model.pixel_decoder.conv_out.weight)[0], last)


def test_the_teacher_sees_clip_statistics_and_does_not_learn(images):
    training = build()
    teacher = training.teacher
    wanted = F.linear(teacher.tower(normalise(images, CLIP_MEAN, CLIP_STD)), teacher.projection)
    assert torch.equal(teacher(images), wanted)
    assert teacher(images).shape == (2, 16, 64)
    training.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="projection"):
        TowerTeacher(training.model.tower)


def test_the_published_teacher_takes_every_weight_of_the_tower(monkeypatch):
    import timm

    create = timm.create_model
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 12}
    made = []

    def offline(name, *, pretrained=False, **options):
        if not pretrained:
            return create(name, **options)
        made.append(create(name.split(".")[0], **sizes))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", offline)
    teacher = pretrained_teacher(TowerConfig(size=32, patch=16, width=48, depth=2, heads=4, hidden=96))
    assert torch.equal(teacher.projection, made[0].head.weight)
    assert torch.equal(teacher.tower.model.blocks[1].mlp.fc2.weight, made[0].blocks[1].mlp.fc2.weight)
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 12)


def test_l2_form_is_the_squared_distance_of_unit_vectors(images):
    training = build(semantic_form="l2").eval()
    with torch.no_grad():
        value = training(images)["semantic"]
        predicted = training.model.decode_semantics(training.model.quantize(images).features)
        gap = F.normalize(predicted, dim=-1) - F.normalize(training.teacher(images), dim=-1)
    torch.testing.assert_close(value, gap.square().sum(-1).mean())


def test_scales_are_dropped_as_often_as_asked(images):
    training = build(scale_drop=0.5, drop_last=False)
    generator = torch.Generator().manual_seed(0)
    drawn = [training._drop(torch.device("cpu"), generator) for _ in range(2000)]
    assert drawn.count(None) == pytest.approx(1000, abs=100)
    assert set(drawn) == {None, 1, 2}
    training.eval()
    assert training._drop(torch.device("cpu"), generator) is None


def test_the_log_has_the_use_of_each_scale_though_scales_are_dropped(images):
    training = build(scale_drop=1.0)
    codes = []
    for place in (2, 1, 3):
        training._drop = lambda *_, place=place: place
        terms = training(images)
        codes.append(training.latest[0])
        assert [name for name in terms if name.startswith("usage_")] == [f"usage_{side}" for side in (1, 2, 3, 4)]
    # scale 3 (places 5..13, or 1..9 without scale 2) was in the last two of these updates only
    used = torch.cat([codes[1][:, 1:10], codes[2][:, 5:14]]).unique().numel()
    assert terms["usage_3"].item() == pytest.approx(used / 256)
    training.steps += USAGE_WINDOW - 1
    training._drop = lambda *_: 2
    assert training(images)["usage_3"].item() == 0
    assert training.eval()(images).keys() == terms.keys()


def test_training_lowers_the_terms_and_restart_keeps_count():
    training = build(scale_drop=0.0, adversarial=0.0, critic=0.0)
    training.restart = CodeRestart(256, every=2)
    optimizer = build_optimizer(training, lr=1e-3)
    plain = torch.tensor([0.7, -0.6]).view(2, 1, 1, 1).expand(2, 3, 64, 64).contiguous()
    history = []
    for _ in range(10):
        terms = training(plain)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    assert history[-1]["pixel"] < history[0]["pixel"]
    assert history[-1]["semantic"] < history[0]["semantic"]
    assert int(training.restart.steps) == 10 and int(training.steps) == 10


def test_factors_reach_tower_and_codebooks_alone(images):
    training = build()
    optimizer = build_optimizer(training, lr=1e-4, tower_factor=0.1, book_factor=5.0)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in training.parameters())
    for name, parameter in training.model.named_parameters():
        part = name.split(".")[0]
        wanted = {"tower": 1e-5, "quantizer": 5e-4}.get(part, 1e-4)
        assert rates[parameter] == pytest.approx(wanted), name


def test_each_network_is_clipped_on_its_own(images):
    training = build(scale_drop=0.0)
    optimizer = build_optimizer(training, lr=0.0, clip=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        training(images)["total"].backward()
        optimizer.step()
    for part in (training.model, training.critic):
        norm = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_the_decoder_stage_changes_nothing_but_the_decoder(images):
    before = build().model.eval()
    larger = replace(before.config.pixel_decoder, width=64)
    model = with_new_decoder(before, larger)
    training = TokenFlowTraining(
        model,
        teacher=None,
        perceptual=Difference(),
        critic=PatchCritic(width=8, layers=2),
        config=TokenFlowLossConfig(stage="decoder"),
    )
    optimizer = build_optimizer(training, lr=1e-3)
    terms = training(images)
    terms["total"].backward()
    optimizer.step()
    assert "semantic" not in terms and "vector" not in terms
    after = model.state_dict()
    for name, value in before.state_dict().items():
        if not name.startswith("pixel_decoder."):
            assert torch.equal(after[name], value), name
    assert torch.equal(model.eval().encode(images), before.encode(images))
    assert all(p.grad is not None for p in model.pixel_decoder.parameters())


def test_impossible_objectives_are_refused():
    with pytest.raises(ValueError, match="teacher"):
        TokenFlowTraining(
            TokenFlow(TokenFlowConfig.tiny()), teacher=None, perceptual=Difference(), critic=PatchCritic(width=8)
        )
    with pytest.raises(ValueError, match="fixed codes"):
        TokenFlowTraining(
            TokenFlow(TokenFlowConfig.tiny()),
            teacher=None,
            perceptual=Difference(),
            critic=PatchCritic(width=8),
            config=TokenFlowLossConfig(stage="decoder"),
            restart=CodeRestart(256, every=1),
        )
    with pytest.raises(ValueError, match="weights"):
        TokenFlowLossConfig(pixel=-1.0)
    with pytest.raises(ValueError, match="stage"):
        TokenFlowLossConfig(stage="encoder")
