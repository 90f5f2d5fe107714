"""Environments in processes of their own: a hung or crashed simulator costs one episode, never the run."""

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from headrace.sim.episode import EpisodeRunner
from headrace.sim.success import SuccessRule
from headrace.sim.tasks import Task

COMMANDS = ("describe", "start", "run", "finish", "expert", "demonstrate")


class WorkerFailed(RuntimeError):
    """A worker's answer was an error, or it died, or it did not answer in time; the message says which."""


def _serve(pipe: Connection, task: Task, rule: SuccessRule | None, keep_frames: bool, crowded: bool) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if crowded:
        os.environ.setdefault("LP_NUM_THREADS", "1")  # one software-rendering thread each, before Vulkan is loaded
    runner: EpisodeRunner | None = None
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        if name == "close":
            if runner is not None:
                runner.close()
            return
        try:
            if runner is None:
                runner = EpisodeRunner(task, rule=rule, keep_frames=keep_frames)
            pipe.send((True, getattr(runner, name)(*arguments)))
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            if os.environ.get("HEADRACE_TRACEBACK"):
                detail += "\n" + traceback.format_exc()
            pipe.send((False, detail))


class Worker:
    """One environment process. `send` returns at once; `receive` gives the answer of the oldest command.

    Args:
        task: The task to simulate.
        rule: Success rule; the task's own by default.
        keep_frames: Keep pictures for videos and demonstrations.
        crowded: Several workers share the cores, so that each should render with one thread.
    """

    def __init__(
        self, task: Task, *, rule: SuccessRule | None = None, keep_frames: bool = True, crowded: bool = False
    ) -> None:
        self._arguments = (task, rule, keep_frames, crowded)
        self._spawn()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        self.process.start()
        other.close()

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for one of `COMMANDS`."""
        if command not in COMMANDS:
            raise ValueError(f"unknown worker command {command!r} (known: {', '.join(COMMANDS)})")
        try:
            self.pipe.send((command, arguments))
        except OSError:
            return  # the process is gone; `receive` says so

    def receive(self, timeout: float | None = None) -> Any:
        """The next answer.

        Raises:
            WorkerFailed: The command failed, the process died, or nothing came within `timeout` seconds.
        """
        try:
            if not self.pipe.poll(timeout):
                raise WorkerFailed(f"no answer from the simulator within {timeout:.0f} s: the environment hangs")
            fine, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerFailed(f"the simulator process died (exit status {self.process.exitcode})") from error
        if not fine:
            raise WorkerFailed(answer)
        return answer

    def call(self, command: str, *arguments: Any, timeout: float | None = None) -> Any:
        """`send`, then `receive`."""
        self.send(command, *arguments)
        return self.receive(timeout)

    def restart(self) -> None:
        """Replace the process by a fresh one."""
        self.kill()
        self._spawn()

    def kill(self) -> None:
        """End the process without asking it."""
        self.process.kill()
        self.process.join(5)
        self.pipe.close()

    def close(self) -> None:
        """Ask the process to end, and end it if it does not."""
        try:
            self.pipe.send(("close", ()))
            self.process.join(5)
        except OSError:
            pass
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def ready(workers: list[Worker], timeout: float) -> Iterator[Worker]:
    """Those workers that have an answer waiting (or died), as soon as there is one, at the latest after `timeout` s."""
    by_pipe = {worker.pipe: worker for worker in workers}
    for pipe in wait(list(by_pipe), timeout):
        yield by_pipe[pipe]  # type: ignore[index]
