import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from headrace.datasets import frame_cache
from headrace.datasets.lerobot_demos import LeRobotDemos

HORIZON = 5


@pytest.fixture(params=["video_dataset", "image_dataset"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_batches_equal_lerobots_own_samples(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    keys = ["observation.images.base", "observation.images.wrist"]
    deltas = {"action": [k / 10 for k in range(HORIZON)]} | {key: [-0.2, 0.0] for key in keys}
    theirs = LeRobotDataset("local/tiny", root=folder, delta_timestamps=deltas, return_uint8=True)
    demos = LeRobotDemos(folder, horizon=HORIZON, history=(-2, 0))
    assert len(demos) == len(theirs) == 35
    rows = np.array([0, 1, 7, 11, 12, 20, 33, 34])
    batch = demos.batch(rows)
    for place, row in enumerate(rows):
        sample = theirs[int(row)]
        assert torch.equal(batch.state[place], sample["observation.state"])
        assert torch.equal(batch.actions[place], sample["action"])
        assert torch.equal(batch.action_is_pad[place], sample["action_is_pad"])
        assert batch.instructions[place] == sample["task"]
        for camera, key in enumerate(keys):
            expected = sample[key].permute(0, 2, 3, 1)
            if expected.is_floating_point():  # LeRobot 0.6.1 gives windows of stored pictures as 0..1
                expected = (expected * 255).round().byte()
            assert torch.equal(batch.images[place, camera], expected), f"row {row} of {key}"


def test_statistics_agree_with_lerobots(folder):
    recorded = json.loads((folder / "meta" / "stats.json").read_text())["action"]
    ours = LeRobotDemos(folder).action_statistics
    np.testing.assert_allclose(ours.mean, recorded["mean"], atol=1e-6)
    np.testing.assert_allclose(ours.std, recorded["std"], atol=1e-6)
    np.testing.assert_allclose(ours.min, recorded["min"], atol=1e-6)


def test_a_dataset_without_stats_has_them_from_its_rows(copy):
    expected = LeRobotDemos(copy).action_statistics
    (copy / "meta" / "stats.json").unlink()
    assert LeRobotDemos(copy).action_statistics == expected


def test_state_keys_are_joined_in_order(video_dataset):
    demos = LeRobotDemos(video_dataset, state=("observation.goal", "observation.state"))
    assert demos.state_names == ("observation.goal.0", "s0", "s1", "s2", "s3", "s4")
    assert demos.batch(np.array([13])).state[0, 0] == 1.0
    assert LeRobotDemos(video_dataset, state=()).batch(np.array([0])).state.shape == (1, 0)


def test_cameras_are_chosen_by_either_name_and_in_order(image_dataset):
    both = LeRobotDemos(image_dataset).batch(np.array([3])).images
    turned = LeRobotDemos(image_dataset, cameras=("wrist", "observation.images.base"))
    assert turned.cameras == ("wrist", "base")
    assert torch.equal(turned.batch(np.array([3])).images, both[:, [1, 0]])


def test_pictures_are_resized_by_area(image_dataset):
    small = LeRobotDemos(image_dataset, image_size=(16, 16)).batch(np.array([5])).images[0, 0, 0].float()
    full = LeRobotDemos(image_dataset).batch(np.array([5])).images[0, 0, 0].float()
    mean = full.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert (small - mean).abs().max() <= 0.5


def test_episodes_can_be_chosen(folder):
    demos = LeRobotDemos(folder, episodes=[2], horizon=3)
    assert len(demos) == 14
    whole = LeRobotDemos(folder, horizon=3)
    ours, theirs = demos.batch(np.arange(14)), whole.batch(np.arange(21, 35))
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.actions, theirs.actions)
    with pytest.raises(ValueError, match=r"episodes 0 to 2, asked for \[7\]"):
        LeRobotDemos(folder, episodes=[7])


def test_second_opening_decodes_nothing(folder, tmp_path, monkeypatch):
    first = LeRobotDemos(folder, cache=tmp_path).batch(np.arange(35)).images

    def decoding(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(frame_cache, "_decode_video", decoding)
    monkeypatch.setattr(frame_cache, "_decode_column", decoding)
    assert torch.equal(LeRobotDemos(folder, cache=tmp_path).batch(np.arange(35)).images, first)


def test_a_half_written_cache_entry_does_not_count(video_dataset, tmp_path, monkeypatch):
    whole = frame_cache._decode_video

    def killed(path):
        yield next(whole(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(frame_cache, "_decode_video", killed)
    with pytest.raises(KeyboardInterrupt):
        LeRobotDemos(video_dataset, cache=tmp_path)
    monkeypatch.setattr(frame_cache, "_decode_video", whole)
    assert len(LeRobotDemos(video_dataset, cache=tmp_path).batch(np.arange(35)).images) == 35


def test_a_changed_video_is_decoded_again(video_dataset, tmp_path):
    copy = shutil.copytree(video_dataset, tmp_path / "copy")
    before = LeRobotDemos(copy, cache=tmp_path / "cache")
    wrist, base = (next((copy / "videos" / f"observation.images.{c}").rglob("*.mp4")) for c in ("wrist", "base"))
    shutil.copy(wrist, base)
    after = LeRobotDemos(copy, cache=tmp_path / "cache").batch(np.array([4])).images
    assert torch.equal(after[:, 0], after[:, 1])
    assert not torch.equal(before.batch(np.array([4])).images, after)


def test_a_full_disk_is_named(video_dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "ascontiguousarray", full)
    with pytest.raises(OSError, match=r"frame cache.*No space left.*smaller image_size"):
        LeRobotDemos(video_dataset, cache=tmp_path)
    assert not [p for p in (tmp_path / "frames").iterdir() if p.is_dir()]


def test_missing_camera_is_named_with_those_present(folder):
    with pytest.raises(ValueError, match="no camera top; wanted base, top, it has base, wrist"):
        LeRobotDemos(folder, cameras=("base", "top"))


def test_another_action_or_state_size_names_both(folder):
    with pytest.raises(ValueError, match=r"4 action dimensions \(a0, a1, a2, a3\), wanted 7"):
        LeRobotDemos(folder, action_dim=7)
    with pytest.raises(ValueError, match=r"5 state dimensions .*wanted 9"):
        LeRobotDemos(folder, state_dim=9)
    with pytest.raises(ValueError, match=r"no vector 'observation.effort'; it has .*observation.state"):
        LeRobotDemos(folder, state=("observation.effort",))


def test_truncated_video_is_named(video_dataset, tmp_path):
    copy = shutil.copytree(video_dataset, tmp_path / "copy")
    path = next((copy / "videos").rglob("*.mp4"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"file-000.mp4 cannot be read as a video.*truncated"):
        LeRobotDemos(copy)


def test_video_with_too_few_frames_is_named(video_dataset, tmp_path):
    from fractions import Fraction

    import av

    copy = shutil.copytree(video_dataset, tmp_path / "copy")
    path = next((copy / "videos").rglob("*.mp4"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10, options={"crf": "30"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 10)
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"no frame at 2\.\d+ s, it holds 20 frames"):
        LeRobotDemos(copy)


def test_truncated_parquet_is_named(copy):
    path = next((copy / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"file-000.parquet cannot be read as parquet.*never finalised"):
        LeRobotDemos(copy)


def test_missing_rows_are_noticed(copy):
    path = next((copy / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    with pytest.raises(ValueError, match=r"30 frames in data/, 35 by meta/info.json"):
        LeRobotDemos(copy)


def edit_info(folder, **changes):
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_folders_are_refused(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset folder './nowhere'"):
        LeRobotDemos("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a LeRobotDataset"):
        LeRobotDemos(tmp_path / "empty")
    edit_info(copy, total_frames=0)
    with pytest.raises(ValueError, match="holds no episodes"):
        LeRobotDemos(copy)
    edit_info(copy, codebase_version="v2.1")
    with pytest.raises(ValueError, match=r"v2\.1, v3\.0 is needed; convert"):
        LeRobotDemos(copy)


def test_an_unknown_hub_id_offline_says_so(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"owner/name.*Hub did not give it.*no network"):
        LeRobotDemos("owner/name")


def test_a_dataset_in_lerobots_own_cache_is_found_by_name(image_dataset, monkeypatch, tmp_path):
    shutil.copytree(image_dataset, tmp_path / "me" / "tiny")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert len(LeRobotDemos("me/tiny")) == 35


def test_numbers_that_are_not_finite_are_named(image_dataset, tmp_path):
    import pyarrow as pa

    copy = shutil.copytree(image_dataset, tmp_path / "copy")
    path = next((copy / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    actions = np.stack(table.column("action").to_pylist()).astype(np.float32)
    actions[14, 2] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 4)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(ValueError, match="action of frame 14 in episode 1 is not finite"):
        LeRobotDemos(copy)


def test_wrong_windows_are_refused(image_dataset):
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        LeRobotDemos(image_dataset, horizon=0)
    with pytest.raises(ValueError, match="0 or below"):
        LeRobotDemos(image_dataset, history=(0, 1))


def test_several_files_per_camera_read_like_one(tmp_path, video_dataset, image_dataset):
    """LeRobot starts new files by size; cutting the limits gives one per episode."""
    from lerobot.datasets.dataset_tools import merge_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    for name, source in (("video", video_dataset), ("image", image_dataset)):
        part = LeRobotDataset("local/tiny", root=source)
        merge_datasets([part, part], output_repo_id="local/two", output_dir=tmp_path / name)
        one, two = LeRobotDemos(source, horizon=3), LeRobotDemos(tmp_path / name, horizon=3)
        assert len(two) == 70
        expected = one.batch(np.array([30, 2, 20]))
        for start in (0, 35):
            given = two.batch(np.array([30, 2, 20]) + start)
            assert torch.equal(given.images, expected.images) and torch.equal(given.actions, expected.actions)
