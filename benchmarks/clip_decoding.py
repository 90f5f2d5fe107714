"""Frames per second of random clips: this package's two ways, torchcodec, and LeRobot's loader, on the same dataset.

Counts processor time beside wall time, so that other load on the machine does not matter much. Each reader gives clips
of `frames` uint8 pictures at `size`, from random places; those of LeRobot and torchcodec are resized by this script.

    python benchmarks/clip_decoding.py --dataset FOLDER --out clip_decoding.json

torchcodec needs FFmpeg's shared libraries; where they are missing its row says so.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from headrace.datasets.video_clips import ClipBatches, VideoClips
from headrace.datasets.video_source import lerobot_videos


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is read."""

    dataset: Path
    clips: int = 64
    frames: int = 8
    size: int = 64
    seed: int = 0
    out: Path | None = None


def timed(read: Callable[[int], Any], clips: int, frames: int) -> dict[str, float]:
    """Frames per second by processor and by wall time, after one clip to warm up."""
    read(0)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(1, clips + 1):
        read(number)
    done = clips * frames
    return {
        "frames_per_cpu_second": done / (time.process_time() - cpu),
        "frames_per_second": done / (time.perf_counter() - wall),
    }


def shrink(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (T, 3, H, W) to uint8 at `size`, by area averaging."""
    return F.interpolate(frames.float(), size=(size, size), mode="area").round().to(torch.uint8)


def ours(settings: Settings, decode: Any) -> Callable[[int], Any]:
    corpus = VideoClips([lerobot_videos(settings.dataset)], image_size=settings.size, decode=decode)
    batches = ClipBatches(corpus, 1, frames=settings.frames, seed=settings.seed)
    return lambda number: batches.at(number).frames


def places(settings: Settings) -> Callable[[int], tuple[Any, int]]:
    """The same clips for every reader: (video, first frame in it)."""
    corpus = VideoClips([lerobot_videos(settings.dataset)], image_size=settings.size, decode="stream")
    random = np.random.default_rng(settings.seed)
    numbers = random.integers(len(corpus), size=settings.clips + 1)
    starts = [int(random.integers(max(1, corpus.lengths[n] - settings.frames))) for n in numbers]
    return lambda number: (corpus.video(int(numbers[number]))[1], starts[number])


def torchcodec(settings: Settings) -> Callable[[int], Any]:
    from torchcodec.decoders import VideoDecoder

    where, decoders = places(settings), {}

    def read(number: int) -> torch.Tensor:
        video, start = where(number)
        if video.path not in decoders:
            decoders[video.path] = VideoDecoder(str(video.path), num_ffmpeg_threads=1)
        first = video.first + start
        last = min(first + settings.frames, video.first + video.length)
        return shrink(decoders[video.path].get_frames_in_range(first, last).data, settings.size)

    return read


def lerobot(settings: Settings, backend: str) -> Callable[[int], Any]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera = next(
        name
        for name in json.loads((settings.dataset / "meta" / "info.json").read_text())["features"]
        if "images" in name
    )
    fps = json.loads((settings.dataset / "meta" / "info.json").read_text())["fps"]
    data = LeRobotDataset(
        "local/clips",
        root=settings.dataset,
        delta_timestamps={camera: [k / fps for k in range(settings.frames)]},
        video_backend=backend,
    )
    order = np.random.default_rng(settings.seed).integers(len(data), size=settings.clips + 1)

    def read(number: int) -> torch.Tensor:
        return shrink(data[int(order[number])][camera] * 255, settings.size)

    return read


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    readers: dict[str, Callable[[], Callable[[int], Any]]] = {
        "headrace cache (first use decodes)": lambda: ours(settings, "cache"),
        "headrace stream": lambda: ours(settings, "stream"),
        "torchcodec": lambda: torchcodec(settings),
        "lerobot, pyav": lambda: lerobot(settings, "pyav"),
        "lerobot, torchcodec": lambda: lerobot(settings, "torchcodec"),
    }
    results: dict[str, Any] = {}
    for name, build in readers.items():
        try:
            results[name] = timed(build(), settings.clips, settings.frames)
        except (ImportError, RuntimeError, OSError) as error:
            results[name] = {"failed": str(error).splitlines()[0]}
        print(name, results[name], flush=True)
    if settings.out:
        facts = {"clips": settings.clips, "frames": settings.frames, "size": settings.size, "seed": settings.seed}
        settings.out.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
