"""Which frames a video file holds, without decoding them; files that cannot be used are refused with the reason."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from headrace.nn.pretrained import void, write_atomically

SCAN_FORMAT = 1
# A gap between frames may differ from the median one by this share; clocks of 1/90000 s and 29.97 Hz stay far below.
RATE_TOLERANCE = 0.25


class BadVideo(ValueError):
    """A video that cannot be used: `reason` is one of a few short words, the message says what to do.

    Attributes:
        reason: `corrupt`, `variable rate` or `too short`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Scan(NamedTuple):
    """The frames of a video file in the order in which they are shown.

    Attributes:
        times: Presentation times in units of `unit`, ascending, int64, shape (N,).
        unit: Seconds per unit of time.
        fps: Frames a second [Hz].
    """

    times: np.ndarray
    unit: float
    fps: float


def scan_video(path: Path) -> Scan:
    """Read a file's packets and check that it is a video of constant frame rate; nothing is decoded.

    Raises:
        BadVideo: Missing, truncated, no video in it, fewer than 2 frames, or a frame rate that varies by more than a
            quarter of the median gap between frames.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = (p for p in container.demux(stream) if p.pts is not None and not p.is_discard and p.size)
            times = np.sort(np.array([p.pts for p in packets], np.int64))
            unit = float(stream.time_base or 0)
    except (av.error.FFmpegError, IndexError, OSError, ValueError) as error:
        raise BadVideo("corrupt", f"{path} cannot be read as a video ({error}); copy or record it again") from error
    if len(times) < 2:
        raise BadVideo("too short", f"{path} holds {len(times)} frames, a transition needs 2")
    gaps = np.diff(times)
    usual = float(np.median(gaps))
    if usual <= 0 or unit <= 0:
        raise BadVideo("corrupt", f"{path} gives its frames no times; record or convert it again")
    worst = float(np.abs(gaps - usual).max()) / usual
    if worst > RATE_TOLERANCE:
        raise BadVideo(
            "variable rate",
            f"{path} has a variable frame rate: a gap between frames differs by {worst:.0%} from the usual one; "
            "convert it to a constant rate, such as with `ffmpeg -i in.mp4 -vf fps=20 out.mp4`",
        )
    return Scan(times, unit, 1.0 / (unit * float(gaps.mean())))


class Scans(NamedTuple):
    """Result of scanning many files.

    Attributes:
        good: What each usable file holds.
        bad: Reason for each other one.
    """

    good: dict[Path, Scan]
    bad: dict[Path, str]

    def summary(self) -> str:
        """Such as `3 corrupt, 1 variable rate`; empty if all are good."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(self.bad.values()).items()))


def scan_videos(paths: Sequence[Path], *, cache: Path | None, threads: int = 8) -> Scans:
    """Scan files side by side; a file that was scanned before and has not changed is not read again.

    Args:
        paths: Video files.
        cache: Folder for the remembered scans; None remembers nothing.
        threads: Files read at a time.
    """
    keys = [_key(path) for path in paths]
    remembered = _recall(cache, paths)
    fresh = [(path, key) for path, key in zip(paths, keys, strict=True) if key not in remembered]
    with ThreadPoolExecutor(threads) as pool:
        for (_, key), entry in zip(fresh, pool.map(_entry, [path for path, _ in fresh]), strict=True):
            remembered[key] = entry
    if cache is not None and fresh:
        text = json.dumps({"format": SCAN_FORMAT, "scans": {key: remembered[key] for key in keys}})
        write_atomically(_memory(cache, paths), lambda target: void(target.write_text(text)))
    good, bad = {}, {}
    for path, key in zip(paths, keys, strict=True):
        entry = remembered[key]
        if isinstance(entry, str):
            bad[path] = entry
        else:
            first, gaps, unit, fps = entry
            times = np.cumsum(np.concatenate([[first], np.repeat(*np.array(gaps, np.int64).reshape(-1, 2).T)]))
            good[path] = Scan(times.astype(np.int64), unit, fps)
    return Scans(good, bad)


def _entry(path: Path) -> str | list:
    """What is remembered of a file: the reason why it is bad, or first time, runs of equal gaps, unit and rate."""
    try:
        scan = scan_video(path)
    except BadVideo as error:
        return error.reason
    gaps = np.diff(scan.times)
    starts = np.flatnonzero(np.r_[True, gaps[1:] != gaps[:-1]])
    runs = np.stack([gaps[starts], np.diff(np.r_[starts, len(gaps)])], 1)
    return [int(scan.times[0]), runs.ravel().tolist(), scan.unit, scan.fps]


def _key(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _memory(cache: Path, paths: Sequence[Path]) -> Path:
    folders = sorted({str(path.parent) for path in paths})
    return cache / "scans" / f"{sha256(json.dumps(folders).encode()).hexdigest()[:32]}.json"


def _recall(cache: Path | None, paths: Sequence[Path]) -> dict[str, str | list]:
    if cache is None or not paths:
        return {}
    try:
        data = json.loads(_memory(cache, paths).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return dict(data["scans"]) if data.get("format") == SCAN_FORMAT else {}
