import dataclasses

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from headrace.tokenizers import flowtok_loss
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_image import Posterior
from headrace.tokenizers.flowtok_loss import (
    image_to_text_loss,
    image_tokenizer_loss,
    posterior_kl,
    text_to_image_loss,
    text_tokenizer_loss,
)
from headrace.tokenizers.flowtok_text import contrastive_loss, gaussian_divergence, wall_divergence

TINY = FlowTokConfig.tiny()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FlowTok(TINY).train()


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def wall_at(value):
    return wall_divergence(Posterior(torch.full((1, 1, 1), value), torch.zeros(1, 1, 1))).item()


def test_the_wall_is_flat_inside_three_and_steep_beyond():
    assert wall_at(1.0) < 1e-3
    assert 0.25 < wall_at(3.0) < 0.7
    assert wall_at(5.0) > 5


def test_gaussian_divergence_is_the_textbook_one():
    mean, logvar = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_divergence(Posterior(mean, logvar)), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Posterior(mean, logvar).kl(), wanted.sum(dim=(1, 2)), rtol=1e-5, atol=1e-5)


def test_reductions_differ_by_the_sizes_they_sum_over():
    posterior = Posterior(torch.randn(6, 12, 4), torch.randn(6, 12, 4))
    kl = {r: posterior_kl(posterior, dataclasses.replace(TINY, kl_reduction=r)).item() for r in
          ("mean", "per_sample_sum", "batch_sum")}  # fmt: skip
    assert kl["per_sample_sum"] == pytest.approx(48 * kl["mean"], rel=1e-4)
    assert kl["batch_sum"] == pytest.approx(6 * kl["per_sample_sum"], rel=1e-4)


def test_equal_captions_are_no_negatives():
    tokens = torch.randn(4, 3, 2)
    tokens[1] = tokens[0]
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    sharp = torch.tensor(5.0)
    assert contrastive_loss(tokens, tokens, sharp) > 0.3
    assert contrastive_loss(tokens, tokens, sharp, same=same) < 0.05


def test_text_to_image_trains_every_part_but_the_text_tower(model):
    ids = model.captions.ids(["red square top left", "blue circle bottom left", "red square top left"])
    target = torch.randn(3, 12, 4)
    before = target.clone()
    terms = text_to_image_loss(model, ids, target, generator=seeded())
    terms.total.backward()
    assert torch.equal(target, before)
    reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"projector", "align", "velocity"}
    assert model.to_image.projector.linear.weight.grad.abs().max() > 0
    assert terms.flow.shape == (3,)
    again = text_to_image_loss(model.eval(), ids, target, generator=seeded())
    assert torch.equal(again.total, text_to_image_loss(model, ids, target, generator=seeded()).total)


def test_image_tokenizer_loss_adds_up_with_a_perceptual_distance(model):
    images = torch.rand(2, 3, 32, 32)
    text = model.text_tokens(["red square top left"] * 2)
    terms = image_tokenizer_loss(model, images, text, perceptual=lambda a, b: (a - b).abs().mean(), generator=seeded())
    wanted = terms.squared + 1.1 * (terms.decoded - images).abs().mean() + 1e-6 * terms.kl
    assert terms.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    terms.total.backward()
    assert all(p.grad is not None for p in model.image.parameters())


def test_text_tokenizer_scores_up_to_the_end_mark_only(model):
    model.eval()  # without dropout
    ids = model.captions.ids(["red square top left"])
    terms = text_tokenizer_loss(model, ids, generator=seeded())
    assert terms.words.item() == pytest.approx(torch.tensor(float(TINY.captions.vocabulary)).log().item(), abs=0.7)
    with torch.no_grad():  # what the decoder says after the end mark costs nothing
        decoder = model.captioner().decoder
        told, ended = decoder.forward, int((ids[0] == model.captions.ids.end).nonzero()[0, 0]) + 1

        def babbling(tokens):
            scores = told(tokens)
            return torch.cat([scores[:, :ended], 9 * torch.randn_like(scores[:, ended:])], 1)

        decoder.forward = babbling
        assert text_tokenizer_loss(model, ids, generator=seeded()).words.item() == pytest.approx(terms.words.item())
        del decoder.forward
    terms.total.backward()
    assert model.captioner().projector.linear.weight.grad.abs().max() > 0
    assert model.captioner().decoder.words.weight.grad.abs().max() > 0


def test_image_to_text_leaves_the_text_tokenizer_alone(model):
    ids = model.captions.ids(["red square top left", "blue circle bottom left"])
    image_to_text_loss(model, torch.randn(2, 12, 4), ids, generator=seeded()).backward()
    bridge = model.captioner()
    assert bridge.velocity.out.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in (*bridge.projector.parameters(), *bridge.decoder.parameters()))


def test_image_to_text_aims_at_one_target_per_caption_in_training_too(model, monkeypatch):
    """Dropout in the frozen text tokenizer would move the target at every update."""
    model.train()
    targets = []
    monkeypatch.setattr(flowtok_loss, "swap_flagged", lambda target, flags: targets.append(target) or target)
    ids = model.captions.ids(["red square top left", "blue circle bottom left"])
    for _ in range(2):
        image_to_text_loss(model, torch.randn(2, 12, 4), ids, generator=seeded())
    assert torch.equal(*targets) and model.captioner().projector.training
    model.eval()


def test_image_to_text_learns_the_beginning_of_its_path(model, monkeypatch):
    times = []
    net = model.captioner().velocity
    monkeypatch.setattr(net, "forward", lambda x, t, flags: times.append(t) or torch.zeros_like(x))
    ids = model.captions.ids(["red square top left"] * 2000)
    image_to_text_loss(model, torch.zeros(2000, 12, 4), ids, generator=seeded())
    early = (times[0] < 0.05).float().mean().item()
    assert 0.25 < early < 0.35 and 0.9 < times[0].max() <= 1


@pytest.mark.slow
def test_the_source_collapses_without_its_divergence_and_not_with_it():
    spreads = {}
    for weight in (0.3, 1e-4):
        torch.manual_seed(0)
        model = FlowTok(dataclasses.replace(TINY, kl_weight=weight)).train()
        words = TINY.captions.words
        ids = model.captions.ids([f"{a} {b}" for a in words[:3] for b in words[3:6]])
        target = torch.randn(9, 12, 4, generator=seeded())
        optimizer = torch.optim.AdamW(model.to_image.parameters(), lr=3e-3)
        for step in range(70):
            terms = text_to_image_loss(model, ids, target, generator=seeded(step))
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
        spreads[weight] = terms.source_std.item()
    assert spreads[0.3] > 0.4
    assert spreads[1e-4] < 0.8 * spreads[0.3]
