"""Chunks of targets on a time line: late starts are skipped, overlapping chunks are faded, gaps are interpolated.

Weights of the fade: real-time chunking's soft mask (Black, Galliker and Levine 2025, arXiv 2506.07339, eq. 5): 1 while
the old chunk is certainly executed, then falling exponentially to 0 where the old chunk ends.
"""

import threading
from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    """What the arm should do now.

    Attributes:
        target: Joint targets (J,), or None when no chunk covers this moment: hold.
        covered: Time for which targets remain [s], 0 when none.
    """

    target: np.ndarray | None
    covered: float


def soft_mask(delay: int, overlap: int) -> np.ndarray:
    r"""Weight of the old chunk at each of `overlap` rows, shape (overlap,).

    1 on the first `delay` rows, then :math:`c(e^c - 1)/(e - 1)` with c falling linearly to 0 behind the last row.

    Raises:
        ValueError: `delay` is negative or `overlap` below 0.
    """
    if delay < 0 or overlap < 0:
        raise ValueError(f"delay and overlap must be at least 0, got {delay} and {overlap}")
    row = np.arange(overlap)
    c = np.clip((overlap - row) / (overlap - delay + 1), 0.0, 1.0)
    return np.where(row < delay, 1.0, c * np.expm1(c) / np.expm1(1.0))


class ActionQueue:
    """Targets at times, filled by the thread that runs the policy and read by the control loop.

    Args:
        period: Time between the rows of a chunk [s].
    """

    def __init__(self, period: float) -> None:
        if period <= 0:
            raise ValueError(f"period must be above 0 s, got {period}")
        self.period = period
        self._start = 0.0
        self._rows: np.ndarray = np.zeros((0, 0))
        self._lock = threading.Lock()

    def merge(self, targets: np.ndarray, start: float, now: float) -> None:
        """Take over a new chunk.

        Args:
            targets: Joint targets, shape (H, J); row k is meant for time `start + k * period`.
            start: Time of the observation that the chunk answers [s].
            now: Present time [s]; rows before it are not executed.
        """
        with self._lock:
            first = max(0, int(np.ceil((now - start) / self.period - 1e-9)))
            fresh = np.array(targets[first:], dtype=float)
            begin = start + first * self.period
            old = self._sample(begin, len(fresh))
            if len(old):
                weights = soft_mask(1, len(old))[:, None]
                fresh[: len(old)] = weights * old + (1 - weights) * fresh[: len(old)]
            kept = self._sample(begin - self.period, 1)  # so that the way to the first new row starts where we are
            if len(kept):
                fresh, begin = np.concatenate([kept, fresh]), begin - self.period
            if len(fresh):
                self._start, self._rows = begin, fresh

    def at(self, now: float) -> Request:
        """The target at time `now`, linear between rows."""
        with self._lock:
            rows = self._sample(now, 1)
            end = self._start + (len(self._rows) - 1) * self.period
            return Request(rows[0] if len(rows) else None, max(0.0, end - now) if len(rows) else 0.0)

    def leftover(self, now: float) -> np.ndarray:
        """The targets still to come on the grid from `now`, shape (n, J): what a policy may condition on."""
        with self._lock:
            return self._sample(now, len(self._rows))

    def _sample(self, begin: float, count: int) -> np.ndarray:
        """Up to `count` rows at `begin`, `begin + period`, ... as far as the chunk reaches; none before its start."""
        if not len(self._rows):
            return self._rows
        position = (begin - self._start) / self.period + np.arange(count)
        position = position[position <= len(self._rows) - 1 + 1e-9]
        if not len(position):
            return self._rows[:0]
        position = np.clip(position, 0, len(self._rows) - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, len(self._rows) - 1)
        part = (position - low)[:, None]
        return (1 - part) * self._rows[low] + part * self._rows[high]
