"""Collecting demonstrations from scripted experts into a LeRobotDataset."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from headrace.sim.episode import Episode, Perturbation
from headrace.sim.rollout import describe
from headrace.sim.run_folder import claim, write_json
from headrace.sim.tasks import Task, require_ready
from headrace.sim.workers import Simulators, Worker, WorkerFailed, ready

ORIGIN_FILE = "meta/headrace.json"


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """How demonstrations are made.

    Attributes:
        episodes: Successful demonstrations to keep.
        seed: First seed; seeds rise until enough demonstrations succeeded.
        num_envs: Simulator processes.
        perturbation: Pushes that show how to recover.
        linger: Steps recorded after the first success, and after the expert has finished where it tells that.
        timeout: Seconds after which a silent environment counts as hung.
    """

    episodes: int = 200
    seed: int = 1_000_000
    num_envs: int = 1
    perturbation: Perturbation = Perturbation()  # noqa: RUF009  (frozen)
    linger: int = 3
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("episodes", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class ExpertFails(RuntimeError):
    """A scripted expert succeeds so rarely that a dataset would take forever; no dataset is left behind."""


class Collected(NamedTuple):
    """What was collected: demonstrations kept, episodes tried, frames written, seconds spent."""

    kept: int
    tried: int
    frames: int
    seconds: float


def demonstrations(task: Task, settings: CollectSettings, workers: list[Worker]) -> Iterator[tuple[Episode, int]]:
    """Successful demonstrations as they end, each with how many were tried so far; gives up when most attempts fail.

    A simulator that does not answer within the settings' timeout is replaced, whatever the others do.

    Raises:
        ExpertFails: Fewer than one in five of at least 25 attempts succeeded.
    """
    seeds, kept, tried = count(settings.seed), 0, 0
    sent_at: dict[Worker, float] = {}

    def ask(worker: Worker) -> None:
        worker.send("demonstrate", next(seeds), settings.perturbation, settings.linger, settings.seed)
        sent_at[worker] = time.monotonic()

    for worker in workers:
        ask(worker)
    while True:
        answered = list(ready(workers, timeout=1.0))
        hung = [w for w in workers if w not in answered and time.monotonic() - sent_at[w] > settings.timeout]
        for worker in (*answered, *hung):
            tried += 1
            episode: Episode | None = None
            try:
                episode = worker.receive(0)
                failure = episode.error
            except WorkerFailed as error:
                failure = "the environment hangs" if worker in hung else str(error)
                worker.restart()
            succeeded = episode is not None and failure is None and episode.success.at_end
            kept += succeeded
            if not succeeded and tried >= 25 and kept < tried / 5:
                why = f"; the last one: {failure}" if failure else ""
                raise ExpertFails(f"only {kept} of {tried} demonstrations of {task.name} succeeded{why}")
            ask(worker)
            if episode is not None and succeeded:
                yield episode, tried
                if kept == settings.episodes:
                    return


def features_of(described: dict[str, Any], image_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """LeRobot's feature table for an environment's cameras, state and actions."""
    names = described["spec"]["names"]
    features: dict[str, dict[str, Any]] = {
        f"observation.images.{camera}": {
            "dtype": "video",
            "shape": image_shape,
            "names": ["height", "width", "channels"],
        }
        for camera in described["cameras"]
    }
    states = described["state_names"]
    features["observation.state"] = {"dtype": "float32", "shape": (len(states),), "names": list(states)}
    features["action"] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    return features


def collect(task: Task, settings: CollectSettings, folder: Path) -> Collected:
    """Write a LeRobotDataset v3.0 of successful demonstrations.

    The dataset is written beside `folder` under a temporary name and renamed when it is complete.

    Raises:
        ValueError: The seeds would meet a benchmark's test episodes.
        FileExistsError: `folder` holds something already, or another run is writing it.
        ExpertFails: Too few demonstrations succeed.
        OSError: The disk is full; nothing counts as a dataset then.
    """
    if settings.seed < task.test_seeds:
        raise ValueError(
            f"seeds 0..{task.test_seeds - 1} of {task.name} are its official test episodes, and a policy trained on "
            f"them cannot be tested; choose a seed from {task.test_seeds} on, got {settings.seed}"
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a new --out, or remove that folder")
    part = folder.with_name(f".{folder.name}.part")
    holding = folder.with_name(f".{folder.name}.claim")
    require_ready(task)
    started = time.perf_counter()
    with claim(holding), Simulators() as simulators:
        try:
            if part.exists():
                shutil.rmtree(part)
            tried, frames = _write(task, settings, part, simulators)
            part.replace(folder)
        finally:  # renamed by now, or worth nothing
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(holding, ignore_errors=True)
    return Collected(settings.episodes, tried, frames, time.perf_counter() - started)


def _write(task: Task, settings: CollectSettings, part: Path, simulators: Simulators) -> tuple[int, int]:
    """The whole dataset into `part`; returns demonstrations tried and frames written."""
    workers = simulators.assign(task, None, settings.num_envs)
    for worker in workers:  # so that all are up
        described = describe(worker, timeout=settings.timeout)
    dataset: Any = None
    tried = frames = 0
    try:
        with tqdm(total=settings.episodes, desc=f"collect {task.name}", unit="demo", mininterval=0.5) as bar:
            for episode, attempts in demonstrations(task, settings, workers):
                tried = attempts
                if dataset is None:
                    dataset = _create(part, task, described, next(iter(episode.frames[0].values())).shape)
                _add(dataset, episode)
                frames += len(episode.actions)
                bar.update()
        for worker in workers:
            worker.kill()  # the demonstrations that they are at are not wanted any more
    finally:
        if dataset is not None:
            dataset.finalize()  # else it does so when it is collected, into a folder that is removed by then
    origin = {"task": task.name, "settings": asdict(settings), "spec": described["spec"], "frames": frames}
    write_json(part / ORIGIN_FILE, origin)
    return tried, frames


def _create(folder: Path, task: Task, described: dict[str, Any], image_shape: tuple[int, ...]) -> Any:
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset.create(
        repo_id=f"local/{task.name.replace('/', '_')}",
        fps=round(described["spec"]["rate"]),
        features=features_of(described, image_shape),
        root=folder,
        robot_type=described["robot"] or None,
        use_videos=True,
        # A fine H.264 stream encoded while frames arrive: the default writes PNG files and an AV1 video from them,
        # twice the time, and its quality blurs a 4 cm cube at 128 px.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=18, preset="veryfast"),
        streaming_encoding=True,
        encoder_threads=1,
    )


def _add(dataset: Any, episode: Episode) -> None:
    for images, state, action in zip(episode.frames, episode.states, episode.actions, strict=False):
        frame: dict[str, Any] = {f"observation.images.{camera}": image for camera, image in images.items()}
        frame["observation.state"] = state
        frame["action"] = np.asarray(action, np.float32)
        frame["task"] = episode.instruction
        dataset.add_frame(frame)
    dataset.save_episode()
