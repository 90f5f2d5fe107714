"""Writing MP4 from observation frames, atomically. (ManiSkill's own render camera would cost 0.3 s a step.)"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_mp4(path: str | os.PathLike[str], frames: Sequence[np.ndarray], *, rate: float) -> Path:
    """Encode frames as H.264, playable in a browser.

    Args:
        path: Target file; appears only when complete.
        frames: Pictures of one size, uint8, shape (height, width, 3), RGB. Odd sizes lose their last row or column.
        rate: Frames per second [Hz].

    Raises:
        ValueError: No frames, or frames of different sizes.
    """
    if not len(frames):
        raise ValueError("a video needs at least one frame")
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError("all frames of a video must have one size")
    import av

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            options = {"crf": "20", "preset": "veryfast", "movflags": "+faststart"}
            stream = container.add_stream("libx264", rate=round(rate), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.thread_count = 1
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
