"""Success and latency against network evaluations: equal Euler steps, the BOSS grid, the straightened network.

    python recipes/boss_straighten.py --policy checkpoints/demo --data DEMONSTRATIONS... --out runs/boss
    python benchmarks/steps_against_success.py --boss runs/boss --out runs/steps --tasks PushCube-v1
    python benchmarks/steps_against_success.py --boss runs/boss --out runs/steps --report-only
    python benchmarks/steps_against_success.py --boss runs/boss --out runs/steps --latency 30

Every cell keeps its own folder below OUT/TASK; the same command goes on where it was cut off, and `--minutes` ends it
between two episodes. All cells see the same seeds, so scenes and noise are the same and the differences are paired.
Writes OUT/cells.json, OUT/table.md and OUT/steps_against_success.svg.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from headrace.contracts import ActionChunk, ActionSpec, Observation, Policy
from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import StepGrid
from headrace.robot.chunking import RecedingHorizon
from headrace.robot.policy import FlowPolicy, load_policy
from headrace.sim.results import hardware
from headrace.sim.rollout import EPISODES_FILE, RolloutSettings, roll_out
from headrace.sim.run_folder import write_json
from headrace.sim.statistics import wilson_interval
from headrace.sim.svg import COLORS
from headrace.sim.tasks import find_tasks

ALL = ("uniform:10",) + tuple(f"{kind}:{k}" for k in (5, 4, 3, 2, 1) for kind in ("uniform", "bellman", "straightened"))
BASELINE = "uniform:10"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to roll out.

    Attributes:
        boss: Run folder of `recipes/boss_straighten.py`: `grids/kN` and `kN/model`.
        out: Results folder.
        policy: The trained policy.
        tasks: Task names.
        cells: `uniform:N`, `bellman:N` or `straightened:N`; a Bellman grid of one step is left out:
            it is the uniform one.
        episodes: Per cell, from seed 0.
        minutes: Time after which no episode is begun; 0 for no limit.
        latency: Repeats of the latency measurement; does only that: one thread, one observation, cells taking turns.
        report_only: Only write table and plot from what is there.
    """

    boss: Path
    out: Path
    policy: str = "checkpoints/demo"
    tasks: tuple[str, ...] = ("PushCube-v1",)
    cells: tuple[str, ...] = ALL
    episodes: int = 200
    minutes: float = 0.0
    latency: int = 0
    report_only: bool = False


class Cell(NamedTuple):
    """One sampler of the policy."""

    kind: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """From KIND:STEPS."""
        kind, _, steps = text.partition(":")
        if kind not in ("uniform", "bellman", "straightened") or not steps.isdigit() or int(steps) < 1:
            raise ValueError(f"a cell is uniform:N, bellman:N or straightened:N with N at least 1, got {text!r}")
        return cls(kind, int(steps))

    def load(self, settings: Settings) -> FlowPolicy:
        """The policy that samples this way.

        Raises:
            ValueError: A policy without a flow.
        """
        if self.kind == "straightened":
            policy = load_policy(str(settings.boss / f"k{self.steps}" / "model"))
        else:
            grid = StepGrid.load(settings.boss / "grids" / f"k{self.steps}") if self.kind == "bellman" else None
            solver = grid.settings if grid else SolverSettings(steps=self.steps)
            policy = load_policy(settings.policy, solver=solver)
        if not isinstance(policy, FlowPolicy):
            raise ValueError(f"{settings.policy} follows no flow, so it has no step count")
        return policy


class OutOfTime(Exception):
    """The time is spent; what is done is on disk."""


class Until:
    """A policy that refuses to begin an episode once the clock has passed `deadline` (of `time.monotonic`)."""

    def __init__(self, policy: Policy, deadline: float) -> None:
        self.policy, self.deadline = policy, deadline

    @property
    def spec(self) -> ActionSpec:
        """As the policy's."""
        return self.policy.spec

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode, or raise `OutOfTime`."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        self.policy.reset(slot, seed=seed)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """As the policy."""
        return self.policy.act(observations, slots)


def cells_of(settings: Settings) -> list[Cell]:
    """The cells in order, without the Bellman grid of one step."""
    return [cell for cell in map(Cell.parse, settings.cells) if cell != ("bellman", 1)]


def run_cells(settings: Settings) -> None:
    """Roll out every cell that lacks episodes; tables are written after each."""
    deadline = time.monotonic() + (settings.minutes * 60 or float("inf"))
    for task in settings.tasks:
        for cell in cells_of(settings):
            folder = settings.out / task / f"{cell.kind}-{cell.steps}"
            if len(rows_of(folder)) >= settings.episodes:
                continue
            loaded = cell.load(settings)
            policy = Until(RecedingHorizon(loaded, max(1, loaded.horizon // 2)), deadline)
            roll_out(
                find_tasks(task),
                policy,
                RolloutSettings(episodes=settings.episodes, videos=0),
                folder,
                policy_name=settings.policy,
                policy_settings={"cell": f"{cell.kind}:{cell.steps}", "solver": loaded.solver.to_json()},
            )
            write_report(settings)


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Episode rows by seed; only reads, because another process may be writing: half a last line is passed over."""
    path = folder / EPISODES_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {row["seed"]: row for row in rows}


def measured(settings: Settings) -> list[dict[str, Any]]:
    """One row per task and cell that has episodes, with the paired difference from the baseline."""
    found = []
    for task in settings.tasks:
        base = rows_of(settings.out / task / BASELINE.replace(":", "-"))
        for cell in cells_of(settings):
            rows = rows_of(settings.out / task / f"{cell.kind}-{cell.steps}")
            if not rows:
                continue
            succeeded = sum(row["success"] for row in rows.values())
            both = rows.keys() & base.keys()
            found.append({
                "task": task, "kind": cell.kind, "steps": cell.steps, "episodes": len(rows), "successes": succeeded,
                "ci95": list(wilson_interval(succeeded, len(rows))),
                "errors": sum(row["error"] is not None for row in rows.values()),
                "ms_per_chunk": statistics.median([ms for row in rows.values() for ms in row["policy_ms"]] or [0.0]),
                "paired_with_baseline": len(both),
                "lost": sum(base[s]["success"] and not rows[s]["success"] for s in both),
                "gained": sum(rows[s]["success"] and not base[s]["success"] for s in both),
            })  # fmt: skip
    return found


def write_report(settings: Settings) -> None:
    """cells.json, table.md and the plot from the episodes on disk."""
    cells = measured(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    measured_on = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d")}
    write_json(settings.out / "cells.json", {**measured_on, "cells": cells})
    lines = ["| task | sampler | evaluations | successes | 95 % interval | gained and lost seeds | ms per chunk |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in cells:
        low, high = (100 * end for end in row["ci95"])
        lines.append(f"| {row['task']} | {row['kind']} | {row['steps']} | {row['successes']}/{row['episodes']} | "
                     f"{low:.1f} to {high:.1f} % | +{row['gained']} -{row['lost']} | "
                     f"{row['ms_per_chunk']:.0f} |")  # fmt: skip
    (settings.out / "table.md").write_text("\n".join(lines) + "\n")
    (settings.out / "steps_against_success.svg").write_text(plot(cells))
    print("\n".join(lines), flush=True)


def plot(cells: list[dict[str, Any]]) -> str:
    """Two panels a task: success with its interval, and latency, over the number of evaluations."""
    tasks = list(dict.fromkeys(row["task"] for row in cells))
    panels = []
    for index, task in enumerate(tasks):
        rows = [row for row in cells if row["task"] == task]
        slowest = max(row["ms_per_chunk"] for row in rows) * 1.1 or 1.0
        panels.append(panel(rows, 0, 230 * index, f"{task}: success rate", 1.0,
                            lambda r: (r["successes"] / r["episodes"], *r["ci95"])))  # fmt: skip
        panels.append(
            panel(rows, 400, 230 * index, f"{task}: ms per chunk", slowest, lambda r: (r["ms_per_chunk"],) * 3)
        )
    height = 230 * max(1, len(tasks)) + 24
    legend = "".join(
        f'<circle cx="{50 + 130 * i}" cy="{height - 12}" r="4" fill="{COLORS[i]}"/>'
        f'<text x="{60 + 130 * i}" y="{height - 8}">{kind}</text>'
        for i, kind in enumerate(("uniform", "bellman", "straightened"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="800" height="{height}" fill="white"/>{"".join(panels)}{legend}</svg>\n'
    )


def panel(
    rows: list[dict[str, Any]], x: int, y: int, title: str, top: float, value: Callable[[dict], tuple[float, ...]]
) -> str:
    """One plot: value with low and high end over evaluations 1 to 10, one line per kind of sampler."""
    last = max(row["steps"] for row in rows)

    def at(steps: float, level: float) -> tuple[float, float]:
        return x + 50 + 330 * (steps - 1) / max(1, last - 1), y + 200 - 170 * level / top

    parts = [f'<text x="{x + 50}" y="{y + 18}" font-weight="bold">{title}</text>']
    for k in range(5):
        level = at(1, top * k / 4)[1]
        parts.append(f'<line x1="{x + 44}" x2="{x + 384}" y1="{level:.1f}" y2="{level:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x + 40}" y="{level + 4:.1f}" text-anchor="end">{top * k / 4:.3g}</text>')
    for steps in sorted({row["steps"] for row in rows}):
        parts.append(f'<text x="{at(steps, 0)[0]:.1f}" y="{y + 215}" text-anchor="middle">{steps}</text>')
    for index, kind in enumerate(("uniform", "bellman", "straightened")):
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["steps"])
        places = [[at(row["steps"] + 0.06 * (index - 1), v) for v in value(row)] for row in mine]
        line = " ".join(f"{p[0][0]:.1f},{p[0][1]:.1f}" for p in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[index]}"/>')
        for (cx, cy), (_, low), (_, high) in places:
            parts.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{COLORS[index]}"/>')
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{COLORS[index]}"/>')
    return "".join(parts)


def measure_latency(settings: Settings) -> None:
    """Median time of one chunk from one observation [ms], one thread, cells taking turns; prints and writes it."""
    torch.set_num_threads(1)
    cells = cells_of(settings)
    policies = [cell.load(settings) for cell in cells]
    config, draw = policies[0].model.config, np.random.default_rng(0)
    side = config.camera_size
    seen = Observation(
        images={camera: draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for camera in config.cameras},
        state=np.zeros(len(config.state_names), np.float32),
    )
    spent: list[list[float]] = [[] for _ in cells]
    for repeat in range(settings.latency + 1):  # the first turn warms up
        for times, policy in zip(spent, policies, strict=True):
            policy.reset(0, seed=repeat)
            chunk = policy.act([seen], [0])
            if repeat:
                times.append(chunk.milliseconds)
    found = {f"{c.kind}:{c.steps}": round(statistics.median(t), 2) for c, t in zip(cells, spent, strict=True)}
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "latency.json", {"hardware": hardware(), "repeats": settings.latency, "ms": found})
    print(json.dumps(found, indent=1))


def main(settings: Settings) -> None:
    """Roll out, or measure the latency, or only report."""
    if settings.latency:
        measure_latency(settings)
        return
    if not settings.report_only:
        try:
            run_cells(settings)
        except OutOfTime:
            print(f"{settings.minutes} minutes are over; the same command goes on from here", flush=True)
    write_report(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
