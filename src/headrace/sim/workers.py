"""Environments in processes of their own: a hung or crashed simulator costs one episode, never the run.

The processes are forked from a server that has imported the simulator already, so that a second one, and one that
takes the place of a crashed one, starts at once. Where an NVIDIA GPU is, they are started afresh: a process that has
looked at CUDA cannot be forked.
"""

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from headrace.sim.episode import EpisodeRunner
from headrace.sim.success import SuccessRule
from headrace.sim.tasks import Task

COMMANDS = ("describe", "start", "run", "finish", "expert", "demonstrate", "assign", "close")


class WorkerFailed(RuntimeError):
    """A worker's answer was an error, or it died, or it did not answer in time; the message says which."""


def import_ahead(task: Task) -> None:
    """Begin to import the task's simulator, in the process that workers are forked from; returns at once."""
    _context(task)
    if not _has_cuda():
        forkserver.ensure_running()


def _has_cuda() -> bool:
    return Path("/dev/nvidiactl").exists()


def _context(task: Task) -> Any:
    if _has_cuda():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    module = task.environment.split(":")[0]
    if module.startswith("headrace."):  # a user's own module may change between two runs of one process
        context.set_forkserver_preload(["headrace.sim.episode", module])
    return context


def _serve(pipe: Connection, task: Task, rule: SuccessRule | None, crowded: bool, variables: dict[str, str]) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)  # the parent's of now, not those from when the server was started
    if crowded:
        os.environ.setdefault("LP_NUM_THREADS", "1")  # one software-rendering thread each, before Vulkan is loaded
    runner: EpisodeRunner | None = None
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if name in ("assign", "close"):
                if runner is not None:
                    runner.close()
                if name == "close":
                    return
                (task, rule), runner = arguments, None
                continue
            if runner is None:
                runner = EpisodeRunner(task, rule=rule)
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
        crowded: As many workers as cores, so that each should render with one thread.
    """

    def __init__(self, task: Task, *, rule: SuccessRule | None = None, crowded: bool = False) -> None:
        self.task, self.rule, self.crowded = task, rule, crowded
        self._spawn()

    def _spawn(self) -> None:
        context = _context(self.task)
        self.pipe, other = context.Pipe()
        arguments = (other, self.task, self.rule, self.crowded, dict(os.environ))
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def assign(self, task: Task, rule: SuccessRule | None = None) -> None:
        """Simulate another task from now on, when every command has been answered.

        A task of the same simulator is built in the process that is there (its imports and its renderer's start are the
        slow part), any other in a new one.
        """
        if (task, rule) == (self.task, self.rule):
            return
        kept = task.environment == self.task.environment
        self.task, self.rule = task, rule
        if kept:
            self.send("assign", task, rule)
        else:
            self.close()
            self._spawn()

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for one of `COMMANDS`; `assign` and `close` have no answer."""
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
        self.send("close")
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


class Simulators:
    """Workers that outlive a task; whoever makes them closes them."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def assign(self, task: Task, rule: SuccessRule | None, count: int) -> list[Worker]:
        """So many workers that simulate this task; those that are there are used again."""
        for worker in self.workers[:count]:
            worker.assign(task, rule)
        crowded = count >= len(os.sched_getaffinity(0))
        while len(self.workers) < count:
            self.workers.append(Worker(task, rule=rule, crowded=crowded))
        return self.workers[:count]

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.send("close")  # all at once, so that they end side by side
        for worker in self.workers:
            worker.close()
        self.workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ready(workers: list[Worker], timeout: float) -> Iterator[Worker]:
    """Those workers that have an answer waiting (or died), as soon as there is one, at the latest after `timeout` s."""
    by_pipe = {worker.pipe: worker for worker in workers}
    for pipe in wait(list(by_pipe), timeout):
        yield by_pipe[pipe]  # type: ignore[index]
