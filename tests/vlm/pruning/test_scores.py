import pytest
import torch

from headrace.vlm.pruning.scores import best, cut_size, entropy_ratio, evidence, fused_score, smoothed


def qkv(batch=2, heads=3, tokens=11, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3)]


def test_relay_row_is_the_cls_row_of_full_attention():
    q, k, v = qkv()
    found = evidence(q, k, v, scaling=0.3)
    row = (q @ k.transpose(-1, -2) * 0.3).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(found.attention, row / row.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    values = (v @ v.transpose(-1, -2)).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(found.semantic, values / values.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_switches_change_what_they_name():
    q, k, v = qkv()
    base = evidence(q, k, v, scaling=0.3)
    patches = evidence(q, k, v, scaling=0.3, softmax="patch_only")
    rows = (q[:, :, :1] @ k[:, :, 1:].transpose(-1, -2) * 0.3).softmax(-1).mean(1)[:, 0]
    torch.testing.assert_close(patches.attention, rows, rtol=1e-5, atol=1e-6)
    scaled = evidence(q, k, v, scaling=0.3, semantic_scale="sqrt_d")
    assert not torch.allclose(scaled.semantic, base.semantic) and torch.equal(scaled.attention, base.attention)
    without = evidence(q, k, v, scaling=0.3, semantic=False)
    torch.testing.assert_close(fused_score(without), fused_score(base, ("attention", "density")), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("relay", ["cls", "mean"])
def test_padding_changes_nothing(relay):
    """A row padded to the length of its neighbours has the evidence it has alone."""
    q, k, v = qkv(batch=1)
    own = int(relay == "cls")
    valid = torch.ones(1, 11 - own, dtype=torch.bool)
    padded = [torch.cat([t, torch.randn(1, 3, 4, 5)], dim=2) for t in (q, k, v)]
    mask = torch.cat([valid, torch.zeros(1, 4, dtype=torch.bool)], dim=1)
    alone = evidence(q, k, v, scaling=0.4, relay=relay)
    together = evidence(*padded, scaling=0.4, relay=relay, valid=mask)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other[:, : one.shape[1]], one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy_ratio(alone.attention), entropy_ratio(together.attention, mask))


def test_a_cls_token_that_attends_to_itself_alone_says_nothing_about_patches():
    q, k, v = qkv()
    q[:, :, 0], k[:, :, 0], k[:, :, 1:] = 100.0, 100.0, -100.0  # exp underflows for every patch
    found = evidence(q, k, v, scaling=1.0)
    assert torch.isfinite(fused_score(found)).all()
    torch.testing.assert_close(entropy_ratio(found.attention), torch.ones(2))


def test_entropy_ratio_of_known_rows():
    one_hot = torch.zeros(1, 64, dtype=torch.float16)
    one_hot[0, 3] = 1
    assert float(entropy_ratio(one_hot)) == 0
    assert float(entropy_ratio(torch.full((1, 64), 1 / 64))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "ratio, counts",
    [
        (0.95, [565, 553, 541, 529, 516, 502, 487, 470, 450, 423, 64]),
        (0.85, [544, 513, 482, 451, 420, 389, 357, 324, 288, 244, 64]),
        (0.70, [518, 463, 412, 365, 321, 280, 241, 204, 168, 130, 64]),
    ],
)
def test_schedule_arithmetic_for_a_constant_ratio(ratio, counts):
    count, seen = torch.tensor([576]), []
    for remaining in range(20, -1, -2):
        count = count - cut_size(count, 64, remaining, torch.tensor([ratio]))
        seen.append(int(count))
    assert seen == counts


def test_lower_entropy_never_cuts_fewer():
    sizes = [int(cut_size(torch.tensor([500]), 64, 10, torch.tensor([r / 100]))) for r in range(101)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0


def test_ties_go_to_the_lower_index_and_order_is_kept():
    assert best(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 2).tolist() == [[1, 2]]
    assert best(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 3).tolist() == [[1, 2, 3]]


def test_first_layer_has_no_history():
    current = torch.rand(2, 3)
    assert torch.equal(smoothed(None, current, 0.9), current)
    torch.testing.assert_close(smoothed(torch.zeros(2, 3), current, 0.25), 0.75 * current)
