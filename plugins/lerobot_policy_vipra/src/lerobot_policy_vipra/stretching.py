"""Pictures stretched as headrace's own readers do it, by OpenCV's area averaging, on whatever device they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor


def stretched(pictures: Tensor, size: int) -> Tensor:
    """Pictures (..., H, W) as (..., size, size), float; the same numbers as `cv2.resize` with INTER_AREA gives."""
    high, wide = pictures.shape[-2:]
    if (high, wide) == (size, size):
        return pictures
    with _full_precision(pictures.device.type):
        down, across = (matrix.to(pictures.device) for matrix in _matrices(high, wide, size))
        return down @ pictures.float() @ across.T


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Products in float32 as written: autocast's half precision, and TF32, which LeRobot allows, lose grey levels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=32)
def _matrices(high: int, wide: int, size: int) -> tuple[Tensor, Tensor]:
    """What OpenCV does to columns and to rows of such pictures, (size, H) and (size, W), read off it line by line.

    Its map is linear and treats both directions on their own, but which weights it takes depends on both.
    """
    down, across = np.zeros((size, high), np.float32), np.zeros((size, wide), np.float32)
    picture = np.zeros((high, wide), np.float32)
    for matrix, lines in ((down, picture), (across, picture.T)):
        for place, line in enumerate(lines):
            line[:] = 1
            result = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
            matrix[:, place] = result[:, 0] if matrix is down else result[0]
            line[:] = 0
    return torch.from_numpy(down), torch.from_numpy(across)
