import pytest
import timm
import torch
from torch import nn

from headrace.nn.distill import LayerwiseDistillation, layer_weights
from headrace.nn.vit_features import block_outputs, patch_tokens


def vit(*, width=32, depth=3, patch=8):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=4,
        num_classes=0,
        dynamic_img_size=True,
    )


def hidden(model, pixels):
    return [patch_tokens(model, tokens) for tokens in block_outputs(model, pixels)]


def test_weights_of_the_worked_example():
    got = layer_weights(torch.tensor([0.1, 0.2, 0.05, 0.0]), beta=2.0)
    torch.testing.assert_close(got, torch.tensor([0.106019, 0.258985, 0.287791, 0.347205]), atol=1e-6, rtol=0)


def test_beta_zero_is_the_prior_and_every_weighting_sums_to_one():
    alpha = torch.rand(7)
    torch.testing.assert_close(layer_weights(alpha, beta=0.0), layer_weights(alpha, weighting="prior"))
    for weighting in ("adaptive", "prior", "uniform", "last"):
        assert layer_weights(alpha, weighting=weighting).sum().item() == pytest.approx(1)
    assert layer_weights(alpha, weighting="last")[-1] == 1


def test_an_exact_copy_has_no_loss_and_a_strayed_one_learns_to_return():
    torch.manual_seed(0)
    student, pixels = vit(), torch.randn(2, 3, 32, 32)
    distill = LayerwiseDistillation(student, student)
    assert distill(pixels, hidden(student, pixels)).loss.item() < 1e-6
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        terms = distill(pixels, hidden(student, pixels))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_reaches_the_first_block_but_never_the_teacher():
    student, pixels = vit(), torch.randn(1, 3, 32, 32)
    distill = LayerwiseDistillation(vit(), student)
    distill.train()
    assert not distill.teacher.training
    distill(pixels, hidden(student, pixels)).loss.backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in distill.teacher.parameters())


def test_pairs_of_another_depth_and_width_match_proportionally():
    student = vit(width=16, depth=2)
    distill = LayerwiseDistillation(vit(width=32, depth=4), student)
    assert distill.partner == [1, 3]
    terms = distill(torch.randn(1, 3, 32, 32), hidden(student, torch.randn(1, 3, 32, 32)))
    assert terms.alpha.shape == (2,) and terms.loss.requires_grad


def test_towers_that_cannot_be_compared_are_refused():
    with pytest.raises(TypeError, match="teacher must be a timm VisionTransformer, got Linear"):
        LayerwiseDistillation(nn.Linear(2, 2), vit())
    with pytest.raises(ValueError, match="match one to one"):
        LayerwiseDistillation(vit(patch=8), vit(patch=16))
