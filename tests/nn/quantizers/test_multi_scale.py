import itertools

import pytest
import torch
import torch.nn.functional as F

from headrace.nn.quantizers.code_restart import CodeRestart
from headrace.nn.quantizers.code_usage import UsageCounter, usage_of
from headrace.nn.quantizers.joint_search import CODE_TILE, nearest_codes, unit_parts
from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

CONFIG = MultiScaleConfig(scales=(1, 2, 3, 5), dims=(6, 4), codes=48)


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return MultiScaleQuantizer(CONFIG)


def distances(queries, codebook, dims, weights):
    parts = zip(queries.split(dims, 1), codebook.split(dims, 1), weights, strict=True)
    return sum(w * (q[:, None] - e[None]).square().sum(2) for q, e, w in parts)


@pytest.mark.parametrize(("codes", "weights"), [(100, (1.0, 1.0)), (CODE_TILE * 2 + 64, (1.0, 0.3)), (64, (2.0, 1.0))])
def test_search_finds_the_smallest_summed_distance(codes, weights):
    torch.manual_seed(1)
    dims = (6, 4)
    queries, book = (unit_parts(torch.randn(n, 10), dims) for n in (300, codes))
    found = nearest_codes(queries, book, dims=dims, weights=weights)
    table = distances(queries.double(), book.double(), dims, weights)
    assert torch.equal(found, table.argmin(1))


def test_equal_codes_give_the_first():
    book = unit_parts(torch.randn(64, 4), (4,)).repeat(2 * CODE_TILE // 64, 1)
    found = nearest_codes(book[:64], book, dims=(4,), weights=(1.0,))
    assert torch.equal(found, torch.arange(64))


def test_unit_parts_are_of_length_one_each():
    parts = unit_parts(torch.randn(7, 10), (6, 4)).split((6, 4), dim=1)
    for part in parts:
        torch.testing.assert_close(part.norm(dim=1), torch.ones(7))


def test_bf16_callers_get_float32_codes(quantizer):
    features = torch.randn(2, 10, 5, 5)
    with torch.no_grad():
        plain = quantizer(features).codes
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer(features).codes, plain)


def test_codes_rebuild_the_features(quantizer):
    quantized = quantizer(torch.randn(2, 10, 5, 5))
    torch.testing.assert_close(quantizer.accumulate(quantized.codes), quantized.features, rtol=0, atol=2e-6)


def test_a_prefix_of_scales_is_a_preview_and_other_counts_are_refused(quantizer):
    codes = quantizer(torch.randn(1, 10, 5, 5)).codes
    total = torch.zeros(1, 10, 5, 5)
    for count, side in zip(itertools.accumulate(CONFIG.counts), CONFIG.scales, strict=True):
        own = quantizer.embed(codes[:, count - side * side : count]).transpose(1, 2).reshape(1, 10, side, side)
        total = total + F.interpolate(own, size=(5, 5), mode="bicubic")
        torch.testing.assert_close(quantizer.accumulate(codes[:, :count]), total, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"7 codes fill no prefix.*\[1, 5, 14, 39\]"):
        quantizer.accumulate(codes[:, :7])


def test_a_dropped_scale_leaves_no_codes(quantizer):
    features = torch.randn(1, 10, 5, 5)
    dropped = quantizer(features, drop=2)
    assert dropped.codes.shape[1] == 39 - 9
    assert torch.equal(dropped.codes[:, :5], quantizer(features).codes[:, :5])
    with pytest.raises(ValueError, match="drop"):
        quantizer(features, drop=0)


def test_gradient_of_one_half_stays_in_that_half(quantizer):
    features = torch.randn(1, 10, 5, 5, requires_grad=True)
    quantizer(features).features[:, 6:].square().sum().backward()
    assert features.grad[:, :6].abs().max() == 0
    assert features.grad[:, 6:].abs().max() > 0
    assert all(book.grad is None or book.grad.abs().max() == 0 for book in quantizer.books)


def test_losses_follow_the_formula(quantizer):
    quantized = quantizer(torch.randn(2, 10, 5, 5))
    chosen = quantizer.embed(quantized.codes)
    per_scale = [(c - q).square().mean() for c, q in zip(chosen.split(CONFIG.counts, 1), quantized.queries.split(CONFIG.counts, 1), strict=True)]  # fmt: skip  # noqa: E501
    torch.testing.assert_close(quantized.vector_loss, torch.stack(per_scale).mean())
    torch.testing.assert_close(quantized.commitment_loss, 0.25 * quantized.vector_loss)


def test_next_scale_inputs_change_only_after_the_scale_they_read(quantizer):
    codes = quantizer(torch.randn(1, 10, 5, 5)).codes
    rows = quantizer.next_scale_inputs(codes)
    assert rows.shape == (1, 39 - 1, 10)
    other = codes.clone()
    other[:, 5:14] = (other[:, 5:14] + 1) % CONFIG.codes
    changed = (quantizer.next_scale_inputs(other) != rows).any(-1)[0]
    assert not changed[: 4 + 9].any() and changed[4 + 9 :].any()
    assert torch.equal(quantizer.next_scale_inputs(codes[:, :5]), rows[:, : 4 + 9])
    again = quantizer.next_scale_inputs(codes[:, :14], refine=True)
    assert again.shape == (1, 4 + 9, 10)
    assert torch.equal(again[:, :4], rows[:, :4])
    torch.testing.assert_close(again[:, 4:] - rows[:, 4:13], quantizer.embed(codes[:, 5:14]))


def test_usage_equals_a_brute_force_count():
    torch.manual_seed(3)
    codes = torch.randint(0, 20, (6, 39))
    counter = UsageCounter(scales=CONFIG.scales, codes=48)
    counter.add(codes[:4])
    counter.add(codes[4:])
    assert counter.overall().used == len(set(codes.flatten().tolist()))
    assert counter.per_scale()[2].used == len(set(codes[:, 1:5].flatten().tolist()))
    assert usage_of(torch.full((8,), 3)).perplexity == pytest.approx(8)
    assert usage_of(torch.tensor([5, 0, 0])).perplexity == pytest.approx(1)


def test_restart_brings_dead_codes_back(quantizer):
    features = 3 * torch.randn(1, 10, 1, 1) + 0.5 * torch.randn(16, 10, 5, 5)
    optimizer = torch.optim.Adam(quantizer.parameters())
    before = quantizer(features)
    before.vector_loss.backward()
    optimizer.step()
    restart = CodeRestart(CONFIG.codes, every=2)
    assert restart.after_step(quantizer, before.codes, before.queries, optimizer) == 0
    moved = restart.after_step(quantizer, before.codes, before.queries, optimizer)
    used = before.codes.unique()
    assert moved == CONFIG.codes - len(used)
    dead = [row for row in range(CONFIG.codes) if row not in used]
    for book in quantizer.books:
        assert optimizer.state[book]["exp_avg"][dead].abs().max() == 0
    assert len(quantizer(features).codes.unique()) > len(used)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (2, 1)}, "rising"),
        ({"weights": (1.0,)}, "one number"),
        ({"codes": 1}, "codes"),
        ({"dims": ()}, "dims"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleConfig(**({"scales": (1, 2), "dims": (6, 4)} | changes))
