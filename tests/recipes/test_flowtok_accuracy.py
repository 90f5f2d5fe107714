"""The verdicts of `benchmarks/flowtok_accuracy.py` on networks whose answers are known."""

import importlib.util
from pathlib import Path

import pytest
import torch

from headrace.datasets.captioned_shapes import CAPTIONS
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import FlowTokConfig

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "flowtok_accuracy.py"


@pytest.fixture(scope="module")
def benchmark_module():
    spec = importlib.util.spec_from_file_location("flowtok_accuracy", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Oracle(torch.nn.Module):
    """Knows the picture of each row and the mean; the unmatched row answers with the mean, or with a mistake."""

    def __init__(self, tokens, *, unmatched=None):
        super().__init__()
        self.tokens = tokens
        self.unmatched = tokens.mean(0).expand_as(tokens) if unmatched is None else unmatched

    def forward(self, x, t, label):
        target = torch.where(label[:, None, None] == 0, self.tokens, self.unmatched)
        source = (x - t[:, None, None] * self.tokens) / (1 - t[:, None, None])
        return target - source


def test_the_rows_of_the_indicator_must_mean_what_they_should(benchmark_module):
    torch.manual_seed(0)
    model = FlowTok(FlowTokConfig.tiny()).eval()
    tokens, texts = torch.randn(36, 12, 4), CAPTIONS
    judge = benchmark_module.indicator_semantics
    model.to_image.velocity = Oracle(tokens)
    good = judge(model, tokens, texts, seed=0)
    assert good["passes"]
    assert good["matched_r2"] == pytest.approx(1, abs=1e-3)
    assert good["unmatched_r2"] == pytest.approx(0, abs=1e-3)
    model.to_image.velocity = Oracle(tokens, unmatched=tokens)  # the caption leaks into the unmatched row
    assert not judge(model, tokens, texts, seed=0)["passes"]
    model.to_image.velocity = Oracle(tokens, unmatched=tokens.mean(0).expand_as(tokens) + 0.5)
    shifted = judge(model, tokens, texts, seed=0)
    assert shifted["unmatched_shift"] == pytest.approx(0.5, abs=0.05) and not shifted["passes"]


def test_copies_must_be_six_decibels_above_the_mean_picture(benchmark_module):
    assert benchmark_module.beats_mean_picture(20.0, 14.0) == {"gain": 6.0, "passes": True}
    assert not benchmark_module.beats_mean_picture(19.9, 14.0)["passes"]
