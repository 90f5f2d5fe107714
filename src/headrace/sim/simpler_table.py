"""The benchmark's table: four rows and their mean under every reading, with intervals, beside what others published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.sim.run_folder import read_episodes
from headrace.sim.simpler import OFFICIAL_EPISODES, TASKS
from headrace.sim.simpler_peers import PEERS
from headrace.sim.statistics import wilson_interval

READINGS = ("success_at_end", "success_once", "grasped_ever", "consecutive_grasp_ever")
CUT_SHORT = (
    "Episodes stopped at their first success (rule `once`): the official reading, at the last step of an episode of "
    "full length, was not measured."
)


def _value(row: dict[str, Any], reading: str) -> bool:
    """One reading of an episode's row, which keeps the rules' own among `readings`; False where it broke off."""
    if row["error"] is not None:
        return False
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


def table(folder: Path, wanted: Mapping[str, Sequence[int]]) -> str:
    """Markdown for a finished run.

    Args:
        folder: Folder of the run; reads `episodes.jsonl`.
        wanted: Seeds of the run by task; the folder may hold other episodes too.

    Returns:
        A table of the official episodes, one of the random layouts, as far as the run has them, and one of the
        published peers. Intervals are Wilson's at 95 %; the mean is over the tasks, its interval over all episodes as
        one sample.
    """
    seeds = {task: frozenset(of_task) for task, of_task in wanted.items()}
    episodes = [row for row in read_episodes(folder / "episodes.jsonl") if row["seed"] in seeds.get(row["task"], ())]
    official = [row for row in episodes if 0 <= row["seed"] < OFFICIAL_EPISODES]
    others = [row for row in episodes if not 0 <= row["seed"] < OFFICIAL_EPISODES]
    lines = []
    if official:
        lines += ["Official episodes:", "", *_measured(official), ""]
    if others:
        lines += ["Random layouts, which are not the benchmark:", "", *_measured(others), ""]
    return "\n".join([*lines, *_peers()]) + "\n"


def _measured(episodes: list[dict[str, Any]]) -> list[str]:
    whole = all(row["success_rule"] == "at_end" for row in episodes)
    lines = [
        "| task | episodes | success at the last step (official) | success ever | grasped | grasped 5 steps |",
        "|---|---|---|---|---|---|",
    ]
    columns = {reading: rates(episodes, reading) for reading in READINGS}
    for index, (name, successes, count) in enumerate(columns["success_at_end"]):
        first = _with_interval(successes, count) if whole else "not measured"
        others = [_percent(columns[reading][index][1], count) for reading in READINGS[1:]]
        lines.append(f"| {name} | {count} | {first} | {' | '.join(others)} |")
    counts = np.array([[row[1:] for row in columns[reading]] for reading in READINGS])
    if counts.shape[1] > 1:
        means = (100 * counts[..., 0] / counts[..., 1]).mean(axis=1)
        low, high = wilson_interval(int(counts[0, :, 0].sum()), int(counts[0, :, 1].sum()))
        first = f"{means[0]:.1f} % ({100 * low:.1f} to {100 * high:.1f})" if whole else "not measured"
        rest = " | ".join(f"{mean:.1f} %" for mean in means[1:])
        lines.append(f"| mean | {int(counts[0, :, 1].sum())} | {first} | {rest} |")
    return lines if whole else [*lines, "", CUT_SHORT]


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
