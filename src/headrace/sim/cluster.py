"""Episodes spread over the workers of a Ray cluster; the rows are those of one process.

Episode i starts from its own seed and the policy's noise follows from that number, so a row does not depend on which
worker made it. Videos are written by the workers: on several machines the results folder must be a shared one.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from headrace.contracts import Policy
from headrace.sim.episode import Episode
from headrace.sim.rollout import Rollout, RolloutSettings
from headrace.sim.tasks import Task
from headrace.sim.workers import Simulators


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers are and what each one gets.

    Attributes:
        workers: Ray workers, each with its own policy and `num_envs` simulators.
        address: Of a running cluster, such as `auto` or `ray://host:10001`; empty starts one on this machine.
        cpus: Cores reserved per worker.
        gpus: Share of a GPU reserved per worker.
    """

    workers: int = 2
    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"workers must be at least 1, cpus and gpus not negative, got {self}")

    def connect(self) -> Any:
        """The `ray` module, connected.

        Raises:
            ModuleNotFoundError: Ray is not installed; names the extra.
        """
        try:
            ray = import_module("ray")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("spreading episodes needs Ray: pip install 'headrace[cluster]'") from error
        if ray.is_initialized():
            return ray
        if self.address:
            ray.init(address=self.address, log_to_driver=False)
            return ray
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        start_node(
            ray,
            num_cpus=max(1, round(self.workers * self.cpus)),
            log_to_driver=False,
            object_store_memory=256 << 20,
            runtime_env={"env_vars": paths},
        )
        return ray


def start_node(ray: Any, *, attempts: int = 3, **options: Any) -> None:
    """`ray.init` on this machine, tried again where the node is not up within Ray's own 30 s: a loaded machine is slow.

    Args:
        ray: The module.
        attempts: How often it is tried.
        options: Go to `ray.init`.
    """
    for left in reversed(range(attempts)):
        try:
            ray.init(include_dashboard=False, **options)
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


class EpisodeMaker:
    """What a Ray worker holds: its own policy and its own simulators, kept open between calls."""

    def __init__(
        self, task: Task, make_policy: Callable[[], Policy | None], settings: RolloutSettings, folder: Path
    ) -> None:
        self.rollout = Rollout(task, make_policy(), settings, folder, Simulators())

    def make(self, wanted: list[tuple[int, int]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of episodes (number, seed), and what the environment declares."""
        rows = list(self.rollout.episodes(deque(wanted)))
        return rows, self.rollout.described

    def close(self) -> None:
        """End the simulators."""
        self.rollout.simulators.close()


class ClusterRollout(Rollout):
    """A `Rollout` whose episodes run on Ray workers. A worker that dies costs the episodes that it was making.

    Args:
        task: What to do.
        policy: Not used here: each worker makes its own.
        settings: Episodes, seeds, simulators per worker.
        folder: Results folder.
        simulators: Not used here: each worker has its own.
        cluster: Where the workers are.
        make_policy: Builds the policy, None for the task's scripted expert; must be importable by the workers.
    """

    def __init__(
        self,
        task: Task,
        policy: Policy | None,
        settings: RolloutSettings,
        folder: Path,
        simulators: Simulators,
        *,
        cluster: Cluster,
        make_policy: Callable[[], Policy | None],
    ) -> None:
        super().__init__(task, policy, settings, folder.resolve(), simulators)
        self.cluster, self.make_policy = cluster, make_policy

    def episodes(self, waiting: deque[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Rows as they end, each worker being given `num_envs` episodes at a time."""
        ray = self.cluster.connect()
        size = self.settings.num_envs
        make = partial(
            ray.remote(num_cpus=self.cluster.cpus, num_gpus=self.cluster.gpus)(EpisodeMaker).remote,
            self.task,
            self.make_policy,
            self.settings,
            self.folder,
        )
        running: dict[Any, tuple[Any, list[tuple[int, int]]]] = {}
        makers = [make() for _ in range(min(self.cluster.workers, -(-len(waiting) // size)))]

        def give(maker: Any) -> None:
            share = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            if share:
                running[maker.make.remote(share)] = (maker, share)

        try:
            for maker in makers:
                give(maker)
            while running:
                done, _ = ray.wait(list(running))
                maker, share = running.pop(done[0])
                try:
                    rows, self.described = ray.get(done[0])
                    yield from rows
                    give(maker)
                except ray.exceptions.RayActorError as error:
                    yield from (self._lost(number, seed, error) for number, seed in share)
                    makers.remove(maker)
                    if waiting:
                        makers.append(make())
                        give(makers[-1])
        finally:
            for maker in makers:
                ray.kill(maker)

    def _lost(self, number: int, seed: int, error: Exception) -> dict[str, Any]:
        reason = f"the Ray worker died: {type(error).__name__}: {str(error).splitlines()[0]}"
        episode = Episode(seed=seed, instruction=self.task.instruction, error=reason)
        return self.row(episode, number, seed)
