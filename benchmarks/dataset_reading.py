"""Samples per second of `headrace.datasets.LeRobotDemos` and of LeRobot's own loader on the same data.

Counts processor time of this process and its loading threads, so that other load on the machine does not matter; wall
time is printed beside it. Both give uint8 pictures of all cameras, the state and a chunk of actions, in the same random
order, one process without worker processes.

    python benchmarks/dataset_reading.py --dataset FOLDER      # any LeRobotDataset v3.0
    python benchmarks/dataset_reading.py                       # makes 2 cameras x 10 episodes x 60 frames of 128 px
    python benchmarks/dataset_reading.py --horizon 50 --samples 160   # long chunks: where LeRobot 0.6.1 decodes most

The third column is LeRobot with the plugin's `fast_pictures`, which changes data that keep pictures in tables alone.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.training.batches import batches

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "lerobot_policy_vipra" / "src"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is read."""

    dataset: Path | None = None
    samples: int = 480
    batch_size: int = 16
    horizon: int = 16
    clip: int = 8
    size: int = 128
    seed: int = 0
    out: Path | None = None


def write_dataset(folder: Path, *, video: bool, size: int) -> Path:
    """Smooth moving pictures, recorded by LeRobot itself."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {
        "dtype": "video" if video else "image",
        "shape": (size, size, 3),
        "names": ["height", "width", "channel"],
    }
    features: dict[str, Any] = {f"observation.images.{name}": picture for name in ("base", "wrist")}
    features["observation.state"] = {"dtype": "float32", "shape": (9,), "names": [f"s{i}" for i in range(9)]}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": [f"a{i}" for i in range(7)]}
    encoder = RGBEncoderConfig(vcodec="h264")
    data = LeRobotDataset.create("local/read", 20, features, root=folder, use_videos=video, rgb_encoder=encoder)
    y, x = np.mgrid[:size, :size]
    random = np.random.default_rng(0)
    for episode in range(10):
        for step in range(60):
            waves = [np.sin(x / 9 + step / 5), np.cos(y / 11 + episode), np.sin((x + y) / 17 - step / 7)]
            frame = (127 + 120 * np.stack(waves, -1)).astype(np.uint8)
            numbers = random.normal(size=16).astype(np.float32)
            pictures = {"observation.images.base": frame, "observation.images.wrist": frame[::-1].copy()}
            data.add_frame({**pictures, "observation.state": numbers[:9], "action": numbers[9:], "task": "wave"})
        data.save_episode()
    data.finalize()
    return folder


def rate(read: Callable[[], int]) -> tuple[float, float]:
    """Samples per processor second and per wall second of a call that returns how many it read."""
    wall, used = time.perf_counter(), time.process_time()
    count = read()
    return count / (time.process_time() - used), count / (time.perf_counter() - wall)


def read_lerobot(folder: Path, settings: Settings, clip: int, *, fast: bool) -> tuple[float, float]:
    """LeRobot's dataset in a torch DataLoader, as it is or with fast reading of pictures."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot_policy_vipra import fast_pictures

    if fast:
        fast_pictures.install()
    else:
        fast_pictures.uninstall()
    meta = LeRobotDatasetMetadata("local/read", root=folder)
    deltas = {"action": [k / meta.fps for k in range(settings.horizon)]}
    if clip > 1:
        deltas |= {key: [k / meta.fps for k in range(1 - clip, 1)] for key in meta.camera_keys}
    data = LeRobotDataset("local/read", root=folder, delta_timestamps=deltas, return_uint8=True)
    order = torch.Generator().manual_seed(settings.seed)
    loader = torch.utils.data.DataLoader(data, batch_size=settings.batch_size, shuffle=True, generator=order)
    data[0]

    def read() -> int:
        count = 0
        for batch in loader:
            count += len(batch["action"])
            if count >= settings.samples:
                break
        return count

    return rate(read)


def read_headrace(folder: Path, settings: Settings, clip: int, cache: Path) -> tuple[float, float, float]:
    """Ours; the third figure is the processor time of opening, which fills the frame cache at first use [s]."""
    used = time.process_time()
    data = LeRobotDemos(folder, horizon=settings.horizon, history=tuple(range(1 - clip, 1)), cache=cache)
    opening = time.process_time() - used
    stream = batches(data, settings.batch_size, seed=settings.seed)

    def read() -> int:
        steps = 4 * settings.samples // settings.batch_size
        return sum(len(stream.at(step).actions) for step in range(steps))

    return *rate(read), opening


def main(settings: Settings) -> None:
    """Print one Markdown row per case and write them as JSON."""
    torch.set_num_threads(1)
    rows = []
    print(
        "| data | pictures per camera | LeRobot, samples per CPU s (wall) | LeRobot, fast pictures | headrace | "
        "headrace to LeRobot | first opening, CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        folders = [("given", settings.dataset)] if settings.dataset else [
            (kind, write_dataset(made / kind, video=kind == "h264", size=settings.size)) for kind in ("h264", "png")
        ]  # fmt: skip
        for kind, folder in folders:
            for clip in (1, settings.clip):
                theirs = read_lerobot(folder, settings, clip, fast=False)
                quick = read_lerobot(folder, settings, clip, fast=True)
                ours = read_headrace(folder, settings, clip, made / f"cache_{kind}_{clip}")
                row = {
                    "data": kind,
                    "clip": clip,
                    "lerobot": theirs,
                    "fast": quick,
                    "headrace": ours[:2],
                    "opening": ours[2],
                }
                rows.append(row)
                print(
                    f"| {kind} | {clip} | {theirs[0]:.0f} ({theirs[1]:.0f}) | {quick[0]:.0f} ({quick[1]:.0f}) | "
                    f"{ours[0]:.0f} ({ours[1]:.0f}) | "
                    f"{ours[0] / theirs[0]:.1f} | {ours[2]:.1f} |"
                )
    if settings.out is not None:
        settings.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
