"""Labelling a corpus: parts that are written once, taken up again after a kill, and shared between machines.

A part is a run of whole videos with about `rows_per_part` frames. Which videos belong to it follows from the corpus
alone, so any process can do any part and a part that is there is never done again.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.datasets.frame_rate import same_rate
from headrace.datasets.latent_labels import HEADER_FILE, LabelHeader, LabelledSource, part_path, write_part
from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_scan import BadVideo
from headrace.robot.label_clips import LatentActionLabeler, VideoLabels, model_hash


class LabelRun(NamedTuple):
    """What a call did.

    Attributes:
        parts: Parts written by it.
        rows: Rows in them.
        skipped: Videos in them that turned out to be damaged or of another rate.
        missing: Parts of the whole that are still missing.
    """

    parts: int
    rows: int
    skipped: int
    missing: int


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """A corpus cut into parts.

    Attributes:
        header: What every part repeats.
        parts: First video and the one after the last, by part.
    """

    header: LabelHeader
    parts: tuple[tuple[int, int], ...]


def plan_labels(labeler: LatentActionLabeler, corpus: VideoClips, *, name: str, rows_per_part: int) -> LabelPlan:
    """Cut a corpus into parts of about `rows_per_part` frames, at least one video each.

    Args:
        labeler: Whose model and settings go into the header.
        corpus: At the model's picture size.
        name: Of the model, for people.
        rows_per_part: At least 1.

    Raises:
        ValueError: The corpus has another picture size or window than the model, or `rows_per_part` is below 1.
    """
    config = labeler.model.config
    if corpus.size != (config.image_size, config.image_size):
        raise ValueError(f"the model sees frames of {config.image_size} px, the corpus gives {corpus.size}")
    if corpus.window != config.window:
        raise ValueError(f"the model sees the window {config.window} of pictures, the corpus gives {corpus.window}")
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part must be at least 1, got {rows_per_part}")
    begun = (np.cumsum(corpus.lengths) - corpus.lengths) // rows_per_part
    firsts = np.flatnonzero(np.r_[True, begun[1:] != begun[:-1]])
    ends = np.r_[firsts[1:], len(corpus)]
    sources = tuple(
        LabelledSource(
            name=s.name,
            videos=len(s.videos),
            frames=sum(v.length for v in s.videos),
            rate=labeler.rate if s.rate is None else s.rate,  # videos of other rates are left out
        )
        for s in corpus.sources
    )
    header = LabelHeader(
        lam=name,
        lam_hash=model_hash(labeler.model),
        codes=labeler.model.quantizer.codes,
        tokens=config.tokens,
        horizon=labeler.horizon,
        history=labeler.history,
        image_size=config.image_size,
        corpus=corpus.fingerprint(),
        parts=len(firsts),
        rows_per_part=rows_per_part,
        every=labeler.every,
        sources=sources,
    )
    return LabelPlan(header=header, parts=tuple(zip(firsts.tolist(), ends.tolist(), strict=True)))


def require_rate(fps: float | None, corpus: VideoClips) -> None:
    """Refuse videos whose steps take another time than those the model learned: its codes would name other motions.

    Args:
        fps: Steps a second that the model was trained on [Hz]; None if it was trained on several rates.
        corpus: Whose sources' rates, after the stride, must be within 2 % of it. Where a source's videos differ, one of
            them must be; the labeler leaves the others out.

    Raises:
        ValueError: Names the source, both rates, and the way out.
    """
    if fps is None:
        return
    for source in corpus.sources:
        rates = [video.fps / stride for video, stride in zip(source.videos, source.strides, strict=True)]
        if not any(same_rate(rate, fps) for rate in rates):
            found = f"{min(rates):g}" if source.rate is not None else f"{min(rates):g} to {max(rates):g}"
            raise ValueError(
                f"the model was trained on {fps:g} steps a second, {source.name} has {found}; choose a --stride or "
                "--rate that gives the same, or name the difference: --override rate"
            )


def begin_labels(folder: Path, header: LabelHeader) -> None:
    """Write the header, or check that the one there is the same.

    Raises:
        ValueError: The folder holds labels by another model, of another corpus, or with other settings; names them.
    """
    if not (folder / HEADER_FILE).is_file():
        header.save(folder)
        return
    there = LabelHeader.load(folder)
    there.require_model(header.lam_hash, name=header.lam)
    settings = ("codes", "tokens", "horizon", "history", "every", "image_size", "rows_per_part", "parts", "rates")
    for name in ("corpus", *settings):
        if getattr(there, name) != getattr(header, name):
            raise ValueError(
                f"{folder} holds labels with {name} {getattr(there, name)!r}, now it is {getattr(header, name)!r}; "
                "go on with the same corpus and settings (--override is one of them), or give a new folder"
            )


def label_part(labeler: LatentActionLabeler, corpus: VideoClips, plan: LabelPlan, part: int, folder: Path) -> LabelRun:
    """Label the videos of one part and write it; damaged ones and those of another rate are left out with a warning."""
    first, end = plan.parts[part]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("source", "video", "instruction", "frame", "stride", "past", "future", "transitions")
    }
    codes = [np.zeros((0, plan.header.horizon, plan.header.tokens), np.int16)]
    reasons: Counter[str] = Counter()
    unread = 0
    for number in range(first, end):
        source, video = corpus.video(number)
        stride = int(corpus.strides[number])
        if labeler.rate is not None and not same_rate(video.fps / stride, labeler.rate):
            reasons[f"not of {labeler.rate:g} steps a second"] += 1
            continue
        try:
            labels = labeler.label(corpus.read(number, np.arange(video.length)), stride=stride)
        except BadVideo as error:
            reasons[error.reason] += 1
            unread += 1
            continue
        codes.append(labels.codes)
        _extend(columns, labels, source.name, video.name, video.instruction, stride)
    if reasons:
        text = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        remedy = f"; once they can be read, delete {part_path(folder, part)} and label again" if unread else ""
        warnings.warn(f"part {part}: left out {reasons.total()} of {end - first} videos ({text}){remedy}", stacklevel=2)
    write_part(folder, part, plan.header, columns, np.concatenate(codes))
    return LabelRun(1, len(columns["frame"]), reasons.total(), 0)


def label_corpus(
    labeler: LatentActionLabeler,
    corpus: VideoClips,
    folder: Path,
    *,
    name: str,
    rows_per_part: int = 50_000,
    shard: tuple[int, int] = (0, 1),
    done: Callable[[int, int], None] = lambda part, parts: None,
) -> LabelRun:
    """Label every video of a corpus into a folder; what is there already stays.

    Args:
        labeler: Model and window.
        corpus: Videos.
        folder: Of the labels. On several machines all must see it.
        name: Of the model, for people.
        rows_per_part: Frames per Parquet file, about.
        shard: This process's number and the number of processes; it does the parts that leave this remainder.
        done: Called with (part, parts) after each part.

    Raises:
        ValueError: The folder holds other labels, or the shard is no shard.
    """
    plan = plan_labels(labeler, corpus, name=name, rows_per_part=rows_per_part)
    begin_labels(folder, plan.header)
    totals = np.zeros(3, np.int64)
    for part in _due(plan, folder, shard):
        totals += label_part(labeler, corpus, plan, part, folder)[:3]
        done(part, plan.header.parts)
    parts, rows, skipped = totals.tolist()
    return LabelRun(parts, rows, skipped, missing_parts(folder, plan))


def missing_parts(folder: Path, plan: LabelPlan) -> int:
    """Number of parts that are not there yet."""
    return sum(not part_path(folder, part).is_file() for part in range(len(plan.parts)))


def _due(plan: LabelPlan, folder: Path, shard: tuple[int, int]) -> Iterator[int]:
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"a shard is a number below the number of shards, from 0; got {rank} of {world}")
    for part in range(rank, len(plan.parts), world):
        if not part_path(folder, part).is_file():
            yield part


def _extend(
    columns: dict[str, list[Any]], labels: VideoLabels, source: str, video: str, instruction: str, stride: int
) -> None:
    count = len(labels.frame)
    same: dict[str, Sequence[Any]] = {"source": [source], "video": [video], "instruction": [instruction]}
    for name, value in {**same, "stride": [stride]}.items():
        columns[name] += list(value) * count
    for name in ("frame", "past", "future", "transitions"):
        columns[name] += getattr(labels, name).tolist()
