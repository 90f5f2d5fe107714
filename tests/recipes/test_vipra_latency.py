"""`benchmarks/vipra_latency.py` in seconds: both heads give their figures, and the cache changes no action."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_both_heads_are_timed_and_the_cache_changes_nothing(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("vipra_latency", FOLDER / "vipra_latency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    module.main(module.Settings(threads=threads, repeats=1, width=64, layers=1, steps=2, bins=4))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["head"] for line in lines] == ["flow", "bins"]
    for line in lines:
        assert line["largest_difference"] < 1e-4
        assert line["cached"]["action_hz"] == pytest.approx(7000 / line["cached"]["chunk_ms"], rel=0.01)
