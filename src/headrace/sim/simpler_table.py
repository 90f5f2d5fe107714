"""The benchmark's table: four rows and their mean under every reading, with intervals, beside what others published."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from headrace.sim.simpler import TASKS
from headrace.sim.simpler_peers import PEERS
from headrace.sim.statistics import wilson_interval

READINGS = ("success_at_end", "success_once", "grasped_ever", "consecutive_grasp_ever")


def _value(row: dict[str, Any], reading: str) -> bool:
    """One reading of an episode's row, which keeps the rules' own among `readings`."""
    return bool(row[reading] if reading in row else row["readings"].get(reading, 0.0))


def rates(episodes: list[dict[str, Any]], reading: str) -> list[tuple[str, int, int]]:
    """Task, episodes that fulfil `reading`, episodes; in SIMPLER's order, variants after the tasks as published."""
    names = {row["task"]: None for row in episodes}
    order = {name: index for index, name in enumerate(TASKS)}
    rows = []
    for name in sorted(names, key=lambda name: (name.partition("@")[2], order[name.split("@")[0]])):
        of_task = [row for row in episodes if row["task"] == name]
        rows.append((name, sum(_value(row, reading) for row in of_task), len(of_task)))
    return rows


def table(folder: Path) -> str:
    """Markdown for a finished run.

    Args:
        folder: Folder of the run; reads `episodes.jsonl`.

    Returns:
        A table of the run and one of the published peers. Intervals are Wilson's at 95 %; the mean is over the tasks,
        its interval over all episodes as one sample.
    """
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    lines = [
        "| task | episodes | success at the last step (official) | success ever | grasped | grasped 5 steps |",
        "|---|---|---|---|---|---|",
    ]
    columns = {reading: rates(episodes, reading) for reading in READINGS}
    for index, (name, successes, count) in enumerate(columns["success_at_end"]):
        others = [_percent(columns[reading][index][1], count) for reading in READINGS[1:]]
        lines.append(f"| {name} | {count} | {_with_interval(successes, count)} | {' | '.join(others)} |")
    counts = np.array([[row[1:] for row in columns[reading]] for reading in READINGS])
    if counts.shape[1] > 1:
        means = (100 * counts[..., 0] / counts[..., 1]).mean(axis=1)
        low, high = wilson_interval(int(counts[0, :, 0].sum()), int(counts[0, :, 1].sum()))
        first = f"{means[0]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        rest = " | ".join(f"{mean:.1f} %" for mean in means[1:])
        lines.append(f"| mean | {int(counts[0, :, 1].sum())} | {first} | {rest} |")
    return "\n".join([*lines, "", *_peers()]) + "\n"


def _percent(successes: int, count: int) -> str:
    return f"{100 * successes / count:.1f} %"


def _with_interval(successes: int, count: int) -> str:
    low, high = wilson_interval(successes, count)
    return f"{_percent(successes, count)} ({100 * low:.1f} to {100 * high:.1f})"


def _peers() -> list[str]:
    lines = [
        "Published by others, on the original environment (not measured here; regimes and readings differ):",
        "",
        "| policy | regime | spoon | carrot | stack | eggplant | mean | success | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for peer in PEERS:
        cells = ["-" if rate is None else f"{rate:.1f}" for rate in peer.rates]
        cells = [peer.policy, peer.regime, *cells, f"{peer.mean:.1f}", peer.success, peer.source]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
