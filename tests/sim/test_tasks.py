from dataclasses import replace
from importlib import import_module

import pytest

from headrace.cli.tasks import tasks
from headrace.sim.simpler import GOOGLE_ROBOT
from headrace.sim.tasks import GROUPS, Task, find_task, find_tasks, known_tasks, require_ready, words_of


def test_every_row_points_at_something():
    for task in known_tasks().values():
        for target in (task.environment, task.expert):
            if target:
                module, attribute = target.split(":")
                assert hasattr(import_module(module), attribute)


def test_groups_hold_known_tasks():
    for members in GROUPS.values():
        assert set(members) <= set(known_tasks())


def test_unknown_tasks_name_a_near_match():
    with pytest.raises(ValueError, match=r"unknown task 'PickCub-v1'; did you mean 'PickCube-v1'") as error:
        find_task("PickCub-v1")
    assert str(error.value).count("'PickCube-v1'") == 1  # it is in the table and in ManiSkill's registry


def test_a_task_that_cannot_be_run_here_says_what_is_missing():
    with pytest.raises(ValueError, match=r"simpler/pick-coke-can cannot be run here: .*google_pick_coke_can"):
        find_task("simpler/pick-coke-can")


def test_the_list_names_the_google_robots_tasks_with_what_is_missing(capsys):
    assert tasks() == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert len(GOOGLE_ROBOT) == 5 and all(lacks in lines[name] for name, lacks in GOOGLE_ROBOT.items())
    assert "needs the robot's planner controller" in lines["simpler/open-drawer"]


def test_lists_and_groups_give_each_task_once():
    names = [task.name for task in find_tasks("PushCube-v1, demo")]
    assert names == ["PushCube-v1", "PickCube-v1", "StackCube-v1"]
    with pytest.raises(ValueError, match="empty task name"):
        find_tasks("PushCube-v1,,")


def test_registered_environments_get_an_instruction_from_their_name():
    assert words_of("LiftPegUpright-v1") == "lift peg upright"
    assert find_task("LiftPegUpright-v1").instruction == "lift peg upright"


def test_a_task_without_its_files_says_what_to_run():
    task = Task(name="X", instruction="x", missing=lambda: "fetch-it")
    with pytest.raises(FileNotFoundError, match=r"X needs files .* Fetch them: fetch-it"):
        require_ready(task)
    require_ready(replace(task, missing=str))


@pytest.mark.sim
def test_a_task_of_the_registry_can_be_sent_to_a_worker():
    import pickle

    task = find_task("LiftPegUpright-v1")
    assert pickle.loads(pickle.dumps(task)).missing() == task.missing()
