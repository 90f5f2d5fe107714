import math

import pytest
import torch

from headrace.flow.time import (
    beta_time,
    fat_logit_normal_time,
    logit_normal_time,
    segment_time,
    stratified_time,
    uniform_time,
)

COUNT = 40_000


def share_below(times, bound):
    return (times < bound).float().mean().item()


def test_beta_leans_to_noise_with_the_known_mean_and_law(draw):
    times = beta_time(COUNT, generator=draw)
    assert abs(times.mean().item() - 0.999 * 0.4) < 0.005
    assert times.max() <= 0.999
    assert abs(share_below(times, 0.25) - (1 - (1 - 0.25 / 0.999) ** 1.5)) < 0.01


def test_logit_normal_has_its_quantiles(draw):
    normal = torch.distributions.Normal(0.0, 1.0)
    times = logit_normal_time(COUNT, mean=-0.5, std=1.5, generator=draw)
    for bound in (0.1, 0.5, 0.8):
        expected = normal.cdf(torch.tensor((math.log(bound / (1 - bound)) + 0.5) / 1.5)).item()
        assert abs(share_below(times, bound) - expected) < 0.01


def test_fat_logit_normal_mixes_the_even_share_in(draw):
    # P(t < 0.1) = 0.9 * Phi(logit 0.1) + 0.1 * 0.1; the pure law has 0.014
    assert abs(share_below(fat_logit_normal_time(COUNT, generator=draw), 0.1) - 0.0226) < 0.003
    assert abs(share_below(fat_logit_normal_time(COUNT, uniform_share=1.0, generator=draw), 0.1) - 0.1) < 0.005
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        fat_logit_normal_time(4, uniform_share=1.5)


def test_stratified_hits_every_part_once_in_random_order(draw):
    times = stratified_time(64, generator=draw)
    assert sorted((times * 64).int().tolist()) == list(range(64))
    assert times.tolist() != sorted(times.tolist())


def test_segments_share_the_batch_and_keep_their_bounds(draw):
    borders = (0.0, 0.1, 0.7, 1.0)
    drawn = segment_time(10, borders, generator=draw)
    assert torch.bincount(drawn.segment, minlength=3).tolist() == [4, 3, 3]
    edges = torch.tensor(borders)
    assert (drawn.t >= edges[drawn.segment]).all() and (drawn.t <= edges[drawn.segment + 1]).all()
    with pytest.raises(ValueError, match="at least 3"):
        segment_time(2, borders)
    with pytest.raises(ValueError, match="rise"):
        segment_time(4, (0.0, 0.5, 0.5))


def test_a_seed_fixes_every_sampler():
    samplers = [uniform_time, beta_time, logit_normal_time, fat_logit_normal_time, stratified_time]
    for sampler in samplers:
        first, second = (sampler(8, generator=torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(first, second) and first.shape == (8,) and first.dtype == torch.float32


def test_beta_without_closed_inverse_is_refused():
    with pytest.raises(ValueError, match="must be 1"):
        beta_time(3, alpha=2.0, beta=2.0)
