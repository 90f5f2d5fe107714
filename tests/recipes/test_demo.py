import importlib.util
import json
from pathlib import Path

import pytest

from headrace.sim.run_folder import claim

PATH = Path(__file__).parents[2] / "recipes" / "demo.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.sim
@pytest.mark.render
@pytest.mark.slow
def test_the_demo_runs_and_takes_the_place_of_an_earlier_one(recipe, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "old.mp4").write_text("of an earlier demo")
    (tmp_path / "run.json").write_text('{"policy": "another"}')
    assert recipe.demo(out=tmp_path, episodes=1, task="PushCube-v1") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["errors"], results["episodes"]) == (0, 1) and not (tmp_path / "videos" / "old.mp4").exists()
    assert (tmp_path / "report.html").exists() and "report.html in a browser" in capsys.readouterr().out


def test_a_demo_at_work_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "episodes.jsonl").write_text("of the demo at work")
    with claim(tmp_path):
        assert recipe.demo(out=tmp_path) == 2
    said = capsys.readouterr()
    assert "another run is writing" in said.err and "open" not in said.out
    assert (tmp_path / "episodes.jsonl").read_text() == "of the demo at work"
