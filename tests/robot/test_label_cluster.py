"""Labelling on a local Ray cluster of two processes gives the labels of one process."""

import sys

import av
import numpy as np
import pytest
import torch

from headrace.datasets.latent_labels import LatentLabels
from headrace.robot.label_cluster import LabelJob, import_ray_data, label_on_ray
from headrace.robot.label_run import label_corpus
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.sim.cluster import start_node


def test_a_missing_ray_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"headrace\[cluster\]"):
        import_ray_data()


def test_strides_must_fit_the_folders(tmp_path):
    with pytest.raises(ValueError, match="2 folders of videos need as many strides"):
        LabelJob(model=tmp_path, data=("a", "b"), strides=(1, 2, 3))


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    LatentActionModel(LatentActionConfig.tiny(image_size=32)).save_pretrained(tmp_path / "lam")
    random = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    for number in range(4):
        with av.open(str(tmp_path / "videos" / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(6):
                frame = np.kron(random.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
    job = LabelJob(model=tmp_path / "lam", data=(str(tmp_path / "videos"),), strides=(1,), horizon=2, rows_per_part=6)
    labeler, corpus = job.open()
    label_corpus(labeler, corpus, tmp_path / "one", name=str(job.model), rows_per_part=job.rows_per_part)
    start_node(ray, num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path)}})
    try:
        run = label_on_ray(job, tmp_path / "two", workers=2, cpus=0.5)
    finally:
        ray.shutdown()
    assert (run.parts, run.missing, run.rows) == (4, 0, 20)
    one, two = (
        LatentLabels(tmp_path / "one"),
        LatentLabels(tmp_path / "two", lam_hash=LatentLabels(tmp_path / "one").header.lam_hash),
    )
    assert one.header == two.header
    np.testing.assert_array_equal(one.codes, two.codes)
