"""What the rollout runner costs over a bare loop around the same environment, and what more processes bring.

Usage: python benchmarks/runner_overhead.py [--episodes 6] [--repeats 3]
Runs, in turn: a bare loop with pictures; the runner drawing every step (as for a video) with one and two processes, and
drawing only what the policy sees; state-only stepping with one and two
processes. Same task, same seeds, a policy that costs nothing. Prints one JSON line with medians.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from headrace.contracts import ActionChunk, ActionSpec
from headrace.sim.rollout import EPISODES_FILE, START_UP, RolloutSettings, roll_out
from headrace.sim.run_folder import read_episodes
from headrace.sim.tasks import Task, find_task, make_environment
from headrace.sim.workers import Simulators

WARM_UP_SEED = 10**6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Task, episodes a measurement, steps an episode, measurements."""

    task: str = "PickCube-v1"
    episodes: int = 6
    steps: int = 50
    repeats: int = 3


class Still:
    """A policy that holds still, seven actions at a time."""

    def __init__(self, spec: ActionSpec) -> None:
        self.spec = spec
        self.chunk = np.zeros((7, spec.dim), np.float32)
        self.started = 0.0  # time of day when the first episode began [s]

    def reset(self, slot: int, *, seed: int) -> None:
        """Notes when the first episode begins."""
        self.started = self.started or time.time()

    def act(self, observations, slots) -> ActionChunk:
        """Zeros."""
        return ActionChunk(np.stack([self.chunk] * len(slots)), 0.0)


def bare(task: Task, episodes: int) -> float:
    """Steps per second of reset and step in one process, nothing else; building the simulator is not counted."""
    environment = make_environment(task)
    environment.reset(0)
    environment.step(np.zeros(environment.spec.dim, np.float32))
    started = time.perf_counter()
    for seed in range(episodes):
        environment.reset(seed)
        for _ in range(task.max_steps):
            environment.step(np.zeros(environment.spec.dim, np.float32))
    seconds = time.perf_counter() - started
    environment.close()
    return episodes * task.max_steps / seconds


def bare_worker(task: Task, episodes: int, queue) -> None:
    """`bare` in a process of its own."""
    queue.put(bare(task, episodes))


def runner(task: Task, episodes: int, processes: int, spec: ActionSpec, *, every: bool = True) -> float:
    """Steps per second of the runner, without start-up; `every` step drawn, or what the policy sees.

    The simulators are built and have drawn before. The time is that on the clock from the first episode's start to the
    last row on the disk, with the videos' encoding and whatever else lies between episodes.
    """
    policy, simulators = Still(spec), Simulators()
    for worker in simulators.assign(task, "at_end", processes):
        worker.call("start", WARM_UP_SEED, timeout=START_UP)
    with tempfile.TemporaryDirectory() as folder:
        chosen = RolloutSettings(
            episodes=episodes, num_envs=processes, success_rule="at_end", videos=10**6 if every else 0
        )
        roll_out([task], policy, chosen, Path(folder), policy_name="still", simulators=simulators)
        written = Path(folder) / EPISODES_FILE
        rows, ended = read_episodes(written), written.stat().st_mtime
    return sum(row["steps"] for row in rows) / (ended - policy.started)


def main(settings: Settings) -> None:
    """Measure in turn, so that a drifting machine hits all alike."""
    task = replace(find_task(settings.task), max_steps=settings.steps)
    blind = replace(task, settings=(*task.settings, ("render", False)))
    environment = make_environment(blind)
    spec = environment.spec
    environment.close()
    rows: dict[str, list[float]] = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(settings.repeats):
        queue = context.Queue()
        process = context.Process(target=bare_worker, args=(task, settings.episodes, queue))
        process.start()
        rows.setdefault("bare_loop", []).append(queue.get())
        process.join()
        for name, which, processes, episodes, every in (
            ("runner_1", task, 1, settings.episodes, True),
            ("runner_2", task, 2, settings.episodes, True),
            ("runner_2_without_videos", task, 2, settings.episodes, False),
            ("state_only_1", blind, 1, 6 * settings.episodes, False),
            ("state_only_2", blind, 2, 6 * settings.episodes, False),
        ):
            rows.setdefault(name, []).append(runner(which, episodes, processes, spec, every=every))
    medians = {name: round(statistics.median(values), 2) for name, values in rows.items()}
    ratios = [a / b for a, b in zip(rows["runner_1"], rows["bare_loop"], strict=True)]
    gains = [b / a for a, b in zip(rows["state_only_1"], rows["state_only_2"], strict=True)]
    print(
        json.dumps(
            {
                "steps_per_second": medians,
                "runner_over_bare": round(statistics.median(ratios), 3),
                "two_processes_over_one_rendered": round(medians["runner_2"] / medians["runner_1"], 3),
                "two_processes_over_one_state_only": round(statistics.median(gains), 3),
                "settings": vars(settings),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
