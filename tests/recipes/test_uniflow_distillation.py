"""`benchmarks/uniflow_distillation.py` without its trainings: kept figures are those of the same options."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "uniflow_distillation.py"


def test_figures_of_other_options_are_refused(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("uniflow_distillation", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands = []
    done = SimpleNamespace(stdout=json.dumps({"probe": 0.5}) + "\n")
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: commands.append(command) or done)
    options = module.Options(out=tmp_path)
    for weighting in ("adaptive", "last"):
        (tmp_path / f"{weighting}_0").mkdir()
        for _ in range(2):
            assert module.run(options, weighting, 0) == {"probe": 0.5}
    assert len(commands) == 2
    with pytest.raises(
        ValueError, match=r"other settings \(steps: 300 before, 400 now; batch: 8 before, 4 now\): give the same"
    ):
        module.run(replace(options, steps=400, batch=4), "last", 0)
    with pytest.raises(ValueError, match=r"encoder_factor: 0\.05 before, 0\.1 now"):
        module.run(replace(options, encoder_factor=0.1), "adaptive", 0)
    with pytest.raises(ValueError, match="teacher: 'of adaptive' before, "):
        module.run(replace(options, teachers=tmp_path / "earlier"), "last", 0)
    (tmp_path / "last_0" / "figures.json").write_text('{"probe": 0.5}')
    with pytest.raises(ValueError, match="steps: None before, 300 now"):
        module.run(options, "last", 0)
