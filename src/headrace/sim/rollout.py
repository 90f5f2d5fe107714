"""Rolling a policy out: parallel environment processes, batched policy calls, results written as they happen."""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from headrace.contracts import ActionSpec, Observation, Policy, require_same_spec
from headrace.sim.episode import Episode
from headrace.sim.statistics import wilson_interval
from headrace.sim.success import SuccessRule
from headrace.sim.tasks import Task, require_ready
from headrace.sim.workers import Worker, WorkerFailed, ready

EPISODES_FILE, RESULTS_FILE, RUN_FILE = "episodes.jsonl", "results.json", "run.json"


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How a rollout is made; saved beside its results and compared when it is resumed.

    Attributes:
        episodes: Episodes per task; episode i starts from seed `seed + i`.
        num_envs: Environment processes.
        success_rule: Overrides the task's own rule.
        videos: Videos written per task, from observation frames.
        timeout: Seconds after which a silent environment counts as hung.
    """

    episodes: int = 24
    seed: int = 0
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


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder for one run.

    Raises:
        FileExistsError: Another run holds it now.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another run is writing to {folder}; give this one its own --out") from error
        yield


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """Finished episodes of an earlier run; a last line that was cut off by a kill is dropped from the file."""
    if not path.exists():
        return []
    whole, rows = b"", []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            rows.pop()
            break
        whole += line
    if len(whole) != path.stat().st_size:
        temporary = path.with_suffix(".part")
        temporary.write_bytes(whole)
        temporary.replace(path)
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and force it to the disk."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    temporary.replace(path)


def check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run that was made with other settings.

    Raises:
        FileExistsError: Names what differs.
    """
    path = folder / RUN_FILE
    if path.exists():
        before = json.loads(path.read_text())
        differing = [
            f"{k}: {before.get(k)!r} before, {identity[k]!r} now" for k in identity if before.get(k) != identity[k]
        ]
        if differing:
            raise FileExistsError(
                f"{folder} holds another run ({'; '.join(differing)}). Give a new --out, or remove that folder."
            )
    else:
        write_json(path, identity)


class Rollout:
    """One policy in one task.

    Args:
        task: What to do.
        policy: The policy, or None for the task's scripted expert.
        settings: Number of episodes, seeds, processes.
        folder: Where `episodes.jsonl` and `videos/` go; must be held with `claim`.
    """

    def __init__(self, task: Task, policy: Policy | None, settings: RolloutSettings, folder: Path) -> None:
        require_ready(task)
        self.task, self.policy, self.settings, self.folder = task, policy, settings, folder
        self.rule: SuccessRule = settings.success_rule or task.success_rule
        self.described: dict[str, Any] = {}

    def run(self) -> list[dict[str, Any]]:
        """Run all episodes that the folder does not hold yet; returns every row, in order of the seeds."""
        path = self.folder / EPISODES_FILE
        wanted = range(self.settings.seed, self.settings.seed + self.settings.episodes)
        rows = [r for r in read_episodes(path) if r["task"] == self.task.name and r["seed"] in wanted]
        done = {row["seed"] for row in rows}
        waiting = deque((n, s) for n, s in enumerate(wanted) if s not in done)
        if waiting:
            bar = tqdm(total=len(wanted), initial=len(done), desc=self.task.name, unit="episode", mininterval=0.5)
            for row in self._episodes(waiting):
                append_line(path, row)
                rows.append(row)
                bar.update()
                bar.set_postfix_str(f"success {sum(r['success'] for r in rows)}/{len(rows)}")
            bar.close()
        return sorted(rows, key=lambda row: row["seed"])

    def _episodes(self, waiting: deque[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        count = min(self.settings.num_envs, len(waiting))
        workers = [Worker(self.task, rule=self.rule, keep_frames=True) for _ in range(count)]
        try:
            self.described = workers[0].call("describe", timeout=self.settings.timeout)
            if self.policy is not None:
                require_same_spec(self.policy.spec, ActionSpec.from_dict(self.described["spec"]))
            slots = [_Slot(index, worker) for index, worker in enumerate(workers)]
            busy = [slot for slot in slots if self._begin(slot, waiting)]
            while busy:
                yield from self._advance(busy, waiting)
        finally:
            for worker in workers:
                worker.close()

    def _begin(self, slot: _Slot, waiting: deque[tuple[int, int]]) -> bool:
        if not waiting:
            return False
        slot.number, slot.seed = waiting.popleft()
        slot.milliseconds = []
        if self.policy is None:
            self._send(slot, "expert", slot.seed, self._video(slot))
        else:
            self.policy.reset(slot.index, seed=slot.seed)
            self._send(slot, "start", slot.seed)
        return True

    def _send(self, slot: _Slot, command: str, *arguments: Any) -> None:
        slot.answered, slot.sent_at = command, time.monotonic()
        slot.worker.send(command, *arguments)

    def _video(self, slot: _Slot) -> str | None:
        name = f"{self.task.name.replace('/', '_')}_{slot.seed}.mp4"
        return str(self.folder / "videos" / name) if slot.number < self.settings.videos else None

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
                asking.append((slot, answer))
            elif slot.answered == "run":
                observation, ended = answer
                if ended:
                    self._send(slot, "finish", self._video(slot))
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
            for slot in slots:
                yield from self._failed(slot, f"the policy failed: {type(error).__name__}: {error}", busy, waiting)
            return
        for slot, actions in zip(slots, chunk.actions, strict=True):
            slot.milliseconds.append(round(chunk.milliseconds, 3))
            self._send(slot, "run", np.asarray(actions))

    def _failed(
        self, slot: _Slot, reason: str, busy: list[_Slot], waiting: deque[tuple[int, int]]
    ) -> Iterator[dict[str, Any]]:
        yield self._row(slot, Episode(seed=slot.seed, instruction=self.task.instruction, error=reason))
        slot.worker.restart()
        if not self._begin(slot, waiting):
            busy.remove(slot)

    def _row(self, slot: _Slot, episode: Episode) -> dict[str, Any]:
        reading, video = episode.success, self._video(slot)
        written = video is not None and Path(video).exists()
        return {
            "task": self.task.name,
            "episode": slot.number,
            "seed": slot.seed,
            "success": episode.error is None and reading.under(self.rule),
            "success_rule": self.rule,
            "success_once": reading.once,
            "success_at_end": reading.at_end,
            "first_success_step": reading.first_step,
            "steps": len(episode.flags),
            "seconds": round(episode.seconds, 3),
            "error": episode.error,
            "readings": {key: round(value, 5) for key, value in episode.readings.items()},
            "policy_ms": slot.milliseconds,
            "video": os.path.relpath(video, self.folder) if written and video else None,
            "slot": slot.index,
            "instruction": episode.instruction,
            "actions": [[round(float(v), 5) for v in action] for action in episode.actions],
            "states": [[round(float(v), 5) for v in state] for state in episode.states],
        }


def summarise(task: str, rows: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """One task's results from its episode rows (see the interface in docs/rollout.md)."""
    successes, steps = sum(row["success"] for row in rows), sum(row["steps"] for row in rows)
    low, high = wilson_interval(successes, len(rows))
    chunks = [ms for row in rows for ms in row["policy_ms"]]
    spent = sum(row["seconds"] for row in rows)
    return {
        "task": task,
        "episodes": len(rows),
        "successes": successes,
        "success_rate": successes / max(len(rows), 1),
        "ci95": [low, high],
        "success_rule": rows[0]["success_rule"] if rows else "",
        "successes_once": sum(row["success_once"] for row in rows),
        "successes_at_end": sum(row["success_at_end"] for row in rows),
        "errors": sum(row["error"] is not None for row in rows),
        "seconds": round(seconds, 3),
        "env_steps": steps,
        "env_steps_per_second": steps / spent if spent else 0.0,
        "policy_ms_per_chunk": float(np.mean(chunks)) if chunks else None,
        "policy_ms_per_chunk_p95": float(np.percentile(chunks, 95)) if chunks else None,
        "policy_ms_per_action": sum(chunks) / steps if chunks and steps else None,
        "seeds": [row["seed"] for row in rows],
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in (
        "headrace",
        "torch",
        "mani-skill",
        "sapien",
        "gymnasium",
        "timm",
        "transformers",
        "lerobot",
        "numpy",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def roll_out(
    tasks: list[Task],
    policy: Policy | None,
    settings: RolloutSettings,
    folder: Path,
    *,
    policy_name: str,
    command: str = "",
    policy_settings: dict[str, Any] | None = None,
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

    Raises:
        FileExistsError: The folder is in use, or holds another run.
        SpecMismatch: The policy's action convention differs from an environment's.
        FileNotFoundError: A task's files are not here.
    """
    identity = {
        "policy": policy_name,
        "policy_settings": policy_settings or {},
        "seed": settings.seed,
        "success_rule": settings.success_rule,
    }
    with claim(folder):
        check_same_run(folder, identity)
        results, described = [], {}
        for task in tasks:
            started = time.perf_counter()
            rollout = Rollout(task, policy, settings, folder)
            rows = rollout.run()
            described = rollout.described or described
            results.append(summarise(task.name, rows, seconds=time.perf_counter() - started))
        episodes = sum(r["episodes"] for r in results)
        summary = results[0] if len(results) == 1 else {"task": ",".join(t.name for t in tasks), **total(results)}
        report = {
            **summary,
            "policy": policy_name,
            "policy_settings": policy_settings or {},
            "settings": asdict(settings),
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "versions": versions(),
            "action_names": described.get("spec", {}).get("names", []),
            "state_names": described.get("state_names", []),
            "tasks": results,
            "average_success_rate": sum(r["success_rate"] for r in results) / len(results) if episodes else None,
        }
        write_json(folder / RESULTS_FILE, report)
    return report


def total(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The same figures over several tasks."""
    episodes, successes = sum(r["episodes"] for r in results), sum(r["successes"] for r in results)
    steps = sum(r["env_steps"] for r in results)
    spent = sum(r["env_steps"] / r["env_steps_per_second"] for r in results if r["env_steps_per_second"])
    means = [r["policy_ms_per_chunk"] for r in results if r["policy_ms_per_chunk"] is not None]
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / max(episodes, 1),
        "ci95": list(wilson_interval(successes, episodes)),
        "errors": sum(r["errors"] for r in results),
        "seconds": sum(r["seconds"] for r in results),
        "env_steps": steps,
        "env_steps_per_second": steps / spent if spent else 0.0,
        "policy_ms_per_chunk": sum(means) / len(means) if means else None,
        "seeds": sorted({seed for r in results for seed in r["seeds"]}),
    }


def hardware() -> str:
    """Processor, cores and accelerator in words."""
    import platform

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {os.cpu_count()} cores, {device}"
