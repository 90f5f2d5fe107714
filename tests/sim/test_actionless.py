"""Videos without actions: settings that make sense, smooth wandering, and files that a corpus can read."""

import numpy as np
import pytest

from headrace.sim.actionless import VideoSettings, Wanderer, record_videos


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="only the task's own robot has an expert"):
        VideoSettings(robot="so100")
    with pytest.raises(ValueError, match="known: expert, random"):
        VideoSettings(mover="wave")


def test_wandering_is_smooth_bounded_and_repeatable():
    walker = Wanderer((-1.0, 0.0), (1.0, 4.0), 0.8)
    walks = []
    for seed in (3, 3, 4):
        walker.begin(seed)
        walks.append(np.stack([walker.act() for _ in range(400)]))
    np.testing.assert_array_equal(walks[0], walks[1])
    assert (walks[0] != walks[2]).any()
    assert (walks[0] >= [-1, 0]).all() and (walks[0] <= [1, 4]).all()
    for column in walks[0].T:
        assert np.corrcoef(column[1:], column[:-1])[0, 1] > 0.6 and column.std() > 0.4


@pytest.mark.sim
@pytest.mark.render
def test_videos_of_two_robots_become_a_corpus(tmp_path):
    from headrace.datasets.video_source import video_folder
    from headrace.sim.tasks import find_task

    task = find_task("PickCube-v1")
    for robot in ("panda", "so100"):
        settings = VideoSettings(episodes=1, steps=4, mover="random", robot=robot, image_size=64)
        folder = tmp_path / robot
        folder.mkdir()
        assert record_videos(task, settings, folder).written == 1
        assert record_videos(task, settings, folder) == (0, 1, 0)
        source = video_folder(folder, cache=tmp_path / "cache")
        assert [v.length for v in source.videos] == [4] and source.videos[0].instruction == task.instruction
