"""SIMPLER's protocol as constants, and its assets: nothing here starts a simulation."""

import numpy as np
import pytest

from headrace.contracts import SpecMismatch, require_same_spec
from headrace.sim.simpler import TASKS, action_spec, simpler_task, stock_episode
from headrace.sim.simpler_assets import AssetsMissing, missing_files, require_assets
from headrace.sim.simpler_peers import ORDER, PEERS


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_24_official_layouts_are_all_different(task):
    layouts = [task.official_layout(episode) for episode in range(24)]
    assert len({(layout.source, layout.target, layout.yaw) for layout in layouts}) == 24
    assert len(task.positions) * len(task.yaws) == 24
    with pytest.raises(ValueError, match=r"0\.\.23, got 24"):
        task.official_layout(24)


def test_official_order_is_yaw_first_then_target_then_source():
    carrot = simpler_task("carrot-on-plate")
    assert carrot.official_layout(0).source == carrot.official_layout(5).source == pytest.approx((-0.235, -0.075))
    assert carrot.official_layout(0).yaw != carrot.official_layout(1).yaw
    assert carrot.official_layout(0).target == pytest.approx((-0.235, 0.075))
    assert carrot.official_layout(2).target == pytest.approx((-0.085, -0.075))
    cube = simpler_task("stack-cube")
    assert abs(cube.official_layout(0).source[1]) == pytest.approx(0.05)
    assert abs(cube.official_layout(23).source[1]) == pytest.approx(0.10)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_random_layouts_repeat_by_seed_and_stay_off_the_test(task):
    drawn = [task.random_layout(seed) for seed in range(200)]
    assert drawn == [task.random_layout(seed) for seed in range(200)]
    assert len({layout.source for layout in drawn}) == 200
    assert not any(task.near_official(layout) for layout in drawn)
    assert all(layout.episode == -1 for layout in drawn)
    assert all(task.near_official(task.official_layout(episode)) for episode in range(24))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_random_layouts_are_drawn_from_what_the_test_spans(task):
    low, high = task.area
    official = np.array([(one.source, one.target) for one in map(task.official_layout, range(24))])
    drawn = np.array([(one.source, one.target) for one in map(task.random_layout, range(300))])
    for layouts in (official, drawn):
        assert (layouts >= low - 1e-9).all() and (layouts <= high + 1e-9).all()
        assert np.linalg.norm(layouts[:, 0] - layouts[:, 1], axis=1).min() > task.least_distance
    assert (np.ptp(drawn, axis=0) >= 0.9 * (high - low)).all()  # all of it, not a part


def test_eggplant_ids_of_the_port_cover_its_three_first_orientations():
    ids = [stock_episode(simpler_task("eggplant-in-basket"), episode) for episode in range(24)]
    assert sorted(ids) == sorted(8 * position + yaw for position in range(8) for yaw in range(3))
    assert stock_episode(simpler_task("stack-cube"), 17) == 17


def test_ports_differ_in_how_they_read_a_rotation():
    with pytest.raises(SpecMismatch, match="rotation"):
        require_same_spec(action_spec("stock"), action_spec("restored"))


def test_names_are_forgiving_and_a_misspelt_one_gets_a_hint():
    assert simpler_task("widowx_stack_cube") is simpler_task("simpler/stack-cube") is simpler_task("stack-cube")
    with pytest.raises(ValueError, match="did you mean 'carrot-on-plate'"):
        simpler_task("carot-on-plate")


def test_missing_scenes_are_named_with_the_command_that_fetches_them(tmp_path):
    (tmp_path / "tasks" / "bridge_v2_real2sim_dataset").mkdir(parents=True)  # what a failed download leaves
    with pytest.raises(AssetsMissing, match="download_asset bridge_v2_real2sim"):
        require_assets(simpler_task("stack-cube"), tmp_path)


def test_an_empty_file_counts_as_missing(tmp_path):
    task = simpler_task("eggplant-in-basket")
    wanted = missing_files(task, tmp_path)
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert missing_files(task, tmp_path) == []
    wanted[3].write_text("")
    assert missing_files(task, tmp_path) == [wanted[3]]


def test_a_mesh_that_the_robot_names_is_needed(tmp_path):
    task = simpler_task("stack-cube")
    for path in missing_files(task, tmp_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('<mesh filename="meshes/a.stl"/>' if path.suffix == ".urdf" else "x")
    assert [path.name for path in missing_files(task, tmp_path)] == ["a.stl"]


def test_published_means_are_the_means_of_their_rows():
    for peer in PEERS:
        if None not in peer.rates:
            assert peer.mean == pytest.approx(np.mean(peer.rates), abs=0.1), peer.policy
    assert set(ORDER) == set(TASKS)
