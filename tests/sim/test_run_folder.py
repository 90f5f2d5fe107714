"""A disk that fills up while a run writes, had for real by a limit on the size of a file."""

import errno

import numpy as np
import pytest

from headrace.sim.run_folder import append_line, read_episodes
from headrace.sim.video import write_mp4


def test_a_line_that_did_not_fit_is_dropped_and_the_next_one_follows_the_whole_ones(tmp_path, small_files):
    path = tmp_path / "episodes.jsonl"
    append_line(path, {"seed": 0})
    with small_files(path.stat().st_size + 20), pytest.raises(OSError, match="too large"):
        append_line(path, {"seed": 1, "actions": list(range(1000))})
    assert path.read_text().count("\n") == 1 and len(path.read_text()) > len('{"seed": 0}\n')  # half a line is there
    assert read_episodes(path) == [{"seed": 0}]
    append_line(path, {"seed": 1})
    assert read_episodes(path) == [{"seed": 0}, {"seed": 1}]


def test_a_video_that_did_not_fit_leaves_nothing(tmp_path, small_files):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    with small_files(2000), pytest.raises(OSError) as caught:
        write_mp4(tmp_path / "videos" / "a.mp4", list(noise), rate=10)
    assert caught.value.errno == errno.EFBIG and not list((tmp_path / "videos").iterdir())
