import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(ROOT / "recipes" / "latent_actions.py"))


def test_a_preset_is_the_published_setting_and_refuses_what_it_decides(recipe, tmp_path):
    from headrace.robot.latent_action_config import LatentActionConfig

    filled, model = recipe["filled"], recipe["config_of"]
    plain = filled(recipe["Recipe"](data=("x",), out=tmp_path, width=32))
    assert (plain.width, plain.frames, plain.distance, plain.flow) == (32, 4, "mse", 0.1)
    window = (0.2, 0.3, 0.5)
    for name, tiny in (("vipra", (8, 4, 8, "l1", 0.1)), ("lapa", (2, 4, 8, "mse", 0.0)),
                       ("univla", (2, 4, 16, "mse", 0.0)), ("moto", (2, 8, 128, "mse", 0.0))):  # fmt: skip
        given = recipe["Recipe"](data=("x",), out=tmp_path, preset=name, window=window)
        full = filled(given)
        assert (full.frames, full.tokens, full.codes, full.distance, full.flow) == tiny
        config = model(full)
        assert (config.image_size, config.encoder.width, config.window) == (64, 192, window)
        assert (config.frames, config.tokens, config.quantizer.codes) == tiny[:3]
        with pytest.raises(ValueError, match=f"--preset {name} decides --tokens, --unit-rows; leave them out"):
            filled(replace(given, tokens=4, unit_rows=False))
    assert LatentActionConfig().at_tiny_size() == LatentActionConfig.tiny()
    big = recipe["Recipe"](data=("x",), out=tmp_path, preset="lapa", size="published")
    assert model(filled(big)) == LatentActionConfig.lapa()
    assert filled(replace(big, preset="vipra")).patch == 14
    for wrong, message in (
        ({"preset": "univla"}, "frozen DINOv2: give its weights"),
        ({"preset": "none"}, "belong to a --preset"),
        ({"flow": 0.1}, "one frame of a pair"),
        ({"features": tmp_path}, "has no DINOv2"),
    ):
        with pytest.raises(ValueError, match=message):
            filled(replace(big, **wrong))


def test_the_benchmark_reads_reports_of_its_own_settings_only(tmp_path, capsys):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "latent_actions.py"))
    settings = benchmark["Settings"](data=("a",), out=tmp_path, seeds=(0,), stride=4, width=96, flow=0.0)
    (tmp_path / "flow0-seed0").mkdir()
    recipe = {"steps": 600, "batch_size": 32, "lr": 1e-3, "stride": 4, "width": 96, "tokens": 4, "flow": 0.0, "seed": 0}
    recipe |= {"data": ["a"], "window": list(settings.window)}
    report = {"recipe": recipe, **dict.fromkeys(benchmark["COLUMNS"], 0.25)}
    (tmp_path / "flow0-seed0" / "report.json").write_text(json.dumps(report))
    benchmark["main"](settings)
    assert "| without | 0.250 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(stride: 4 before, 1 now\): give the same"):
        benchmark["main"](replace(settings, stride=1))


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
def test_folders_of_video_files_train_by_weight_and_have_no_probe(recipe, tmp_path, monkeypatch):
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
    data = tuple(str(tmp_path / place / "clips") for place in ("left", "right"))
    small = {"steps": 2, "batch_size": 4, "width": 32, "image_size": 32, "held_out": 3}
    recipe["main"](recipe["Recipe"](data=data, weights=(1, 3), out=tmp_path / "run", **small))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["probe"] is None and report["transitions"] > 0
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"used", "perplexity", "dead"} <= set(logged)
    for preset in ("univla", "moto"):
        few = {"steps": 2, "batch_size": 4, "held_out": 3, "preset": preset}
        recipe["main"](recipe["Recipe"](data=data, out=tmp_path / preset, **few))
        report = json.loads((tmp_path / preset / "report.json").read_text())
        assert (report["own"] is None) == (preset == "univla") and 0 < report["used"] <= 1
        assert (tmp_path / preset / "transfer.html").is_file() == (preset == "moto")
