"""`headrace label`: latent-action chunks for every frame of a corpus of videos."""

from pathlib import Path
from typing import Literal


def label(
    model: Path,
    /,
    *,
    data: tuple[str, ...],
    out: Path,
    stride: tuple[int, ...] | None = None,
    rate: float | None = None,
    horizon: int = 14,
    history: int = 1,
    every: int = 1,
    batch_size: int = 160,
    rows_per_part: int = 50_000,
    shard: tuple[int, int] = (0, 1),
    decode: Literal["cache", "stream"] = "stream",
    device: str = "cpu",
    ray_workers: int = 0,
    override: tuple[str, ...] = (),
) -> int:
    """Label videos with a latent action model; run again after a kill to go on.

    Args:
        model: Folder of a trained latent action model.
        data: Folders of MP4 or WebM files, LeRobot datasets (whose actions are ignored), or Hub ids of such.
        out: Folder of the labels: labels.json and Parquet parts.
        stride: Frames between neighbouring frames of a window, one for all or one per folder of `data`; 1 by default.
        rate: Instead of a stride, steps a second [Hz], from which each video's stride follows: for mixed frame rates.
        horizon: Transitions per row.
        history: Frames of the window before the present one.
        every: Label each frame whose number this divides.
        batch_size: Windows at a time.
        rows_per_part: Frames per Parquet file, about.
        shard: Number of this process and number of processes, such as 0 4; they share one folder.
        decode: On demand, or once into the frame cache.
        device: Where the model runs.
        ray_workers: Above 0, label on a Ray cluster with this many workers (extra `cluster`).
        override: `rate` to label videos of another rate than the model was trained on, which are refused where a
            whole folder has it and left out where some videos do.
    """
    from headrace.robot.label_cluster import LabelJob, label_on_ray
    from headrace.robot.label_run import label_corpus

    job = LabelJob(
        model=model.resolve(),
        data=tuple(str(Path(d).resolve()) if Path(d).exists() else d for d in data),
        strides=stride,
        rate=rate,
        horizon=horizon,
        history=history,
        batch_size=batch_size,
        every=every,
        rows_per_part=rows_per_part,
        decode=decode,
        device=device,
        override=override,
    )
    if ray_workers and shard != (0, 1):
        raise ValueError("give --shard or --ray-workers, not both: Ray shares out the parts itself")

    def done(part: int, parts: int) -> None:
        print(f"part {part + 1} of {parts}", flush=True)

    if ray_workers:
        run = label_on_ray(job, out.resolve(), workers=ray_workers, gpus=float(device != "cpu"), done=done)
    else:
        labeler, corpus = job.open()
        run = label_corpus(labeler, corpus, out, name=str(model), rows_per_part=rows_per_part, shard=shard, done=done)
    print(f"{run.rows} rows in {run.parts} new parts, {run.skipped} videos left out, {run.missing} parts to go: {out}")
    return 0
