"""Labels of a corpus: the right transition in the right place, whole parts, and no mixing of models."""

import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from headrace.datasets.latent_labels import LatentLabels, part_path
from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_source import video_folder
from headrace.robot.label_clips import LatentActionLabeler, model_hash
from headrace.robot.label_cluster import LabelJob
from headrace.robot.label_run import label_corpus
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig

LENGTHS = (9, 3, 6)


def new_model(seed=0):
    torch.manual_seed(seed)
    return LatentActionModel(LatentActionConfig.tiny(image_size=32, patch=8)).eval()


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        with av.open(str(root / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            texture = np.kron(random.integers(0, 255, (8, 20, 3)), np.ones((4, 4, 1))).astype(np.uint8)
            for step in range(length):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, 4 * step :][:, :32]))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return VideoClips([video_folder(root, name="pans", cache=root / "cache")], image_size=32, cache=root / "cache")


def test_row_t_entry_k_is_the_transition_from_t_plus_k(model, corpus):
    labels = LatentActionLabeler(model, horizon=4, history=1, batch_size=3).label(corpus.read(0, np.arange(9)))
    assert labels.codes.shape == (8, 4, 4)
    for t in (0, 3, 7):
        window = np.clip(np.arange(t - 1, t + 5), 0, 8)
        clip = torch.from_numpy(corpus.read(0, window)).permute(0, 3, 1, 2)[None] / 255
        expected = model.encode(clip).codes[0, 1:]
        np.testing.assert_array_equal(labels.codes[t], expected.numpy())
    assert labels.frame.tolist() == list(range(8))
    assert labels.past.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert labels.future.tolist() == [4, 5, 6, 7, 8, 8, 8, 8]
    assert labels.transitions.tolist() == [4, 4, 4, 4, 4, 3, 2, 1]


def test_a_stride_widens_the_window(model, corpus):
    labeler = LatentActionLabeler(model, horizon=2, history=1)
    assert labeler.windows(9, 2).tolist()[3] == [1, 3, 5, 7]
    labels = labeler.label(corpus.read(0, np.arange(9)), stride=2)
    assert labels.past.tolist()[:4] == [0, 0, 0, 1] and labels.transitions.tolist() == [2, 2, 2, 2, 2, 1, 1]


def test_a_killed_run_goes_on_where_it_was(model, corpus, tmp_path):
    labeler = LatentActionLabeler(model, horizon=3)

    def run(folder, **options):
        return label_corpus(labeler, corpus, folder, name="lam", rows_per_part=6, **options)

    whole = run(tmp_path / "whole")
    assert (whole.rows, whole.missing) == (sum(LENGTHS) - 3, 0) and whole.parts > 1
    expected = LatentLabels(tmp_path / "whole", lam_hash=model_hash(model))
    assert expected.video.tolist() == [f"{n}.mp4" for n, length in enumerate(LENGTHS) for _ in range(length - 1)]
    lost = part_path(tmp_path / "whole", 1)
    kept = part_path(tmp_path / "whole", 0).stat().st_mtime_ns
    lost.unlink()
    assert run(tmp_path / "whole").parts == 1
    assert part_path(tmp_path / "whole", 0).stat().st_mtime_ns == kept
    first = run(tmp_path / "shards", shard=(1, 2))
    assert first.missing == whole.parts - first.parts
    assert run(tmp_path / "shards", shard=(0, 2)).missing == 0
    for folder in ("whole", "shards"):
        np.testing.assert_array_equal(LatentLabels(tmp_path / folder).codes, expected.codes)
    with pytest.raises(ValueError, match="2 of 2"):
        run(tmp_path / "shards", shard=(2, 2))


def test_another_model_or_other_settings_are_refused(model, corpus, tmp_path):
    label_corpus(LatentActionLabeler(model, horizon=3), corpus, tmp_path, name="lam")
    other = new_model(1)
    assert model_hash(other) != model_hash(model) == model_hash(new_model(0))
    with pytest.raises(ValueError, match="were made by lam"):
        label_corpus(LatentActionLabeler(other, horizon=3), corpus, tmp_path, name="other")
    with pytest.raises(ValueError, match="horizon 3, now it is 4"):
        label_corpus(LatentActionLabeler(model, horizon=4), corpus, tmp_path, name="lam")
    with pytest.raises(ValueError, match="every 1, now it is 2"):
        label_corpus(LatentActionLabeler(model, horizon=3, every=2), corpus, tmp_path, name="lam")
    with pytest.raises(ValueError, match="rows_per_part 50000, now it is 60000"):
        label_corpus(LatentActionLabeler(model, horizon=3), corpus, tmp_path, name="lam", rows_per_part=60_000)
    with pytest.raises(ValueError, match="not by the model named in the config"):
        LatentLabels(tmp_path, lam_hash=model_hash(other))


def test_videos_of_another_rate_are_refused_unless_named(corpus, tmp_path):
    config = replace(new_model().config, fps=5.0)
    LatentActionModel(config).save_pretrained(tmp_path / "lam")
    folder = str(corpus.sources[0].folder)
    job = {"model": tmp_path / "lam", "data": (folder,)}
    with pytest.raises(ValueError, match=r"5 steps a second, .* has 10; choose a --stride"):
        LabelJob(**job, strides=(1,)).open()
    assert len(LabelJob(**job, strides=(2,)).open()[1]) == len(
        LabelJob(**job, strides=(1,), override=("rate",)).open()[1]
    )
    with pytest.raises(ValueError, match="only 'rate' can be overridden"):
        LabelJob(**job, strides=(1,), override=("speed",))


def test_videos_of_a_folder_are_compared_one_by_one(corpus, tmp_path):
    """Half of them at another rate: refused by none, left out, and the labels say the rate of the rest."""
    folder = tmp_path / "mixed"
    shutil.copytree(corpus.sources[0].folder, folder, ignore=shutil.ignore_patterns("cache"))
    with av.open(str(folder / "3.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for step in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * step, np.uint8))))
        container.mux(stream.encode())
    LatentActionModel(replace(new_model().config, fps=10.0)).save_pretrained(tmp_path / "lam")
    job = LabelJob(model=tmp_path / "lam", data=(str(folder),), horizon=2)
    with pytest.warns(UserWarning, match=r"left out 1 of 4 videos \(1 not of 10 steps a second\)"):
        label_corpus(*job.open(), tmp_path / "labels", name="lam")
    labels = LatentLabels(tmp_path / "labels")
    assert "3.mp4" not in labels.video and labels.header.sources[0].rate == 10.0
    assert label_corpus(*replace(job, rate=10.0).open(), tmp_path / "rate", name="lam").skipped == 0
    assert set(LatentLabels(tmp_path / "rate").stride[LatentLabels(tmp_path / "rate").video == "3.mp4"]) == {2}
    everything = replace(job, override=("rate",)).open()
    assert label_corpus(*everything, tmp_path / "all", name="lam").skipped == 0
    with pytest.raises(ValueError, match=r"rates \(10.0,\), now it is \(None,\)"):
        label_corpus(*everything, tmp_path / "labels", name="lam")
    shutil.copy(part_path(tmp_path / "all", 0), part_path(tmp_path / "labels", 0))
    with pytest.raises(ValueError, match="written by another run: rates"):
        LatentLabels(tmp_path / "labels")
    LatentActionModel(replace(new_model().config, fps=7.0)).save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match="7 steps a second, mixed has 10 to 20"):
        replace(job, model=tmp_path / "slow").open()


def test_a_window_of_the_pictures_is_labelled_as_it_was_learned(corpus, tmp_path):
    config = replace(new_model().config, window=(0.0, 0.5, 0.5))
    LatentActionModel(config).save_pretrained(tmp_path / "lam")
    labeler, cut = LabelJob(model=tmp_path / "lam", data=(str(corpus.sources[0].folder),), strides=(1,)).open()
    assert cut.window == labeler.model.config.window == (0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="the corpus gives None"):
        label_corpus(labeler, corpus, tmp_path / "labels", name="lam")


def test_damaged_videos_are_left_out_and_counted(model, corpus, tmp_path, monkeypatch):
    from headrace.datasets.video_scan import BadVideo

    read = corpus.read

    def failing(number, frames):
        if number == 1:
            raise BadVideo("corrupt", "broken")
        return read(number, frames)

    monkeypatch.setattr(corpus, "read", failing)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 videos \(1 corrupt\); .* delete .*part-00000.parquet and"):
        run = label_corpus(LatentActionLabeler(model, horizon=2), corpus, tmp_path, name="lam")
    assert run.skipped == 1 and set(LatentLabels(tmp_path).video) == {"0.mp4", "2.mp4"}


def test_labels_depend_on_the_window_and_the_share_that_does_not_is_measured(model, corpus):
    """The encoder looks both ways, so one transition seen from two frames may get two codes."""
    from headrace.robot.latent_action_metrics import label_agreement

    labels = LatentActionLabeler(model, horizon=3).label(corpus.read(0, np.arange(9)))
    same = torch.from_numpy(labels.codes[:-2, 1].copy()), torch.from_numpy(labels.codes[1:-1, 0].copy())
    assert 0 < label_agreement(*same) <= 1


def test_frames_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"\(L, 32, 32, 3\)"):
        LatentActionLabeler(model, horizon=2).label(np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="needs 4 frames"):
        LatentActionLabeler(model, horizon=2).label(np.zeros((3, 32, 32, 3), np.uint8), stride=3)
