"""Labelling on a Ray cluster: each part is a row of a Ray dataset, each worker holds one model and writes its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from headrace.datasets.latent_labels import part_path
from headrace.datasets.video_clips import Decode, VideoClips
from headrace.datasets.video_source import VideoSource, open_sources
from headrace.robot.label_clips import LatentActionLabeler
from headrace.robot.label_run import LabelRun, begin_labels, label_part, missing_parts, plan_labels, require_rate
from headrace.robot.latent_action import LatentActionModel


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """All that a worker needs to know; paths must mean the same on every machine.

    Attributes:
        model: Folder of the latent action model.
        data: Folders of videos or LeRobot datasets.
        strides: One for all or one per folder of `data`; 1 if neither this nor `rate` is given.
        rate: Instead of strides, steps a second [Hz], from which each video's stride follows.
        horizon, history, batch_size, every: As in `LatentActionLabeler`.
        rows_per_part: Frames per Parquet file, about.
        decode: As in `VideoClips`.
        device: Where the model runs.
        override: Differences from the model's training that are meant; `rate` is the one there is.
    """

    model: Path
    data: tuple[str, ...]
    strides: tuple[int, ...] | None = None
    rate: float | None = None
    horizon: int = 14
    history: int = 1
    batch_size: int = 160
    every: int = 1
    rows_per_part: int = 50_000
    decode: Decode = "stream"
    device: str = "cpu"
    override: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if set(self.override) - {"rate"}:
            raise ValueError(f"only 'rate' can be overridden, got {', '.join(self.override)}")
        if not self.data:
            raise ValueError("name at least one folder of videos")
        if self.strides is not None and len(self.strides) not in (1, len(self.data)):
            raise ValueError(f"{len(self.data)} folders of videos need as many strides or one, got {self.strides}")

    def sources(self) -> list[VideoSource]:
        """The corpus's sources."""
        return open_sources(self.data, strides=self.strides, rate=self.rate)

    def open(self) -> tuple[LatentActionLabeler, VideoClips]:
        """Load the model and open the corpus.

        Raises:
            ValueError: No video of a source has the rate that the model was trained on, and that is not overridden.
        """
        model = LatentActionModel.from_pretrained(self.model).to(self.device)
        config = model.config
        labeler = LatentActionLabeler(
            model,
            horizon=self.horizon,
            history=self.history,
            batch_size=self.batch_size,
            every=self.every,
            rate=None if "rate" in self.override else config.fps,
        )
        corpus = VideoClips(self.sources(), image_size=config.image_size, decode=self.decode, window=config.window)
        require_rate(labeler.rate, corpus)
        return labeler, corpus


class LabelWorker:
    """Called by Ray with batches of part numbers; opens model and corpus once."""

    def __init__(self, job: LabelJob, folder: Path) -> None:
        self.labeler, self.corpus = job.open()
        self.folder = folder
        self.plan = plan_labels(self.labeler, self.corpus, name=str(job.model), rows_per_part=job.rows_per_part)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [label_part(self.labeler, self.corpus, self.plan, int(part), self.folder) for part in batch["part"]]
        return {
            "part": batch["part"],
            "rows": np.array([run.rows for run in done]),
            "skipped": np.array([run.skipped for run in done]),
        }


def label_on_ray(
    job: LabelJob,
    folder: Path,
    *,
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    done: Callable[[int, int], None] = lambda part, parts: None,
) -> LabelRun:
    """Label a corpus with Ray Data; parts that are there already stay. Joins the cluster that `ray.init` finds.

    Args:
        job: What to do.
        folder: Of the labels, seen by every machine under the same path.
        workers: Models at a time.
        cpus, gpus: Of each worker.
        done: Called with (part, parts) after each part.

    Raises:
        ModuleNotFoundError: Ray is not installed; names the extra.
        ValueError: The folder holds other labels.
    """
    data: Any = import_ray_data()
    labeler, corpus = job.open()
    plan = plan_labels(labeler, corpus, name=str(job.model), rows_per_part=job.rows_per_part)
    begin_labels(folder, plan.header)
    del labeler, corpus
    due = [part for part in range(len(plan.parts)) if not part_path(folder, part).is_file()]
    rows = skipped = 0
    if due:
        results = data.from_items([{"part": part} for part in due], override_num_blocks=len(due)).map_batches(
            LabelWorker,
            fn_constructor_args=(job, folder),
            batch_size=1,
            num_cpus=cpus,
            num_gpus=gpus or None,
            compute=data.ActorPoolStrategy(size=min(workers, len(due))),
        )
        for row in results.iter_rows():
            rows, skipped = rows + int(row["rows"]), skipped + int(row["skipped"])
            done(int(row["part"]), len(plan.parts))
    return LabelRun(len(due), rows, skipped, missing_parts(folder, plan))


def import_ray_data() -> Any:
    """Package `ray.data`.

    Raises:
        ModuleNotFoundError: It is not installed; names the extra.
    """
    try:
        return import_module("ray.data")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("labelling on a cluster needs Ray: install headrace[cluster]") from error
