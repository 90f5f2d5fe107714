"""Clips and single frames of a corpus of videos, and training batches that mix sources by video count or by weight."""
# Shape letters: B batch, T frames of a clip, H rows, W columns.

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.datasets.frame_cache import Frames, Size, column_frames, default_cache, file_ends, video_frames
from headrace.datasets.video_reader import read_frames
from headrace.datasets.video_scan import BadVideo
from headrace.datasets.video_source import Video, VideoSource

Decode = Literal["cache", "stream"]
Window = tuple[float, float, float]
"""A square part of a picture: its left and top edge and its side, as shares of the picture's."""


class ClipBatch(NamedTuple):
    """Clips of a corpus.

    Attributes:
        frames: uint8 RGB 0..255, shape (B, T, 3, H, W).
        mask: bool, shape (B, T); False where the video had ended and its last frame is repeated.
        videos: Number of each clip's video in the corpus, int64, shape (B,).
        starts: Frame number of each clip's first frame, int64, shape (B,).
    """

    frames: Tensor
    mask: Tensor
    videos: Tensor
    starts: Tensor


class VideoClips:
    """Random access to the frames of several sources, all at one picture size.

    Videos are counted through all sources in order, 0 to `len(self) - 1`.

    Args:
        sources: At least one, with different names.
        image_size: Side of the square frames, or (height, width) [px]; pictures are stretched to it.
        decode: `cache` decodes each file once into an array on disk (`headrace.datasets.frame_cache`), right for
            corpora read many times; `stream` decodes what is asked for, right for corpora that would not fit.
        cache: Folder of the frame cache; None for `$HEADRACE_CACHE` or the user's cache folder.
        window: The part of every picture that is kept, (0.25, 0.25, 0.5) for its middle; None for all of it. What is
            kept has `image_size`.

    Raises:
        ValueError: No source, two of one name, or a window that leaves the picture.
    """

    def __init__(
        self,
        sources: Sequence[VideoSource],
        *,
        image_size: int | Size,
        decode: Decode = "cache",
        cache: Path | None = None,
        window: Window | None = None,
    ) -> None:
        if not sources:
            raise ValueError("a corpus needs at least one source of videos")
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {', '.join(names)}; `open_sources` gives them")
        if decode not in ("cache", "stream"):
            raise ValueError(f"unknown decode {decode!r} (known: cache, stream)")
        self.sources = tuple(sources)
        self.size: Size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.decode, self._cache = decode, cache or default_cache()
        self.window = window
        self._decoded, self._cut = _cut_of(self.size, window)
        self.counts = np.array([len(source.videos) for source in sources])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.lengths = np.array([video.length for source in sources for video in source.videos])
        self.strides = np.array([stride for source in sources for stride in source.strides])
        self._number = {(s.name, v.name): i for i, (s, v) in enumerate((s, v) for s in sources for v in s.videos)}
        self._fingerprint: str | None = None
        self._files: dict[tuple[Path, str | None], Frames] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def video(self, number: int) -> tuple[VideoSource, Video]:
        """A video and its source."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[source], self.sources[source].videos[number - int(self.starts[source])]

    def number(self, source: str, video: str) -> int:
        """The number of a video by the names of its source and itself.

        Raises:
            ValueError: Not in this corpus.
        """
        if (source, video) not in self._number:
            raise ValueError(
                f"no video {video!r} in source {source!r}; the sources are {[s.name for s in self.sources]}"
            )
        return self._number[source, video]

    def fingerprint(self) -> str:
        """Hash of all sources' and videos' names, lengths, strides and cameras in order, and of files' sizes and ends.

        Neither the folders above the sources nor dates count, so a copy on another machine has the same one.

        Raises:
            ValueError: A file is not there any more.
        """
        if self._fingerprint is None:
            digest = sha256()
            for source in self.sources:
                videos = zip(source.videos, source.strides, strict=True)
                facts = [source.name, source.camera, *((v.name, v.first, v.length, t) for v, t in videos)]
                digest.update(repr(facts).encode())
                for path in dict.fromkeys(video.path for video in source.videos):
                    size, ends = file_ends(path)
                    digest.update(sha256(str(size).encode() + ends).digest())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def read(self, number: int, frames: np.ndarray) -> np.ndarray:
        """Frames of one video.

        Args:
            number: Of the video.
            frames: Frame numbers 0 .. length - 1, any order and with repeats, int64, shape (T,).

        Returns:
            uint8 RGB, shape (T, H, W, 3).

        Raises:
            ValueError: A frame number lies outside the video.
            BadVideo: The file turned out to be damaged.
        """
        source, video = self.video(number)
        frames = np.asarray(frames, np.int64)
        if not len(frames) or frames.min() < 0 or frames.max() >= video.length:
            raise ValueError(f"{video.name} has frames 0 to {video.length - 1}, asked for {frames.tolist()}")
        if self.decode == "stream" and video.column is None:
            return read_frames(video.path, source.scans[video.path], video.first + frames, self._decoded)[self._cut]
        return self._whole(source, video).pictures[self._cut][video.first + frames]

    def clips(self, videos: np.ndarray, starts: np.ndarray, frames: int) -> ClipBatch:
        """Clips by video number and first frame, at each source's stride; past a video's end its last frame repeats.

        Args:
            videos: int64, shape (B,).
            starts: int64, shape (B,).
            frames: Length of the clips, T.

        Raises:
            BadVideo: A file turned out to be damaged.
        """
        wanted = np.asarray(starts)[:, None] + np.arange(frames) * self.strides[videos][:, None]
        last = self.lengths[videos][:, None] - 1
        pictures = np.empty((len(videos), frames, *self.size, 3), np.uint8)
        for row, number in enumerate(videos):
            pictures[row] = self.read(int(number), np.minimum(wanted[row], last[row]))
        return ClipBatch(
            torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).contiguous(),
            torch.from_numpy(wanted <= last),
            torch.as_tensor(np.asarray(videos, np.int64)),
            torch.as_tensor(np.asarray(starts, np.int64)),
        )

    def _whole(self, source: VideoSource, video: Video) -> Frames:
        key = (video.path, video.column)
        with self._lock:
            if key in self._files:
                return self._files[key]
        try:
            if video.column is not None:
                found = column_frames(video.path, video.column, self._decoded, self._cache)
            else:
                found = video_frames(video.path, self._decoded, self._cache)
        except ValueError as error:
            raise BadVideo("corrupt", str(error)) from error
        stored = len(source.scans[video.path].times) if video.column is None else video.first + video.length
        if len(found.times) < stored:
            raise BadVideo("corrupt", f"{video.path}: only {len(found.times)} of {stored} frames can be decoded")
        with self._lock:
            self._files[key] = found
        return found


class ClipBatches:
    """Random clips for training; batch k depends on (seed, k) only. Meets `headrace.training.batches.Batches`.

    A clip starts anywhere in its video where it fits; a shorter video gives its whole length and repeats its last frame
    (`mask` says so). A video that turns out to be damaged is counted, warned of, and another one takes its place.

    Args:
        corpus: Videos.
        batch_size: Clips per step over all processes.
        frames: Length of a clip, T.
        seed: Everything follows from (seed, step).
        weights: Share of each source, above 0, scaled to sum 1; None for shares by number of videos, as ViPRA has it.
        threads: Clips read at a time, where decoding is on demand.
        rank, world: Which contiguous part of each batch to give.
    """

    def __init__(
        self,
        corpus: VideoClips,
        batch_size: int,
        *,
        frames: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        threads: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of the {world} processes, got {batch_size}")
        if frames < 1 or threads < 1:
            raise ValueError(f"frames and threads must be at least 1, got {frames} and {threads}")
        given = corpus.counts if weights is None else np.asarray(weights, np.float64)
        if len(given) != len(corpus.sources) or min(given) <= 0:
            raise ValueError(f"{len(corpus.sources)} sources need as many weights, each above 0, got {weights}")
        self.corpus, self.batch_size, self.frames, self.seed = corpus, batch_size, frames, seed
        self.weights = np.asarray(given, np.float64) / np.sum(given)
        self.threads, self.rank, self.world = threads, rank, world
        self.damaged: set[int] = set()

    def at(self, step: int) -> ClipBatch:
        """This process's part of batch `step`."""
        share = self.batch_size // self.world
        places = range(self.rank * share, (self.rank + 1) * share)
        if self.threads == 1:
            parts = [self._clip(step, place) for place in places]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                parts = list(pool.map(lambda place: self._clip(step, place), places))
        return ClipBatch(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def shard(self, rank: int, world: int) -> "ClipBatches":
        """The same batches, cut into `world` equal parts, of which this is number `rank`."""
        return ClipBatches(
            self.corpus,
            self.batch_size,
            frames=self.frames,
            seed=self.seed,
            weights=self.weights.tolist(),
            threads=self.threads,
            rank=rank,
            world=world,
        )

    def _clip(self, step: int, place: int) -> ClipBatch:
        draw = np.random.default_rng((self.seed, step, place))
        for _ in range(100):
            source = int(draw.choice(len(self.weights), p=self.weights))
            number = int(self.corpus.starts[source] + draw.integers(self.corpus.counts[source]))
            span = (self.frames - 1) * int(self.corpus.strides[number])
            start = int(draw.integers(max(1, int(self.corpus.lengths[number]) - span)))
            if number in self.damaged:
                continue
            try:
                return self.corpus.clips(np.array([number]), np.array([start]), self.frames)
            except BadVideo as error:
                self.damaged.add(number)
                warnings.warn(
                    f"{error}; left out from here on, {len(self.damaged)} of {len(self.corpus)} videos so far",
                    stacklevel=2,
                )
        raise BadVideo("corrupt", f"100 videos in a row could not be read; {len(self.damaged)} are damaged")


def check_window(window: Window | None) -> None:
    """Refuse a window that leaves the picture.

    Raises:
        ValueError: Says what a window is.
    """
    if window is None:
        return
    left, top, side = window
    if not (side > 0 and left >= 0 and top >= 0 and left + side <= 1 + 1e-9 and top + side <= 1 + 1e-9):
        raise ValueError(f"a window is left, top and side as shares of the picture and lies inside it, got {window}")


def _cut_of(size: Size, window: Window | None) -> tuple[Size, tuple[slice, slice, slice]]:
    """The size [px] that whole pictures are decoded at, and the part of (T, H, W) arrays of them that is kept."""
    check_window(window)
    if window is None:
        return size, (slice(None), slice(None), slice(None))
    left, top, side = window
    whole = (round(size[0] / side), round(size[1] / side))
    row, column = (min(round(at * all_), all_ - kept) for at, all_, kept in zip((top, left), whole, size, strict=True))
    return whole, (slice(None), slice(row, row + size[0]), slice(column, column + size[1]))
