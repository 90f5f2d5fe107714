"""SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C arrived; the step was finished and a checkpoint written before this was raised."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Signals that arrived; a second one ends the process at once. Only the main thread can listen."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def note(number: int, _: Any) -> None:
        arrived.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
