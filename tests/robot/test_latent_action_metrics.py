import pytest
import torch

from headrace.robot.latent_action_metrics import (
    code_usage,
    end_point_error,
    label_agreement,
    linear_probe,
    one_hot_rows,
    steering,
)


class Oracle:
    """A stand-in whose latent action is the change of brightness."""

    training = False

    class config:
        target = "pixels"

    def eval(self):
        return self

    def train(self, mode):
        return self

    def encode(self, clip):
        class actions:
            vectors = (clip[:, 1:] - clip[:, :-1]).mean((2, 3, 4))[:, :, None, None]

        return actions

    def decode(self, frames, vectors):
        return frames + vectors[..., None]


def test_usage_counts():
    usage = code_usage(torch.tensor([[0, 1], [1, 0]]), 8)
    assert usage.used == 2 and usage.share == 0.25 and usage.perplexity == pytest.approx(2)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        code_usage(torch.tensor([4]), 4)


def test_the_probe_finds_a_linear_map_and_nothing_in_noise():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (600, 3), generator=draw)
    rows = one_hot_rows(codes, 4)
    actions = rows @ torch.randn(12, 2, generator=draw)
    found = linear_probe(rows[:400], actions[:400], rows[400:], actions[400:])
    assert found.r2 > 0.99 and (found.per_dimension > 0.99).all()
    noise = torch.randn(600, 2, generator=draw)
    assert linear_probe(rows[:400], noise[:400], rows[400:], noise[400:]).r2 < 0.05


def test_a_probe_with_many_columns_on_few_rows_does_not_fit_noise():
    draw = torch.Generator().manual_seed(0)
    rows, noise = torch.randn(300, 128, generator=draw), torch.randn(300, 3, generator=draw)
    assert -0.05 < linear_probe(rows[:200], noise[:200], rows[200:], noise[200:]).r2 < 0.05
    assert linear_probe(rows[:200], noise[:200], rows[200:], noise[200:], ridge=1e-3).r2 < -0.5
    actions = rows[:, :3] + noise
    chosen = linear_probe(rows[:200], actions[:200], rows[200:], actions[200:]).r2
    assert chosen > linear_probe(rows[:200], actions[:200], rows[200:], actions[200:], ridge=1e-3).r2


def test_actions_that_steer_are_told_from_swapped_ones():
    start = torch.full((2, 1, 3, 4, 4), 0.3)
    clip = torch.cat((start, start + torch.tensor([0.2, -0.2]).view(2, 1, 1, 1, 1)), 1)
    result = steering(Oracle(), clip)
    assert result.own == pytest.approx(0, abs=1e-10)
    assert result.swapped == pytest.approx(0.16, rel=1e-4) and result.copied == pytest.approx(0.04, rel=1e-4)
    assert result.future_margin > 50


def test_agreement_and_end_point_error():
    assert label_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    true = torch.zeros(1, 2, 6, 6)
    flow = true.clone()
    flow[:, 0, 0] = 9  # only the border
    flow[:, 1, 2:4] = 3
    assert end_point_error(flow, true, border=1) == pytest.approx(1.5)
