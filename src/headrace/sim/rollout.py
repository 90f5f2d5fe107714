"""Rolling a policy out: parallel environment processes, batched policy calls, results written as they happen."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from headrace.contracts import ActionSpec, EpisodesLost, Observation, Policy, look_back, needs_of, require_same_spec
from headrace.sim.episode import LONGEST_LOOK_BACK, Episode
from headrace.sim.results import hardware, summarise, total, versions
from headrace.sim.run_folder import (
    append_line,
    check_same_environment,
    check_same_run,
    claim,
    read_episodes,
    read_json,
    write_json,
)
from headrace.sim.success import SuccessRule
from headrace.sim.tasks import Task, require_ready
from headrace.sim.workers import Simulators, Worker, WorkerFailed, ready

log = logging.getLogger(__name__)
START_UP = 900.0  # seconds; a loaded machine imports a simulator slowly
EPISODES_FILE, RESULTS_FILE = "episodes.jsonl", "results.json"
OF_THE_EPISODES = ("date", "hardware", "versions", "action_names", "state_names")  # of when they were made, not told


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How a rollout is made; saved beside its results and compared when it is resumed.

    Attributes:
        episodes: Episodes per task; episode i starts from seed `seed + i`.
        policy_seed: The policy's randomness in episode i follows from `policy_seed + i`; by default from its own seed.
        num_envs: Environment processes.
        success_rule: Overrides the task's own rule.
        videos: Videos written per task, from observation frames.
        timeout: Seconds after which a silent environment counts as hung.
    """

    episodes: int = 24
    seed: int = 0
    policy_seed: int | None = None
    num_envs: int = 1
    success_rule: SuccessRule | None = None
    videos: int = 10
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("episodes", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class _Slot:
    """One environment process and the episode running in it."""

    index: int
    worker: Worker
    seed: int = 0
    number: int = 0
    answered: str = ""
    milliseconds: list[float] = field(default_factory=list)
    sent_at: float = 0.0


class Rollout:
    """One policy in one task.

    Args:
        task: What to do.
        policy: The policy, or None for the task's scripted expert.
        settings: Number of episodes, seeds, processes.
        folder: Where `episodes.jsonl` and `videos/` go; must be held with `claim`.
        simulators: The processes to run in; they stay open.

    Attributes:
        described: What the environment declares; empty until one was asked.
        made: Episodes that `run` added to the folder.
    """

    def __init__(
        self, task: Task, policy: Policy | None, settings: RolloutSettings, folder: Path, simulators: Simulators
    ) -> None:
        require_ready(task)
        self.task, self.policy, self.settings, self.folder = task, policy, settings, folder
        self.simulators = simulators
        self.rule: SuccessRule = settings.success_rule or task.success_rule
        self.described: dict[str, Any] = {}
        self.made = 0

    def run(self) -> list[dict[str, Any]]:
        """Run all episodes that the folder does not hold yet; returns every row, in order of the seeds.

        Raises:
            FileExistsError: The folder's episodes of this task are of another environment.
        """
        path = self.folder / EPISODES_FILE
        wanted = range(self.settings.seed, self.settings.seed + self.settings.episodes)
        rows = [r for r in read_episodes(path) if r["task"] == self.task.name and r["seed"] in wanted]
        done = {row["seed"] for row in rows}
        waiting = deque((n, s) for n, s in enumerate(wanted) if s not in done)
        if waiting:
            bar = tqdm(total=len(wanted), initial=len(done), desc=self.task.name, unit="episode", mininterval=0.5)
            checked: dict[str, Any] = {}
            for row in self.episodes(waiting):
                about = self.described.get("about", {})
                if about != checked:
                    check_same_environment(self.folder, self.task.name, about)
                    checked = about
                append_line(path, row)
                rows.append(row)
                if row["note"]:  # here, not where it is made: that may be a worker whose log nobody reads
                    log.warning("%s, seed %d: %s", self.task.name, row["seed"], row["note"])
                self.made += 1
                bar.update()
                bar.set_postfix_str(f"success {sum(r['success'] for r in rows)}/{len(rows)}")
            bar.close()
        return sorted(rows, key=lambda row: row["seed"])

    def episodes(self, waiting: deque[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Rows of the episodes (number, seed), as they end; the simulators stay open for the next call."""
        workers = self.simulators.assign(self.task, self.rule, min(self.settings.num_envs, len(waiting)))
        if not self.described:
            self.described = describe(workers[0], timeout=self.settings.timeout)
            if self.policy is not None:
                self._require_fit(self.policy)
        slots = [_Slot(index, worker) for index, worker in enumerate(workers)]
        busy = [slot for slot in slots if self._begin(slot, waiting)]
        while busy:
            yield from self._advance(busy, waiting)

    def _require_fit(self, policy: Policy) -> None:
        if look_back(policy) > LONGEST_LOOK_BACK:
            raise ValueError(f"a policy may look back {LONGEST_LOOK_BACK} steps, this one wants {look_back(policy)}")
        require_same_spec(policy.spec, ActionSpec.from_dict(self.described["spec"]))
        names = (tuple(self.described[key]) for key in ("cameras", "state_names"))
        if remark := needs_of(policy).require(*names):
            log.warning("%s: %s", self.task.name, remark)

    def _begin(self, slot: _Slot, waiting: deque[tuple[int, int]]) -> bool:
        if not waiting:
            return False
        slot.number, slot.seed = waiting.popleft()
        slot.milliseconds = []
        if self.policy is None:
            self._send(slot, "expert", slot.seed, self._video(slot.number, slot.seed))
        else:
            first = self.settings.seed if self.settings.policy_seed is None else self.settings.policy_seed
            self.policy.reset(slot.index, seed=first + slot.number)
            self._send(slot, "start", slot.seed, self._video(slot.number, slot.seed) is not None)
        return True

    def _send(self, slot: _Slot, command: str, *arguments: Any) -> None:
        slot.answered, slot.sent_at = command, time.monotonic()
        slot.worker.send(command, *arguments)

    def _video(self, number: int, seed: int) -> str | None:
        name = f"{self.task.name.replace('/', '_')}_{seed}.mp4"
        return str(self.folder / "videos" / name) if number < self.settings.videos else None

    def _advance(self, busy: list[_Slot], waiting: deque[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Take the answers that are there, ask the policy once for all that need actions, report finished episodes."""
        by_worker = {id(slot.worker): slot for slot in busy}
        asking: list[tuple[_Slot, Observation]] = []
        for worker in ready([slot.worker for slot in busy], timeout=1.0):
            slot = by_worker[id(worker)]
            try:
                answer = worker.receive(0)
            except WorkerFailed as error:
                yield from self._failed(slot, str(error), busy, waiting)
                continue
            if slot.answered == "start":
                needs_of(self.policy).require_pictures(answer)
                asking.append((slot, answer))
            elif slot.answered == "run":
                observation, ended = answer
                if ended:
                    self._send(slot, "finish", self._video(slot.number, slot.seed))
                else:
                    asking.append((slot, observation))
            else:
                yield self._row(slot, answer)
                if not self._begin(slot, waiting):
                    busy.remove(slot)
        for slot in [s for s in busy if time.monotonic() - s.sent_at > self.settings.timeout]:
            hung = f"no answer from the simulator within {self.settings.timeout:.0f} s: the environment hangs"
            yield from self._failed(slot, hung, busy, waiting)
        if asking:
            yield from self._ask(asking, busy, waiting)

    def _ask(
        self, asking: list[tuple[_Slot, Observation]], busy: list[_Slot], waiting: deque[tuple[int, int]]
    ) -> Iterator[dict[str, Any]]:
        assert self.policy is not None
        slots = [slot for slot, _ in asking]
        try:
            chunk = self.policy.act([observation for _, observation in asking], [slot.index for slot in slots])
        except Exception as error:
            lost = error.slots if isinstance(error, EpisodesLost) and error.slots else {slot.index for slot in slots}
            for slot in [slot for slot in slots if slot.index in lost]:
                yield from self._failed(slot, f"the policy failed: {type(error).__name__}: {error}", busy, waiting)
            rest = [(slot, observation) for slot, observation in asking if slot.index not in lost]
            if rest:
                yield from self._ask(rest, busy, waiting)
            return
        for slot, actions in zip(slots, chunk.actions, strict=True):
            slot.milliseconds.append(round(chunk.milliseconds, 3))
            self._send(slot, "run", np.asarray(actions), look_back(self.policy))

    def _failed(
        self, slot: _Slot, reason: str, busy: list[_Slot], waiting: deque[tuple[int, int]]
    ) -> Iterator[dict[str, Any]]:
        yield self._row(slot, Episode(seed=slot.seed, instruction=self.task.instruction, error=reason))
        slot.worker.restart()
        if not self._begin(slot, waiting):
            busy.remove(slot)

    def _row(self, slot: _Slot, episode: Episode) -> dict[str, Any]:
        return self.row(episode, slot.number, slot.seed, slot=slot.index, milliseconds=slot.milliseconds)

    def row(
        self, episode: Episode, number: int, seed: int, *, slot: int = 0, milliseconds: list[float] | None = None
    ) -> dict[str, Any]:
        """What `episodes.jsonl` keeps of an episode."""
        reading, video = episode.success, self._video(number, seed)
        written = video is not None and episode.note is None and Path(video).exists()
        return {
            "task": self.task.name,
            "episode": number,
            "seed": seed,
            "success": episode.error is None and reading.under(self.rule),
            "success_rule": self.rule,
            "success_once": reading.once,
            "success_at_end": reading.at_end,
            "first_success_step": reading.first_step,
            "steps": len(episode.flags),
            "seconds": round(episode.seconds, 3),
            "error": episode.error,
            "note": episode.note,
            "readings": {key: round(value, 5) for key, value in episode.readings.items()},
            "policy_ms": milliseconds or [],
            "video": os.path.relpath(video, self.folder) if written and video else None,
            "slot": slot,
            "instruction": episode.instruction,
            "actions": [[round(float(v), 5) for v in action] for action in episode.actions],
            "states": [[round(float(v), 5) for v in state] for state in episode.states],
        }


def describe(worker: Worker, *, timeout: float = 0.0) -> dict[str, Any]:
    """What a worker's environment declares; the first answer waits for the simulator to be imported and built.

    Raises:
        ValueError: The simulator cannot be started here; says why.
    """
    try:
        return worker.call("describe", timeout=max(START_UP, timeout))
    except WorkerFailed as error:
        raise ValueError(f"{worker.task.name} cannot be started: {error}") from error


@contextmanager
def cores_left(num_envs: int) -> Iterator[None]:
    """Let torch use the cores that simulators leave: threads that have to wait for a core cost more than they bring.

    While the policy answers one simulator, the other `num_envs - 1` are at work.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(os.sched_getaffinity(0)) - num_envs + 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def roll_out(
    tasks: list[Task],
    policy: Policy | None,
    settings: RolloutSettings,
    folder: Path,
    *,
    policy_name: str,
    command: str = "",
    policy_settings: dict[str, Any] | None = None,
    checkpoint: str = "",
    make_rollout: Callable[[Task, Policy | None, RolloutSettings, Path, Simulators], Rollout] = Rollout,
    simulators: Simulators | None = None,
) -> dict[str, Any]:
    """Roll a policy out in tasks and write `results.json`; returns what it holds.

    A run that was cut off continues where it stopped. One failed or hung episode is reported and never ends the run.

    Args:
        tasks: Tasks, one after another.
        policy: The policy; None runs each task's scripted expert.
        settings: Episodes, seeds, processes.
        folder: Results folder, made if need be.
        policy_name: What the user called the policy.
        command: The command line, for the report.
        policy_settings: Solver, chunk execution and the like, for the report and for comparing when resuming.
        checkpoint: Fingerprint of the policy's files, for comparing when resuming: a name may stand for a policy that
            was trained anew. Empty where there are none.
        make_rollout: Where the episodes run; here by default, `headrace.sim.cluster` spreads them.
        simulators: Processes that are there already; they are closed at the end.

    Raises:
        FileExistsError: The folder is in use, holds another run, or episodes of another environment.
        SpecMismatch: The policy's action convention differs from an environment's, or it needs other cameras, pictures
            or states.
        FileNotFoundError: A task's files are not here; no task is begun then.
    """
    for task in tasks:
        require_ready(task)
    identity = {
        "policy": policy_name,
        "policy_settings": policy_settings or {},
        "seed": settings.seed,
        "policy_seed": settings.policy_seed,
        "success_rule": settings.success_rule,
    } | ({"checkpoint": checkpoint} if checkpoint else {})
    with simulators or Simulators() as simulators, claim(folder), cores_left(settings.num_envs):
        check_same_run(folder, identity)
        earlier = read_json(folder / RESULTS_FILE)
        spent = {row["task"]: row["seconds"] for row in earlier.get("tasks", [])}
        about = {row["task"]: row["environment"] for row in earlier.get("tasks", []) if "environment" in row}
        results: list[dict[str, Any]] = []
        described: dict[str, Any] = {}
        made = 0
        for task in tasks:
            started = time.perf_counter()
            rollout = make_rollout(task, policy, settings, folder, simulators)
            rows = rollout.run()
            described = rollout.described or described
            seconds = spent.get(task.name, 0.0) + (time.perf_counter() - started if rollout.made else 0.0)
            told = rollout.described.get("about") or about.get(task.name)
            results.append(summarise(task.name, rows, seconds=seconds) | ({"environment": told} if told else {}))
            made += rollout.made
        episodes = sum(r["episodes"] for r in results)
        summary = results[0] if len(results) == 1 else {"task": ",".join(t.name for t in tasks), **total(results)}
        report = {
            **summary,
            "policy": policy_name,
            "policy_settings": policy_settings or {},
            "checkpoint": checkpoint,
            "settings": asdict(settings),
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "versions": versions(),
            "action_names": list(described.get("spec", {}).get("names", [])),
            "state_names": described.get("state_names", []),
            "tasks": results,
            "average_success_rate": sum(r["success_rate"] for r in results) / len(results) if episodes else None,
        }
        if not made:
            report |= {key: earlier[key] for key in OF_THE_EPISODES if key in earlier}
        write_json(folder / RESULTS_FILE, report)
    return report
