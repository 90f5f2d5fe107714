"""Clips of files and of LeRobot datasets: the right frames, the right shares, and damaged files that stop nothing."""

import os
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from headrace.datasets.video_clips import ClipBatches, VideoClips
from headrace.datasets.video_reader import read_frames
from headrace.datasets.video_scan import BadVideo, scan_video, scan_videos
from headrace.datasets.video_source import lerobot_videos, open_source, open_sources, video_folder


def shade(video, frame):
    """Brightness of a frame of a test video, far from that of its neighbours."""
    return (40 + 13 * frame + 31 * video) % 200


def write_video(path, frames=12, *, fps=10, video=0, size=(48, 64), gaps=None):
    """A grey clip, one shade per frame; `gaps` are the durations of the frames in ticks, for a variable rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {"webm": "libvpx-vp9"}.get(path.suffix[1:], "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "12", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        time = 0
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), shade(video, number), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            time += 1 if gaps is None else gaps[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good videos of different sizes and formats, and one of each kind of bad one."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", video=0)
    write_video(root / "b.webm", video=1, size=(32, 32))
    write_video(root / "deep" / "c.mp4", frames=4, video=2, size=(96, 64), fps=20)
    (root / "a.txt").write_text("push it\n")
    (root / "instructions.json").write_text('{"deep/c.mp4": "lift it"}')
    write_video(root / "variable.mp4", gaps=[1, 1, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1])
    write_video(root / "single.mp4", frames=1)
    (root / "text.mp4").write_text("no video")
    whole = write_video(root / "cut.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture
def source(folder):
    with pytest.warns(UserWarning, match=r"left out 4 videos \(2 corrupt, 1 too short, 1 variable rate\)"):
        return video_folder(folder, name="clips")


def test_good_files_are_found_and_bad_ones_counted(source):
    assert [video.name for video in source.videos] == ["a.mp4", "b.webm", "deep/c.mp4"]
    assert [video.length for video in source.videos] == [12, 12, 4]
    assert [video.instruction for video in source.videos] == ["push it", "", "lift it"]
    assert source.skipped == {"corrupt": 2, "too short": 1, "variable rate": 1}
    assert [round(video.fps) for video in source.videos] == [10, 10, 20]


def test_a_variable_rate_is_refused_with_what_to_do(folder):
    with pytest.raises(BadVideo, match=r"variable frame rate.*constant rate"):
        scan_video(folder / "variable.mp4")


def test_scans_are_remembered_until_the_file_changes(tmp_path):
    path = write_video(tmp_path / "x.mp4")
    first = scan_videos([path], cache=tmp_path / "cache").good[path]
    again = scan_videos([path], cache=tmp_path / "cache").good[path]
    np.testing.assert_array_equal(first.times, again.times)
    assert (first.unit, first.fps) == (again.unit, again.fps)
    path.write_text("broken")
    assert scan_videos([path], cache=tmp_path / "cache").bad == {path: "corrupt"}


def test_a_folder_of_bad_videos_is_refused(tmp_path):
    (tmp_path / "x.mp4").write_text("no")
    with pytest.warns(UserWarning, match="1 corrupt"), pytest.raises(ValueError, match="no video that can be used"):
        video_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        video_folder(tmp_path / "none")


@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_frames_are_the_ones_asked_for_at_one_size(source, decode):
    corpus = VideoClips([source], image_size=16, decode=decode)
    for number in range(3):
        wanted = [3, 0, 2, 2]
        pictures = corpus.read(number, wanted)
        assert pictures.shape == (4, 16, 16, 3)
        shades = [shade(number, frame) for frame in wanted]
        np.testing.assert_allclose(pictures.mean((1, 2, 3)), shades, atol=3)
    with pytest.raises(ValueError, match="frames 0 to 3"):
        corpus.read(2, [4])


@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_a_window_is_a_part_of_the_same_pictures(tmp_path, decode):
    """A picture that brightens to the right by 4 a pixel: the right half's left edge is as bright as the middle."""
    with av.open(str(tmp_path / "ramp.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        ramp = np.broadcast_to(np.arange(64)[None, :, None] * 4, (64, 64, 3)).astype(np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp))))
        container.mux(stream.encode())
    sources = [video_folder(tmp_path, name="ramp", cache=tmp_path / "cache")]
    corpus = VideoClips(sources, image_size=16, decode=decode, cache=tmp_path / "cache", window=(0.5, 0.25, 0.5))
    pictures = corpus.read(0, [2, 0])
    assert pictures.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(pictures.mean((0, 1, 3)), 130 + 8 * np.arange(16), atol=4)
    with pytest.raises(ValueError, match="lies inside it"):
        VideoClips(sources, image_size=16, window=(0.6, 0.0, 0.5))


def test_a_rate_gives_each_video_its_stride(folder):
    with pytest.warns(UserWarning):
        source = video_folder(folder, rate=5.0)
    assert source.strides == (2, 2, 4) or source.skipped["too short"] == 2
    assert source.rate == pytest.approx(5.0)
    with pytest.raises(ValueError, match="not both"):
        video_folder(folder, rate=5.0, stride=2)


def test_clips_keep_their_stride_and_repeat_the_last_frame(folder):
    with pytest.warns(UserWarning):
        source = video_folder(folder, stride=2)
    corpus = VideoClips([source], image_size=16)
    batch = corpus.clips(np.array([0, 2]), np.array([1, 0]), 4)
    assert batch.frames.shape == (2, 4, 3, 16, 16) and batch.frames.dtype == torch.uint8
    means = batch.frames.float().mean((2, 3, 4))
    torch.testing.assert_close(means[0], torch.tensor([shade(0, k) for k in (1, 3, 5, 7)]).float(), atol=3, rtol=0)
    torch.testing.assert_close(means[1], torch.tensor([shade(2, k) for k in (0, 2, 3, 3)]).float(), atol=3, rtol=0)
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_batches_follow_from_seed_and_step_and_shards_are_their_parts(source):
    clips = ClipBatches(VideoClips([source], image_size=16), 4, frames=3, seed=7)
    first, again = clips.at(5), clips.at(5)
    torch.testing.assert_close(first.frames, again.frames, rtol=0, atol=0)
    assert not torch.equal(first.starts, clips.at(6).starts) or not torch.equal(first.videos, clips.at(6).videos)
    parts = [clips.shard(rank, 2).at(5) for rank in range(2)]
    torch.testing.assert_close(torch.cat([part.frames for part in parts]), first.frames, rtol=0, atol=0)


def test_shares_are_by_videos_or_by_weight(tmp_path):
    for source, count in (("many", 3), ("few", 1)):
        for k in range(count):
            write_video(tmp_path / source / f"{k}.mp4", frames=3, size=(16, 16))
    corpus = VideoClips([video_folder(tmp_path / "many"), video_folder(tmp_path / "few")], image_size=16)

    def share(weights):
        batches = ClipBatches(corpus, 200, frames=2, weights=weights)
        return float((batches.at(0).videos < 3).double().mean())

    assert share(None) == pytest.approx(0.75, abs=0.1)
    assert share((1, 4)) == pytest.approx(0.2, abs=0.1)
    with pytest.raises(ValueError, match="2 sources need as many weights"):
        ClipBatches(corpus, 2, frames=2, weights=(1,))
    with pytest.raises(ValueError, match="different names"):
        VideoClips([corpus.sources[0], corpus.sources[0]], image_size=16)


@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_damage_that_shows_on_decoding_replaces_the_video_and_is_counted(tmp_path, decode):
    write_video(tmp_path / "v" / "good.mp4", frames=6, size=(64, 64))
    bad = write_video(tmp_path / "v" / "worse.mp4", frames=60, size=(64, 64))
    source = video_folder(tmp_path / "v")
    bad.write_bytes(b"\0" * bad.stat().st_size)  # after the scan, as on a failing disk
    corpus = VideoClips([source], image_size=16, decode=decode, cache=tmp_path / "frames")
    with pytest.warns(UserWarning, match=r"left out from here on, 1 of 2 videos"):
        batch = ClipBatches(corpus, 8, frames=2).at(0)
    assert set(batch.videos.tolist()) == {0} and len(batch.frames) == 8


def test_a_reader_says_that_a_file_is_damaged(tmp_path):
    path = write_video(tmp_path / "x.mp4", frames=40, size=(64, 64))
    scan = scan_video(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadVideo, match="cannot be decoded"):
        read_frames(path, scan, np.array([30]), None)


@pytest.mark.parametrize("kind", ["video_dataset", "image_dataset"])
def test_episodes_of_a_lerobot_dataset_are_those_that_demonstrations_give(kind, request):
    from headrace.datasets.lerobot_demos import LeRobotDemos

    path = request.getfixturevalue(kind)
    source = lerobot_videos(path, camera="wrist", stride=2)
    assert [video.length for video in source.videos] == [12, 9, 14] and source.rate == 5.0
    assert [video.instruction for video in source.videos] == ["task 0", "task 1", "task 0"]
    demos = LeRobotDemos(path, cameras=("wrist",))
    corpus = VideoClips([source], image_size=32)
    for number, first in enumerate((0, 12, 21)):
        wanted = np.array([0, 5, corpus.lengths[number] - 1])
        expected = demos.batch(first + wanted).images[:, 0, 0].numpy()
        np.testing.assert_array_equal(corpus.read(number, wanted), expected)
    with pytest.raises(ValueError, match="no camera side"):
        lerobot_videos(path, camera="side")


def test_a_corpus_is_known_by_its_files_and_its_camera_not_by_dates(tmp_path, video_dataset):
    def mark(folder):
        return VideoClips([video_folder(folder, name="clips")], image_size=16).fingerprint()

    path = write_video(tmp_path / "a" / "x.mp4")
    first = mark(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "x.mp4", (1, 1))
    assert mark(tmp_path / "b") == first
    write_video(path, video=3)  # rendered again, as long as before
    assert mark(tmp_path / "a") != first
    cameras = [VideoClips([lerobot_videos(video_dataset, camera=name)], image_size=16) for name in ("base", "wrist")]
    assert cameras[0].fingerprint() != cameras[1].fingerprint()


def test_folders_of_one_name_are_numbered_wherever_they_lie(tmp_path):
    paths = [tmp_path / place for place in ("left/x/clips", "right/x/clips", "other")]
    for path in paths:
        write_video(path / "x.mp4", fps=10)
    sources = open_sources(paths, strides=(1, 2, 1))
    assert [source.name for source in sources] == ["clips", "clips-2", "other"]
    shutil.copytree(tmp_path / "right", tmp_path / "copy")
    copied = open_sources([paths[0], tmp_path / "copy" / "x" / "clips", paths[2]], strides=(1, 2, 1))
    assert VideoClips(copied, image_size=16).fingerprint() == VideoClips(sources, image_size=16).fingerprint()
    with pytest.raises(ValueError, match="clips is given more than once"):
        open_sources([paths[0], paths[0]])
    assert [source.rate for source in sources] == [10.0, 5.0, 10.0]
    assert len(VideoClips(sources, image_size=16)) == 3
    with pytest.raises(ValueError, match="3 sources need one stride or as many"):
        open_sources(paths, strides=(1, 2))
    with pytest.raises(ValueError, match="given more than once"):
        open_sources([paths[0], paths[2], tmp_path / "other" / ".." / "other"])


def test_a_folder_is_opened_by_what_it_holds(video_dataset, folder):
    assert open_source(video_dataset).videos[0].name == "episode_000000"
    with pytest.warns(UserWarning):
        assert open_source(folder).videos[0].name == "a.mp4"
