"""Videos without actions: folders of files, and LeRobot datasets whose actions are ignored."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from headrace.datasets.frame_cache import default_cache
from headrace.datasets.lerobot_files import data_files, find_cameras, read_episodes, read_info, resolve_dataset
from headrace.datasets.video_scan import Scan, scan_videos

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")


@dataclass(frozen=True, kw_only=True)
class Video:
    """A run of frames in a file.

    Attributes:
        name: Unique in its source.
        path: Video file, or parquet file of pictures.
        column: The parquet file's column of pictures; None for a video file.
        first: Number of its first frame in the file.
        length: Frames.
        fps: Frames a second [Hz].
        instruction: What is done in it, in words; may be empty.
    """

    name: str
    path: Path
    column: str | None
    first: int
    length: int
    fps: float
    instruction: str


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """Videos that belong together and are read with one stride.

    Attributes:
        name: Unique in a corpus.
        folder: Where it lies.
        videos: The usable ones, in order of their names.
        strides: Frames between neighbouring frames of a clip, one per video.
        scans: What the video files hold.
        skipped: How many videos were left out, by reason.
        camera: Key of the dataset's camera; empty for a folder of files.
    """

    name: str
    folder: Path
    videos: tuple[Video, ...]
    strides: tuple[int, ...]
    scans: dict[Path, Scan] = field(repr=False)
    skipped: dict[str, int] = field(default_factory=dict)
    camera: str = ""

    @property
    def rate(self) -> float | None:
        """Frames a second of its clips [Hz], to 0.1 %; None where videos differ."""
        rates = [video.fps / stride for video, stride in zip(self.videos, self.strides, strict=True)]
        return round(rates[0], 3) if max(rates) <= 1.001 * min(rates) else None


def video_folder(
    folder: str | Path,
    *,
    name: str | None = None,
    stride: int | None = None,
    rate: float | None = None,
    cache: Path | None = None,
) -> VideoSource:
    """Every MP4, WebM, MKV, MOV or AVI file in a folder and those below it.

    A file `clip.mp4` may have a `clip.txt` beside it with the instruction; a file `instructions.json` in the folder, a
    table of instructions by path, does the same for many. Files that cannot be used are left out with one warning that
    counts them.

    Args:
        folder: Where they lie.
        name: Of the source; the folder's if not given.
        stride: Frames between neighbouring frames of a clip; 1 if neither this nor `rate` is given.
        rate: Instead of a stride, frames a second of the clips [Hz], from which each video's stride follows.
        cache: Where scans are remembered; None for `$HEADRACE_CACHE` or the user's cache folder.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No usable video in it, or both `stride` and `rate` given.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of videos here")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    scans = scan_videos(paths, cache=cache or default_cache())
    words = _instructions(folder)
    videos = [
        Video(
            name=(label := path.relative_to(folder).as_posix()),
            path=path,
            column=None,
            first=0,
            length=len(scan.times),
            fps=scan.fps,
            instruction=words.get(label, "") or _beside(path),
        )
        for path, scan in scans.good.items()
    ]
    skipped = dict(Counter(scans.bad.values()))
    return _source(name or folder.name, folder, videos, stride, rate, scans.good, skipped)


def lerobot_videos(
    dataset: str | Path,
    *,
    name: str | None = None,
    camera: str | None = None,
    stride: int | None = None,
    rate: float | None = None,
    episodes: Sequence[int] | None = None,
    cache: Path | None = None,
) -> VideoSource:
    """One camera of a LeRobotDataset v3.0, an episode a video; actions and states are not read and need not be there.

    Args:
        dataset: Folder, name in LeRobot's cache, or Hub id.
        name: Of the source; the folder's if not given.
        camera: Whole key or its last part; the first camera if not given.
        stride: Frames between neighbouring frames of a clip; 1 if neither this nor `rate` is given.
        rate: Instead of a stride, frames a second of the clips [Hz].
        episodes: Which; all if not given.
        cache: Where scans are remembered.

    Raises:
        FileNotFoundError: No such dataset.
        ValueError: Not v3.0, no such camera, no usable episode, or both `stride` and `rate` given.
    """
    folder = resolve_dataset(dataset)
    info = read_info(folder)
    cameras = find_cameras(info["features"], None if camera is None else [camera], folder)
    if not cameras:
        raise ValueError(f"{folder} has no camera")
    key = cameras[0]
    words = _episode_words(folder)
    scans: dict[Path, Scan]
    skipped: dict[str, int]
    if info["features"][key]["dtype"] == "image":
        found, scans, skipped = _picture_episodes(folder, key, float(info["fps"])), {}, {}
    else:
        found, scans, skipped = _video_episodes(folder, key, info, cache or default_cache())
    wanted = None if episodes is None else set(episodes)
    videos = [
        Video(
            name=f"episode_{number:06d}",
            path=path,
            column=column,
            first=first,
            length=length,
            fps=float(info["fps"]),
            instruction=words.get(number, ""),
        )
        for number, path, column, first, length in found
        if wanted is None or number in wanted
    ]
    return replace(_source(name or folder.name, folder, videos, stride, rate, scans, skipped), camera=key)


def open_source(path: str | Path, *, stride: int | None = None, rate: float | None = None) -> VideoSource:
    """A LeRobotDataset if the folder is one (or it is no folder here), a folder of video files otherwise."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "meta" / "info.json").is_file():
        return video_folder(folder, stride=stride, rate=rate)
    return lerobot_videos(path, stride=stride, rate=rate)


def open_sources(
    paths: Sequence[str | Path], *, strides: Sequence[int] | None = None, rate: float | None = None
) -> list[VideoSource]:
    """Several of them, each with its stride; folders of one name are told apart by as many folders above as it takes.

    Args:
        paths: Folders of videos or LeRobotDatasets.
        strides: One for each, or one for all; 1 if neither this nor `rate` is given.
        rate: Instead of strides, frames a second of all clips [Hz].

    Raises:
        ValueError: Another number of strides than of paths, strides and a rate, or a folder that is given twice.
    """
    if strides is not None and len(strides) not in (1, len(paths)):
        raise ValueError(f"{len(paths)} sources need one stride or as many, got {tuple(strides)}")
    each: Sequence[int | None] = (None,) * len(paths) if strides is None else strides
    each = tuple(each) * len(paths) if len(each) == 1 else each
    sources = [open_source(path, stride=stride, rate=rate) for path, stride in zip(paths, each, strict=True)]
    return [replace(source, name=name) for source, name in zip(sources, _distinct(sources), strict=True)]


def _distinct(sources: Sequence[VideoSource]) -> list[str]:
    """A name for each: its own, and those of the folders above it where others are named alike."""
    places = [(*Path(os.path.abspath(source.folder)).parts[:-1], source.name) for source in sources]  # links stay
    twice = [source.folder for source, times in zip(sources, map(places.count, places), strict=True) if times > 1]
    if twice:
        raise ValueError(f"{', '.join(map(str, twice))}: this folder is given more than once; leave the others out")
    named: list[str] = []
    for place in places:
        alike = [other for other in places if other[-1] == place[-1]]
        depth = next(n for n in range(1, len(place) + 1) if len({other[-n:] for other in alike}) == len(alike))
        named.append("/".join(place[-depth:]))
    return named


Episode = tuple[int, Path, str | None, int, int]  # number, file, column, first frame in the file, frames


def _video_episodes(
    folder: Path, key: str, info: dict[str, Any], cache: Path
) -> tuple[list[Episode], dict[Path, Scan], dict[str, int]]:
    entries = read_episodes(folder, key)
    path_of = {
        (e.chunk, e.file): folder / info["video_path"].format(video_key=key, chunk_index=e.chunk, file_index=e.file)
        for e in entries
    }
    scans = scan_videos(sorted(set(path_of.values())), cache=cache)
    found: list[Episode] = []
    skipped: Counter[str] = Counter()
    for entry in entries:
        path, length = path_of[entry.chunk, entry.file], entry.end_row - entry.first_row
        if path in scans.bad:
            skipped[scans.bad[path]] += 1
            continue
        scan = scans.good[path]
        first = int(np.searchsorted(scan.times * scan.unit, entry.start - 0.5 / scan.fps))
        if first + length > len(scan.times):
            skipped["corrupt"] += 1
        else:
            found.append((entry.episode, path, None, first, length))
    return found, scans.good, dict(skipped)


def _picture_episodes(folder: Path, key: str, fps: float) -> list[Episode]:
    found: list[Episode] = []
    for path in data_files(folder):
        numbers = pq.read_table(path, columns=["episode_index"]).column(0).to_numpy()
        starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
        lengths = np.diff(np.r_[starts, len(numbers)])
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            found.append((int(numbers[start]), path, key, start, length))
    return found


def _episode_words(folder: Path) -> dict[int, str]:
    words: dict[int, str] = {}
    for path in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        if "tasks" in pq.read_schema(path).names:
            table = pq.read_table(path, columns=["episode_index", "tasks"])
            for number, tasks in zip(*(table.column(n).to_pylist() for n in ("episode_index", "tasks")), strict=True):
                words[number] = tasks[0] if tasks else ""
    return words


def _instructions(folder: Path) -> dict[str, str]:
    path = folder / "instructions.json"
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise ValueError(f"{path} must be a table of instructions by the videos' paths")
    return table


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text().strip() if text.is_file() else ""


def _source(
    name: str,
    folder: Path,
    videos: list[Video],
    stride: int | None,
    rate: float | None,
    scans: dict[Path, Scan],
    skipped: dict[str, int],
) -> VideoSource:
    if stride is not None and rate is not None:
        raise ValueError("give a stride or a rate, not both")
    if (stride is not None and stride < 1) or (rate is not None and rate <= 0):
        raise ValueError(f"stride must be at least 1 and rate above 0 Hz, got {stride} and {rate}")
    strides = [stride or 1 if rate is None else max(1, round(video.fps / rate)) for video in videos]
    kept = [(v, s) for v, s in zip(videos, strides, strict=True) if v.length > s]
    short = len(videos) - len(kept)
    if short:
        skipped = {**skipped, "too short": skipped.get("too short", 0) + short}
    if skipped:
        text = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        warnings.warn(f"{folder}: left out {sum(skipped.values())} videos ({text})", stacklevel=3)
    if not kept:
        raise ValueError(f"{folder} holds no video that can be used; looked for {', '.join(SUFFIXES)}")
    kept.sort(key=lambda pair: pair[0].name)
    return VideoSource(
        name=name,
        folder=folder,
        videos=tuple(v for v, _ in kept),
        strides=tuple(s for _, s in kept),
        scans=scans,
        skipped=skipped,
    )
