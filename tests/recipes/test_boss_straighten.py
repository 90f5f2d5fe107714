"""The BOSS recipe on a tiny policy: grids, a straightened network, and its refusal of another grid."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings, uniform_grid
from headrace.flow.step_grid import GridMismatch, StepGrid
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput

SPEC = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)
RECIPE = Path(__file__).parents[2] / "recipes" / "boss_straighten.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("boss_straighten_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return VipraPolicy(VipraConfig.tiny(SPEC)).eval()


@pytest.fixture(scope="module")
def observations(teacher):
    config, draw = teacher.config, torch.Generator().manual_seed(0)
    views = (24, len(config.cameras), len(config.history), config.camera_size, config.camera_size, 3)
    images = torch.randint(0, 256, views, generator=draw, dtype=torch.uint8)
    state = torch.randn(24, len(config.state_names), generator=draw)
    return PolicyInput(images, state, torch.ones(24, 3, dtype=torch.long))


def test_grids_and_tuned_networks_are_written(recipe, teacher, observations, tmp_path, monkeypatch):
    teacher.save_pretrained(tmp_path / "policy")
    monkeypatch.setattr(recipe, "observe", lambda *_: observations)
    chosen = recipe.Recipe(policy=str(tmp_path / "policy"), data=("unused",), out=tmp_path / "boss", counts=(2,),
                           fine_steps=6, steps=2, batch_size=4, draws=2, precision="fp32")  # fmt: skip
    errors = recipe.main(chosen)
    assert set(errors[2]) == {"uniform", "bellman", "straightened"} and all(e > 0 for e in errors[2].values())
    plain = StepGrid.load(tmp_path / "boss" / "grids" / "k2")
    tuned = StepGrid.load(tmp_path / "boss" / "k2" / "model")
    assert plain.times == tuned.times and tuned.tuned and not plain.tuned
    with pytest.raises(GridMismatch):
        tuned.require(SolverSettings(steps=10))
    VipraPolicy.from_pretrained(tmp_path / "boss" / "k2" / "model")


def test_the_teacher_itself_has_no_error_on_its_fine_grid(recipe, teacher, observations, tmp_path):
    """Chords keep each observation's states with that observation."""
    chosen = recipe.Recipe(policy="", data=(), out=tmp_path, fine_steps=6)
    fine = recipe.teach(teacher, observations, chosen)
    chords = recipe.Chords(observations, fine, StepGrid.uniform(3))
    assert recipe.end_error(teacher, chords, SolverSettings(grid=uniform_grid(6))) < 1e-5
    rolled = recipe.Chords(PolicyInput(*(part.roll(1, 0) for part in observations)), fine, StepGrid.uniform(3))
    assert recipe.end_error(teacher, rolled, SolverSettings(steps=6)) > 1e-3


def test_a_grid_off_the_fine_run_is_named(recipe, observations):
    fine = torch.zeros(24, 7, 2, 3)
    with pytest.raises(ValueError, match=r"6 steps has no state at 0\.25"):
        recipe.Chords(observations, fine, StepGrid(times=(0.0, 0.25, 1.0)))
