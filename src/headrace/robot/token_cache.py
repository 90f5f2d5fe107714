"""Every frame of a corpus as ids of a frozen tokenizer, computed once and mapped from disk.

A folder holds `tokens.json` (what made them) and `part-00000.npy` and following, each the frames of some videos in
order; a video that cannot be decoded has -1 for all its ids, and is tried again whenever the cache is asked for. Parts
are whole or absent, so a killed run goes on where it was.
"""
# Shape letters: F frames of a part, N ids of a frame.

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_scan import BadVideo
from headrace.nn.pretrained import config_from_dict, void, write_atomically
from headrace.robot.frame_codes import frames_to_codes
from headrace.vlm.visual_encoder import VisualEncoder

HEADER_FILE = "tokens.json"
UNREADABLE = -1


@dataclass(frozen=True, kw_only=True)
class TokenHeader:
    """What made a cache.

    Attributes:
        tokenizer_hash: From `encoder_hash`.
        corpus: Fingerprint of the corpus.
        picture_size: Side to which frames are stretched before anything is cut from them [px].
        crop: (left, top, side) of the square that the tokenizer sees [px].
        tokens: Ids per frame. `codes`: Size of the codebook.
        parts: Number of files in the whole.
    """

    tokenizer_hash: str
    corpus: str
    picture_size: int
    crop: tuple[int, int, int]
    tokens: int
    codes: int
    parts: int


def encoder_hash(encoder: VisualEncoder) -> str:
    """Hash of a tokenizer's config and weights, 16 hexadecimal digits."""
    digest = sha256(json.dumps(asdict(encoder.config), sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FrameTokens:
    """A finished cache: ids of any frame of any video of the corpus.

    Attributes:
        damaged: Numbers of the videos that could not be decoded, int64, shape (D,); they have no ids.

    Args:
        folder: Written by `cache_tokens`.
        corpus: The corpus it was made of.

    Raises:
        FileNotFoundError: No cache there.
        ValueError: Another corpus, or parts missing.
    """

    def __init__(self, folder: Path, corpus: VideoClips) -> None:
        self.header = _read_header(folder)
        if self.header.corpus != corpus.fingerprint():
            raise ValueError(f"{folder} holds the tokens of another corpus; make them again in a new folder")
        missing = [p for p in range(self.header.parts) if not _part_path(folder, p).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {self.header.parts} parts; run the command again to go on"
            )
        self._parts = [np.load(_part_path(folder, p), mmap_mode="r") for p in range(self.header.parts)]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])])
        self._first = np.concatenate([[0], np.cumsum(corpus.lengths)])
        if self._starts[-1] != self._first[-1]:
            raise ValueError(f"{folder} holds {self._starts[-1]} frames, the corpus {self._first[-1]}")
        self.damaged = np.flatnonzero(self._rows(self._first[:-1])[:, 0] == UNREADABLE)

    def read(self, videos: np.ndarray, frames: np.ndarray) -> torch.Tensor:
        """Ids of frames by video number and frame number, both (B,); int64, shape (B, N)."""
        return torch.from_numpy(self._rows(self._first[videos] + frames).astype(np.int64))

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        part = np.searchsorted(self._starts, rows, side="right") - 1
        places = zip(part.tolist(), rows.tolist(), strict=True)
        return np.stack([self._parts[p][r - self._starts[p]] for p, r in places])


def cache_tokens(
    corpus: VideoClips,
    encoder: VisualEncoder,
    folder: Path,
    *,
    crop: tuple[int, int, int],
    batch_size: int = 64,
    frames_per_part: int = 20_000,
    done: Callable[[int, int], None] = lambda part, parts: None,
    shard: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> FrameTokens:
    """Tokenise a corpus into a folder of its own below `folder`; parts that are there already stay.

    Videos that turn out to be damaged get no ids, with a warning that counts them; those of parts that are there are
    tried again, as their files may have been repaired since.

    Args:
        corpus: Videos, all read at one square size.
        encoder: Discrete tokenizer.
        folder: Root of all caches; the cache's own folder is named by what makes it.
        crop: (left, top, side) of the square that is cut from each frame [px].
        batch_size: Frames at a time.
        frames_per_part: About so many frames a file.
        done: Called with (part, parts) after each part.
        shard: This process's number and the number of processes; it does the parts that leave this remainder.
        wait: Returns when all processes have called it; every one of them reads the finished cache.

    Raises:
        ValueError: The encoder gives no codes, or the crop leaves the picture.
    """
    if encoder.codes is None:
        raise ValueError("a token cache needs a discrete tokenizer (tokens='codes')")
    left, top, side = crop
    size = corpus.size[0]
    if min(left, top) < 0 or side < 1 or max(left, top) + side > size or corpus.size[1] != size:
        raise ValueError(f"a crop of {side} px at ({left}, {top}) leaves pictures of {corpus.size} px")
    groups = _groups(corpus.lengths, frames_per_part)
    header = TokenHeader(
        tokenizer_hash=encoder_hash(encoder),
        corpus=corpus.fingerprint(),
        picture_size=size,
        crop=crop,
        tokens=encoder.tokens_per_picture,
        codes=encoder.codes,
        parts=len(groups),
    )
    own = folder / sha256(json.dumps(asdict(header)).encode()).hexdigest()[:16]
    rank, world = shard
    for part, videos in enumerate(groups):
        if part % world == rank:
            path = _part_path(own, part)
            known = np.load(path, mmap_mode="r") if path.is_file() else None
            lengths = corpus.lengths[videos.start : videos.stop]
            if known is None or (known[np.cumsum(lengths) - lengths, 0] == UNREADABLE).any():
                _write_part(corpus, encoder.eval(), videos, header, path, batch_size, known)
            if known is None:
                done(part, len(groups))
    text = json.dumps(asdict(header), indent=2) + "\n"
    if rank == 0:
        write_atomically(own / HEADER_FILE, lambda path: void(path.write_text(text)))
    wait()
    return FrameTokens(own, corpus)


def _write_part(
    corpus: VideoClips,
    encoder: VisualEncoder,
    videos: range,
    header: TokenHeader,
    path: Path,
    batch_size: int,
    known: np.ndarray | None,
) -> None:
    """Write a part, or fill what was unreadable in the one that is there, `known`, shape (F, N)."""
    rows: list[np.ndarray] = []
    reasons: Counter[str] = Counter()
    first = repaired = 0
    for video in videos:
        length = int(corpus.lengths[video])
        there = None if known is None else known[first : first + length]
        first += length
        if there is not None and there[0, 0] != UNREADABLE:
            rows.append(there)
            continue
        try:
            rows.append(_video_codes(corpus, encoder, video, header.crop, batch_size))
            repaired += there is not None
        except BadVideo as error:
            reasons[error.reason] += 1
            rows.append(np.full((length, header.tokens), UNREADABLE))
    if reasons:
        text = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        warnings.warn(f"{path.name}: {reasons.total()} of {len(videos)} videos have no ids ({text})", stacklevel=3)
    if repaired:
        warnings.warn(
            f"{path.name}: {repaired} videos that had no ids can be read now; a run that was begun without them goes "
            "on with other batches",
            stacklevel=3,
        )
    if known is not None and not repaired:
        return
    codes = np.concatenate(rows).astype(np.int16 if header.codes <= 2**15 else np.int32)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, codes, allow_pickle=False)

    write_atomically(path, write)


def _video_codes(
    corpus: VideoClips, encoder: VisualEncoder, video: int, crop: tuple[int, int, int], batch_size: int
) -> np.ndarray:
    """Ids of all frames of a video, shape (F, N)."""
    left, top, side = crop
    device = next(encoder.parameters()).device
    rows = []
    for start in range(0, int(corpus.lengths[video]), batch_size):
        wanted = np.arange(start, min(start + batch_size, int(corpus.lengths[video])))
        frames = torch.from_numpy(corpus.read(video, wanted)[:, top : top + side, left : left + side])
        rows.append(frames_to_codes(encoder, frames.permute(0, 3, 1, 2).to(device)).cpu().numpy())
    return np.concatenate(rows)


def _groups(lengths: np.ndarray, frames_per_part: int) -> list[range]:
    """Neighbouring videos with about so many frames together."""
    number = np.cumsum(lengths) // max(frames_per_part, 1)
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    return [range(a, b) for a, b in pairwise(cuts)]


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.npy"


def _read_header(folder: Path) -> TokenHeader:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {HEADER_FILE}: it is no finished token cache")
    return config_from_dict(TokenHeader, json.loads(path.read_text()))
