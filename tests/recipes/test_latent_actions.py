import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_recipe_trains_judges_and_saves(tmp_path):
    """Two updates on a dataset of three short episodes, through the same code as the real run."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from headrace.robot.latent_action import LatentActionModel

    features = {
        "observation.images.base": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["qpos.0", "tcp.0", "tcp.1"]},
        "action": {"dtype": "float32", "shape": (1,), "names": ["a"]},
    }
    data = LeRobotDataset.create("local/tiny", 10, features, root=tmp_path / "data", use_videos=False)
    random = np.random.default_rng(0)
    for _ in range(3):
        x, y = 10, 10
        for _ in range(10):
            x, y = np.clip(np.array([x, y]) + random.integers(-3, 4, 2), 0, 20)
            picture = np.full((32, 32, 3), 50, np.uint8)
            picture[y : y + 12, x : x + 12] = 200
            state = np.array([0, x, y], np.float32)
            frame = {"observation.images.base": picture, "observation.state": state, "action": np.zeros(1, np.float32)}
            data.add_frame({**frame, "task": "wander"})
        data.save_episode()
    data.finalize()
    command = [sys.executable, ROOT / "recipes" / "latent_actions.py", "--data", tmp_path / "data"]
    options = {"out": tmp_path / "run", "steps": 2, "batch-size": 4, "width": 32, "image-size": 32, "held-out": 3}
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    flags += ["--window", "0", "0", "1"]
    environment = os.environ | {
        "HEADRACE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*map(str, command), *flags], check=True, env=environment)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["transitions"] == 9 and 0 < report["used"] <= 1
    model = LatentActionModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.residual and model.config.fps == 10 and model.config.window == (0.0, 0.0, 1.0)


@pytest.mark.slow
def test_folders_of_video_files_train_by_weight_and_have_no_probe(tmp_path, monkeypatch):
    import av

    random = np.random.default_rng(0)
    for place in ("left", "right"):
        (tmp_path / place / "clips").mkdir(parents=True)
        for number in range(3):
            with av.open(str(tmp_path / place / "clips" / f"{number}.mp4"), "w") as container:
                stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
                stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
                texture = np.kron(random.integers(0, 255, (8, 20, 3)), np.ones((4, 4, 1))).astype(np.uint8)
                for step in range(10):
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, 4 * step :][:, :32]))
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    recipe = runpy.run_path(str(ROOT / "recipes" / "latent_actions.py"))
    data = tuple(str(tmp_path / place / "clips") for place in ("left", "right"))
    small = {"steps": 2, "batch_size": 4, "width": 32, "image_size": 32, "held_out": 3}
    recipe["main"](recipe["Recipe"](data=data, weights=(1, 3), out=tmp_path / "run", **small))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["probe"] is None and report["transitions"] > 0
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"used", "perplexity", "dead"} <= set(logged)
