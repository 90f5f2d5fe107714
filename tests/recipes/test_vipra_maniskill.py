import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "vipra_maniskill"


@pytest.fixture(scope="module")
def table():
    return runpy.run_path(str(FOLDER / "table.py"))


def rows(arm: str, budget: int, won: int, task: str = "PushCube-v1", seed: int = 0) -> dict:
    return {"arm": arm, "budget": budget, "seed": seed, "task": task, "successes": won, "episodes": 100, "errors": 0}


def test_the_table_adds_up_seeds_and_tasks_and_says_what_is_missing(table, tmp_path):
    settings = table["Table"](
        story=tmp_path, out=tmp_path, tasks=("PushCube-v1", "PickCube-v1"), budgets=(25,), arms=("scratch", "ls_la")
    )
    found = [rows("scratch", 25, 10), rows("scratch", 25, 20, seed=1), rows("scratch", 25, 0, task="PickCube-v1")]
    lines = table["table_text"](settings, found).splitlines()
    assert lines[2].startswith("| 25 | PushCube-v1 | 30/200: 15.0 (")
    assert lines[3].startswith("| 25 | PickCube-v1 | 0/100: 0.0 (0.0 to ")
    assert lines[4].startswith("| 25 | all | 30/300: 10.0 (") and lines[4].endswith("| not run |")


def test_a_finished_cell_is_not_run_again_and_one_of_other_settings_is_refused(table, tmp_path):
    settings = table["Table"](story=tmp_path / "none", out=tmp_path)
    folder = tmp_path / "ls_la_25_0"
    folder.mkdir()
    cell = {"settings": table["settings_of"](settings), "rows": [{"task": "x"}]}
    (folder / "cell.json").write_text(json.dumps(cell))
    assert table["run_cell"](settings, 25, "ls_la", 0) == [{"task": "x"}]
    with pytest.raises(
        ValueError, match=r"other settings \(steps: 2000 before, 300 now; execute: 7 before, 4 now\): give the same"
    ):
        table["run_cell"](replace(settings, steps=300, execute=4), 25, "ls_la", 0)
    (folder / "cell.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="steps: None before, 2000 now"):
        table["run_cell"](settings, 25, "ls_la", 0)


def test_a_cell_goes_on_only_with_the_network_data_and_policy_it_was_begun_with(table, tmp_path, monkeypatch):
    seen, inside = [], table["run_cell"].__globals__
    init, trained = tmp_path / "story" / "pretrain_ls_la" / "model", tmp_path / "ls_la_25_0" / "training" / "model"
    for folder in (init, trained):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    fake = {
        "prepare": lambda sources, start: (None, None, None),
        "train_policy": lambda *_, facts, **__: seen.append(facts) or SimpleNamespace(losses=[1.0]),
        "load_policy": lambda folder: None,
        "RecedingHorizon": lambda policy, execute: None,
        "roll_out": lambda *_, checkpoint, **__: seen.append(checkpoint) or {"tasks": []},
    }
    for name, value in fake.items():
        monkeypatch.setitem(inside, name, value)
    settings = table["Table"](story=tmp_path / "story", out=tmp_path)
    for changed in (settings, replace(settings, horizon=7), replace(settings, demonstrations=("a", "b", "c"))):
        table["run_cell"](changed, 25, "ls_la", 0)
        (trained.parents[1] / "cell.json").unlink()
    (init / "config.json").write_text("[]")
    (trained / "config.json").write_text("[]")
    table["run_cell"](settings, 25, "ls_la", 0)
    facts, checkpoints = seen[::2], seen[1::2]
    assert facts[0]["story"] == str(tmp_path / "story") and facts[0]["tasks"] == list(settings.tasks)
    assert all(facts[0] != other for other in facts[1:])
    assert checkpoints[0] == checkpoints[1] != checkpoints[3]


def test_unknown_columns_are_named(table, tmp_path):
    with pytest.raises(ValueError, match="all_of_it"):
        table["Table"](story=tmp_path, out=tmp_path, arms=("all_of_it",))


def test_videos_from_elsewhere_are_brought_to_the_models_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    told = {}
    story = runpy.run_path(str(FOLDER / "story.py"))
    known = story["main"].__globals__
    for stage in ("label", "pretrain", "finetune"):
        monkeypatch.setitem(known, stage, lambda *given, stage=stage, **options: told.setdefault(stage, options))
    monkeypatch.setattr(subprocess, "run", lambda command, check: told.setdefault("lam", command))
    here = {"out": tmp_path, "videos": ("v",), "only": ("lam", "labels", "pretrain", "finetune")}
    story["main"](story["Story"](**here, stride=3, held_out=2, override=("rate",)))
    pairs = list(zip(told["lam"], told["lam"][1:], strict=False))
    assert ("--stride", "3") in pairs and ("--held-out", "2") in pairs
    assert told["label"]["stride"] == told["pretrain"]["stride"] == (3,)
    assert told["label"]["override"] == told["finetune"]["override"] == ("rate",)
    told.clear()
    story["main"](story["Story"](**here, lam=tmp_path / "lam", rate=5.0))
    assert "lam" not in told
    assert all((told[s]["stride"], told[s]["rate"]) == (None, 5.0) for s in ("label", "pretrain"))
    with pytest.raises(ValueError, match="--rate goes with --lam"):
        story["Story"](out=tmp_path, rate=5.0)


@pytest.mark.sim
@pytest.mark.render
@pytest.mark.slow
def test_the_story_runs_and_a_second_call_only_rolls_on(tmp_path):
    """From rendering to a rollout at the smallest size; the same command again finds everything done."""
    command = [sys.executable, str(FOLDER / "story.py"), "--out", str(tmp_path), "--tasks", "PushCube-v1"]
    for _ in range(2):
        subprocess.run([*command, "--processes", "1"], check=True)
    assert (tmp_path / "rollout_ls_la_flow" / "results.json").is_file()
