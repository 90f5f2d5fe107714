"""`rollout`, `serve` and `drive` sample a checkpoint as the grid saved beside it says, unless told otherwise."""

import json

import pytest
import torch

from headrace.cli import drive, rollout, serve
from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import GridMismatch, StepGrid

SPEC = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)
TUNED = StepGrid(times=(0.0, 0.3, 1.0), source="local", tuned=True)
UNSET = {"solver": "euler", "steps": None, "grid": None, "tolerance": None, "execute": None, "ensemble": False,
         "precision": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from headrace.robot.vipra import VipraConfig, VipraPolicy

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    VipraPolicy(VipraConfig.tiny(SPEC)).save_pretrained(folder)
    return folder


@pytest.fixture
def straightened(checkpoint):
    path = TUNED.save(checkpoint)
    yield checkpoint
    path.unlink()


def served(folder, monkeypatch, **options):
    seen = []

    async def catch(policy, config):
        seen.append(policy)
        return 0

    monkeypatch.setattr(serve, "_serve", catch)
    assert serve.serve(str(folder), **options) == 0
    return seen[0]


def rolled(folder, **chosen):
    return rollout.make_policy(str(folder), [], rollout.settings_of(**{**UNSET, **chosen})).policy


def test_a_plain_checkpoint_takes_ten_steps_or_what_was_asked_for(checkpoint, monkeypatch):
    for policy in (served(checkpoint, monkeypatch), drive.make_policy(str(checkpoint), None), rolled(checkpoint)):
        assert policy.solver == SolverSettings(steps=10)
    asked = served(checkpoint, monkeypatch, steps=3), drive.make_policy(str(checkpoint), 3), rolled(checkpoint, steps=3)
    assert all(policy.solver == SolverSettings(steps=3) for policy in asked)


def test_a_straightened_checkpoint_keeps_its_grid(straightened, monkeypatch):
    for policy in (served(straightened, monkeypatch), drive.make_policy(str(straightened), None), rolled(straightened)):
        assert policy.solver == TUNED.settings


def test_a_straightened_checkpoint_is_refused_on_other_steps(straightened, monkeypatch):
    with pytest.raises(GridMismatch):
        served(straightened, monkeypatch, steps=10)
    with pytest.raises(GridMismatch):
        drive.make_policy(str(straightened), 10)
    with pytest.raises(GridMismatch):
        rolled(straightened, steps=2)


def test_no_steps_are_refused_by_every_command(checkpoint, monkeypatch):
    for steps in (0, -2):
        with pytest.raises(ValueError, match="at least 1"):
            rolled(checkpoint, steps=steps)
        with pytest.raises(ValueError, match="at least 1"):
            served(checkpoint, monkeypatch, steps=steps)
        with pytest.raises(ValueError, match="at least 1"):
            drive.make_policy(str(checkpoint), steps)
    with pytest.raises(ValueError, match="execute must be at least 1"):
        rolled(checkpoint, execute=0)


def test_solver_options_for_a_server_are_refused_instead_of_ignored():
    chosen = rollout.settings_of(**{**UNSET, "steps": 5})
    with pytest.raises(ValueError, match="headrace serve"):
        rollout.make_policy("ws://localhost:1", [], chosen)


@pytest.mark.parametrize("name", ["ws://localhost:1", "random", "oracle"])
@pytest.mark.parametrize("option", [{"execute": 3}, {"ensemble": True}, {"precision": "bf16"}])
def test_options_of_a_checkpoint_are_refused_where_none_is_run(name, option):
    with pytest.raises(ValueError, match=f"--{next(iter(option))} say how a checkpoint is run here"):
        rollout.make_policy(name, [], rollout.settings_of(**{**UNSET, **option}))


def test_a_server_refuses_more_actions_than_a_chunk_has(checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="execute 99 asks for more than the"):
        served(checkpoint, monkeypatch, execute=99)


def test_rollout_reads_a_grid_from_a_list_a_file_or_a_model_folder(checkpoint, straightened, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(TUNED.times))
    for given in (tmp_path / "list.json", straightened, straightened / "step_grid.json"):
        assert rollout.settings_of(**{**UNSET, "grid": given})["grid"] == list(TUNED.times)
        assert rolled(straightened, grid=given).solver == TUNED.settings
    with pytest.raises(ValueError, match="exclude each other"):
        rollout.settings_of(**{**UNSET, "grid": tmp_path / "list.json", "steps": 3})


def test_a_solver_alone_takes_its_times_from_the_saved_grid(checkpoint):
    assert rolled(checkpoint, solver="heun").solver == SolverSettings(method="heun", steps=10)
    path = StepGrid(times=(0.0, 0.3, 1.0), source="local").save(checkpoint)
    try:
        assert rolled(checkpoint, solver="heun").solver == SolverSettings(method="heun", grid=(0.0, 0.3, 1.0))
        assert rolled(checkpoint, solver="heun", steps=4).solver == SolverSettings(method="heun", steps=4)
    finally:
        path.unlink()


def test_a_solver_alone_is_refused_on_a_straightened_checkpoint(straightened):
    with pytest.raises(GridMismatch):
        rolled(straightened, solver="heun")


def test_the_adaptive_solver_needs_a_tolerance_and_nothing_else(checkpoint):
    adaptive = SolverSettings(method="dopri5", tolerance=0.01)
    assert rolled(checkpoint, solver="dopri5", tolerance=0.01).solver == adaptive
    for options, message in (
        ({"solver": "dopri5"}, "needs a tolerance"),
        ({"solver": "dopri5", "tolerance": 0.01, "steps": 3}, "own steps"),
        ({"tolerance": 0.01}, "only for dopri5"),
    ):
        with pytest.raises(ValueError, match=message):
            rolled(checkpoint, **options)


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_solver_options_for_a_policy_without_a_flow_are_refused(name, tmp_path):
    (tmp_path / "grid.json").write_text("[0, 1]")
    for options in ({"steps": 5}, {"grid": tmp_path / "grid.json"}, {"solver": "heun"}, {"tolerance": 0.1}):
        with pytest.raises(ValueError, match="follows no flow"):
            rollout.make_policy(name, [], rollout.settings_of(**{**UNSET, **options}))
    assert rollout.make_policy("oracle", [], rollout.settings_of(**UNSET)) is None


def test_a_seed_that_the_expert_would_not_use_is_refused():
    with pytest.raises(ValueError, match="leave out --policy-seed"):
        rollout.rollout("oracle", task="PushCube-v1", policy_seed=3)
