import pytest

from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import GRID_FILE, GridMismatch, StepGrid, read_grid, settings_for

TUNED = StepGrid(times=(0.0, 0.07, 0.31, 1.0), source="endpoint", tuned=True, fine_steps=100, samples=64, cost=0.125)


def test_a_grid_travels_with_its_model_folder(tmp_path):
    path = TUNED.save(tmp_path / "model")
    assert path.name == GRID_FILE and StepGrid.load(tmp_path / "model") == TUNED == StepGrid.load(path)
    assert [p.name for p in path.parent.iterdir()] == [GRID_FILE]


def test_a_tuned_network_is_refused_on_another_grid():
    TUNED.require(TUNED.settings)
    for other in (
        SolverSettings(steps=3),
        SolverSettings(steps=10),
        SolverSettings(grid=TUNED.times, method="heun"),
        SolverSettings(method="dopri5", tolerance=1e-3),
    ):
        with pytest.raises(GridMismatch, match=r"straightened for 3 Euler steps at \[0, 0\.07, 0\.31, 1\]"):
            TUNED.require(other)


def test_an_untuned_network_may_be_sampled_anyhow():
    StepGrid.uniform(4).require(SolverSettings(steps=7, method="heun"))


def test_files_that_are_no_grid_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="bellman_grid"):
        StepGrid.load(tmp_path)
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "JSON"),
        ('{"time": [0, 1]}', "needs `times`"),
        ('{"times": [0, 0.5]}', "from 0"),
        ('{"times": 3}', "not iterable"),
        ('{"times": [null]}', "not 'NoneType'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
            StepGrid.load(path)
    with pytest.raises(ValueError, match="source"):
        StepGrid(times=(0.0, 1.0), source="guess")


def test_a_user_may_give_a_list_a_file_or_a_folder(tmp_path):
    path = tmp_path / "times.json"
    path.write_text("[0, 0.07, 0.31, 1]")
    saved = TUNED.save(tmp_path)
    assert read_grid(path).times == read_grid(saved).times == read_grid(tmp_path).times == TUNED.times
    assert read_grid(saved).tuned and not read_grid(path).tuned
    for text, message in (
        ("[0, 0.5, 0.4, 1]", "rise"),
        ("[0, 2]", r"within \[0, 1\]"),
        ("[0", "JSON"),
        ("[]", "at least 2"),
        ("[null]", r"times\.json .*not 'NoneType'"),
        ("3", "needs `times`"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_grid(path)
    with pytest.raises(FileNotFoundError):
        read_grid(tmp_path / "absent.json")


def test_a_folder_knows_how_its_model_is_sampled(tmp_path):
    heun = SolverSettings(steps=3, method="heun")
    assert settings_for(tmp_path) == SolverSettings(steps=10)
    assert settings_for(tmp_path, default=heun) == heun == settings_for(tmp_path, heun)
    TUNED.save(tmp_path)
    assert settings_for(tmp_path, default=heun) == TUNED.settings == settings_for(tmp_path, TUNED.settings)
    with pytest.raises(GridMismatch):
        settings_for(tmp_path, heun)
    StepGrid.uniform(4).save(tmp_path)
    assert settings_for(tmp_path, heun) == heun
