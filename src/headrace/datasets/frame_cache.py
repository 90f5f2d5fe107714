"""Every frame of a video or of a parquet file's picture column, decoded once into an array on disk that is mapped.

A cache entry is a folder named by a hash of the source's content ends, size and time, and of the wanted picture size.
It is written under a hidden name and renamed, so a half-written entry never counts; a changed source gets a new one.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

FORMAT = 1
SAMPLE_BYTES = 1 << 16
Size = tuple[int, int]


class Frame(NamedTuple):
    """One decoded picture: uint8 RGB, shape (H, W, 3), and its time in the file [s] (row number for parquet)."""

    picture: np.ndarray
    time: float


class Frames(NamedTuple):
    """All frames of one file: uint8 RGB, shape (N, H, W, 3), mapped from disk; times ascending, shape (N,)."""

    pictures: np.ndarray
    times: np.ndarray


def default_cache() -> Path:
    """`$HEADRACE_CACHE`, or `headrace` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEADRACE_CACHE") or Path(home) / "headrace")


def video_frames(path: Path, size: Size | None, cache: Path) -> Frames:
    """Frames of a video file, `size` (height, width) or as stored; resized by area averaging without keeping aspect.

    Raises:
        ValueError: The file is missing, truncated or no video.
        OSError: The cache does not fit on the disk or cannot be written.
    """
    return _cached(path, "", size, cache, lambda: _decode_video(path))


def column_frames(path: Path, column: str, size: Size | None, cache: Path) -> Frames:
    """Frames of a picture column of a parquet file; like `video_frames`, with row numbers for times."""
    return _cached(path, column, size, cache, lambda: _decode_column(path, column))


def _decode_video(path: Path) -> Iterator[Frame]:
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield Frame(frame.to_ndarray(format="rgb24"), float(frame.time or 0.0))
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a video ({error}): missing, truncated or not a video; copy or record it again"
        ) from error


def _decode_column(path: Path, column: str) -> Iterator[Frame]:
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for part in file.iter_batches(batch_size=64, columns=[column]):
                for cell in part.column(0).to_pylist():
                    data = cell["bytes"] if cell["bytes"] is not None else (path.parent / cell["path"]).read_bytes()
                    yield Frame(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), float(row))
                    row += 1
    except (pa.ArrowException, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: picture {row} of {column} cannot be read ({error}); copy the file again") from error


def _cached(path: Path, column: str, size: Size | None, cache: Path, decode: Callable[[], Iterator[Frame]]) -> Frames:
    entry = cache / "frames" / _key(path, column, size)
    if not entry.is_dir():
        _fill(entry, size, decode)
    return _open(entry)


def file_ends(path: Path) -> tuple[int, bytes]:
    """Size of a file [bytes], and its first and last `SAMPLE_BYTES`: enough to tell a changed video from the old one.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(SAMPLE_BYTES)
            file.seek(max(0, size - SAMPLE_BYTES))
            return size, ends + file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); the dataset is incomplete, copy it again") from error


def _key(path: Path, column: str, size: Size | None) -> str:
    length, ends = file_ends(path)
    facts = json.dumps([FORMAT, length, path.stat().st_mtime_ns, column, size])
    return hashlib.sha256(facts.encode() + ends).hexdigest()[:32]


def _fill(entry: Path, size: Size | None, decode: Callable[[], Iterator[Frame]]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f".{entry.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.is_dir():
            return
        temporary = entry.with_name(f".{entry.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write(temporary, size, decode())
            temporary.replace(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, size: Size | None, frames: Iterator[Frame]) -> None:
    times: list[float] = []
    shape: tuple[int, ...] | None = None
    with (folder / "pictures.raw").open("wb") as file:
        for picture, time in frames:
            if size is not None and picture.shape[:2] != size:
                picture = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)
            if shape not in (None, picture.shape):
                raise ValueError(f"pictures of different sizes, {shape} and {picture.shape}; give an image_size")
            shape = picture.shape
            try:
                file.write(np.ascontiguousarray(picture))
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the frame cache {folder.parent} cannot take more ({error}); free some disk, choose a smaller "
                    "image_size, or point HEADRACE_CACHE to another disk",
                ) from error
            times.append(time)
        file.flush()
        os.fsync(file.fileno())
    if shape is None:
        raise ValueError("the file holds no pictures")
    np.save(folder / "times.npy", np.array(times))
    (folder / "shape.json").write_text(json.dumps([len(times), *shape]))


def _open(entry: Path) -> Frames:
    shape = tuple(json.loads((entry / "shape.json").read_text()))
    pictures = np.memmap(entry / "pictures.raw", dtype=np.uint8, mode="r", shape=shape)
    return Frames(np.asarray(pictures), np.load(entry / "times.npy"))
