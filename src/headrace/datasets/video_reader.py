"""Chosen frames of a video file, decoded on demand: seek to the key frame before them, decode to the last one."""

from pathlib import Path

import av
import numpy as np

from headrace.datasets.frame_cache import Size
from headrace.datasets.video_scan import BadVideo, Scan


def read_frames(path: Path, scan: Scan, numbers: np.ndarray, size: Size | None, *, threads: int = 1) -> np.ndarray:
    """Frames by number, decoded once each; reduced by area averaging within the colour conversion.

    Args:
        path: Video file.
        scan: Of that file.
        numbers: Frame numbers from 0, any order and with repeats, int64, shape (T,).
        size: (height, width) [px], stretched to it; None keeps the stored size.
        threads: Of the decoder. One is best where several files are read at a time.

    Returns:
        uint8 RGB, shape (T, height, width, 3).

    Raises:
        ValueError: A number lies outside the file.
        BadVideo: The file cannot be decoded up to the last of them.
    """
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(scan.times):
        raise ValueError(f"{path} has frames 0 to {len(scan.times) - 1}, asked for {numbers.tolist()}")
    wanted = {int(scan.times[number]): None for number in np.unique(numbers)}
    found: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            first, last = min(wanted), max(wanted)
            if first > scan.times[0]:
                container.seek(first, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = _picture(frame, size)
                if frame.pts is not None and frame.pts >= last:
                    break
    except (av.error.FFmpegError, IndexError, OSError, ValueError) as error:
        raise BadVideo("corrupt", f"{path} cannot be decoded ({error}); copy or record it again") from error
    if len(found) < len(wanted):
        raise BadVideo("corrupt", f"{path}: {len(wanted) - len(found)} of {len(wanted)} frames cannot be decoded")
    return np.stack([found[int(scan.times[number])] for number in numbers])


def _picture(frame: av.VideoFrame, size: Size | None) -> np.ndarray:
    if size is None:
        return frame.to_ndarray(format="rgb24")
    return frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="AREA")
