"""SIMPLER in the runner's form: seeds, table entries, and the benchmark's table from a run's rows."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "simpler_assets"
if SHARED.is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(SHARED))

from headrace.sim.episode import EpisodeRunner, Perturbation  # noqa: E402
from headrace.sim.simpler import TASKS, simpler_task  # noqa: E402
from headrace.sim.simpler_assets import missing_files  # noqa: E402
from headrace.sim.simpler_table import table  # noqa: E402
from headrace.sim.tasks import Task, find_task, find_tasks  # noqa: E402

here = pytest.mark.skipif(bool(missing_files(simpler_task("stack-cube"))), reason="SIMPLER's scenes are not here")


def test_the_group_is_the_four_tasks_under_the_official_rule():
    tasks = find_tasks("simpler")
    assert [task.name for task in tasks] == list(TASKS)
    assert {task.success_rule for task in tasks} == {"at_end"}
    assert [task.max_steps for task in tasks] == [60, 60, 60, 120]
    assert dict(find_task("simpler/stack-cube@stock").settings) == {"port": "stock"}
    assert all(task.expert for task in tasks)
    assert dict(find_task("simpler/stack-cube@224").settings)["square"] == 224


def test_pictures_are_squeezed_on_request():
    from headrace.contracts import Observation
    from headrace.sim.simpler_environment import SimplerEnvironment

    environment = SimplerEnvironment.__new__(SimplerEnvironment)
    environment.square = 24
    picture = np.repeat(np.arange(48, dtype=np.uint8)[:, None, None], 64, axis=1).repeat(3, axis=2)
    squeezed = environment._squeezed(Observation(images={"c": picture}, state=np.zeros(7)))
    assert squeezed.images["c"].shape == (24, 24, 3)
    np.testing.assert_allclose(squeezed.images["c"][:, 0, 0], np.arange(24) * 2 + 0.5, atol=0.6)


@pytest.mark.render
@here
def test_what_is_not_drawn_changes_nothing_else():
    task = find_task("simpler/stack-cube")
    runner = EpisodeRunner(Task(**{**vars(task), "settings": (*task.settings, ("width", 160))}))
    environment, seen = runner.environment, []
    assert runner.describe()["about"]["port"] == "restored" and json.dumps(runner.describe())
    for drawing in (True, False, True):
        environment.drawing = drawing
        environment.reset(0)
        steps = [environment.step(np.array([0.02, 0, 0, 0, 0, 0, -1], np.float32)) for _ in range(3)]
        assert environment.drawing == drawing == bool(steps[-1].observation.images)
        seen.append(steps[-1].observation)
    np.testing.assert_array_equal(seen[0].state, seen[1].state)
    np.testing.assert_array_equal(*(next(iter(one.images.values())) for one in (seen[0], seen[2])))
    runner.close()


@pytest.mark.sim
@here
def test_demonstrations_end_with_the_gripper_open_and_away():
    task = find_task("simpler/stack-cube")
    runner = EpisodeRunner(Task(**{**vars(task), "settings": (("render", False),)}))
    episode = runner.demonstrate(1_000_000, Perturbation(), 3, 0)
    assert episode.success.at_end and len(episode.flags) < task.max_steps
    assert len(episode.flags) > episode.success.first_step + 3  # success came while the object was still held
    assert episode.readings["is_src_obj_grasped"] == 0.0
    assert episode.states[-1][6] > 0.9 and episode.states[-1][2] > episode.states[-10][2] + 0.02
    runner.close()


@pytest.mark.sim
@here
def test_seeds_below_24_are_the_official_episodes_and_others_never():
    task = find_task("simpler/stack-cube")
    bare = Task(**{**vars(task), "settings": (("render", False),)})
    runner = EpisodeRunner(bare)
    scene = runner.environment.scene
    for seed in (0, 23):
        runner.start(seed)
        assert scene.layout == scene.task.official_layout(seed)
    for seed in (24, 1_000_000):
        runner.start(seed)
        assert scene.layout.episode == -1 and not scene.task.near_official(scene.layout)
    episode = runner.expert(3)
    assert episode.success.at_end and episode.success.once and len(episode.flags) == 60
    assert episode.readings["grasped_ever"] == episode.readings["consecutive_grasp_ever"] == 1.0
    assert np.abs([action[:3] for action in episode.actions]).max() < 0.05
    runner.close()


def row_of(task, seed, good, **more):
    """A row of `episodes.jsonl`, as far as the table reads it."""
    row = {"task": task, "seed": seed, "success_at_end": good, "success_once": good, "success_rule": "at_end"}
    return {**row, "readings": {}, "error": None, **more}


def stored(folder, rows):
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, {task: [row["seed"] for row in rows if row["task"] == task] for task in TASKS}


def test_the_table_keeps_apart_what_is_no_benchmark(tmp_path):
    task = "simpler/stack-cube"
    rows = [row_of(task, seed, seed < 26) for seed in range(30)]
    rows[3]["error"] = "the simulator process died"
    folder, wanted = stored(tmp_path, [*rows, row_of("PushCube-v1", 0, True), row_of(task, 30, True)])
    wanted[task].remove(30)  # of an earlier, longer run
    text = table(folder, wanted)
    official, _, random = text.partition("Random layouts, which are not the benchmark")
    assert f"| {task} | 24 | 95.8 % (" in official and f"| {task} | 6 | 33.3 % (" in random
    assert "PushCube" not in text


def test_episodes_cut_at_their_first_success_have_no_official_reading(tmp_path):
    rows = [row_of("simpler/stack-cube", seed, seed < 6, success_rule="once") for seed in range(24)]
    text = table(*stored(tmp_path, rows))
    assert "| simpler/stack-cube | 24 | not measured | 25.0 % |" in text and "stopped at their first success" in text


def test_the_table_has_every_reading_and_the_published_rows(tmp_path):
    rows = []
    for task, good in zip(TASKS, (24, 12, 0, 6), strict=True):
        for seed in range(24):
            readings = {"grasped_ever": 1.0, "consecutive_grasp_ever": float(seed < 18)}
            rows.append(row_of(task, seed, seed < good, success_once=seed < 20, readings=readings))
    text = table(*stored(tmp_path, rows))
    assert "| simpler/spoon-on-towel | 24 | 100.0 % (86.2 to 100.0) | 83.3 % | 100.0 % | 75.0 % |" in text
    assert "| mean | 96 | 43.8 %" in text
    assert "ViPRA-AR" in text and "arXiv 2511.07732" in text
