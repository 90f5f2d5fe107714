"""How well simulated success predicts success on the robot: mean maximum rank violation (MMRV) and Pearson's r.

Source: Li et al. 2024, arXiv 2405.05941, sec. IV; simpler-env/SimplerEnv simpler_env/utils/metrics.py. The order of the
arguments matters for MMRV: the gap that weighs a violation is the real one, so `real` comes second, as in the
signature there (its README shows the other order).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Rates = Mapping[str, Mapping[str, float]]
"""Success rates in 0..1: task name to policy name to rate."""


class Agreement(NamedTuple):
    """Agreement on one task over its policies.

    Attributes:
        task: Name of the task.
        policies: The policies that both sides measured, sorted.
        mmrv: Mean maximum rank violation, 0 (the order is right) to 1.
        pearson: Correlation, -1 to 1; nan where one side is constant and the other is not.
    """

    task: str
    policies: tuple[str, ...]
    mmrv: float
    pearson: float


def mean_maximum_rank_violation(simulated: Sequence[float], real: Sequence[float]) -> float:
    r"""MMRV of simulated against real success rates, one number per policy.

    :math:`\frac1N \sum_i \max_j |R_i - R_j|\,[(S_i > S_j) \ne (R_i > R_j)]`: for each policy, the largest real gap to
    another policy that the simulation puts in the wrong order. Lower is better.

    Raises:
        ValueError: Different lengths, no policy, or a rate outside 0..1.
    """
    s, r = _rates(simulated, real)
    wrong = (s[:, None] > s[None]) != (r[:, None] > r[None])
    return float((np.abs(r[:, None] - r[None]) * wrong).max(axis=1).mean())


def pearson(simulated: Sequence[float], real: Sequence[float]) -> float:
    """Pearson's r of simulated against real success rates, one number per policy.

    1 where both sides deviate from their mean in the same way, constant or not (the official code's rule); nan, not 0,
    where only one side is constant, because a correlation is then undefined.

    Raises:
        ValueError: Different lengths, no policy, or a rate outside 0..1.
    """
    s, r = (values - values.mean() for values in _rates(simulated, real))
    if np.allclose(s, r, rtol=0, atol=1e-12):
        return 1.0
    size = float(np.sqrt((s**2).sum() * (r**2).sum()))
    return float((s * r).sum() / size) if size > 0 else float("nan")


def _rates(simulated: Sequence[float], real: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    s, r = np.asarray(simulated, dtype=float), np.asarray(real, dtype=float)
    if s.shape != r.shape or s.ndim != 1 or not s.size:
        raise ValueError(f"one simulated and one real rate per policy wanted, got shapes {s.shape} and {r.shape}")
    if not ((s >= 0) & (s <= 1) & (r >= 0) & (r <= 1)).all():
        raise ValueError("success rates must lie in 0..1; divide percentages by 100")
    return s, r


def compare(simulated: Rates, real: Rates) -> list[Agreement]:
    """Agreement per task, over the tasks and policies that both sides have.

    Raises:
        ValueError: No task has two policies in common.
    """
    rows = []
    for task in sorted(set(simulated) & set(real)):
        shared = sorted(set(simulated[task]) & set(real[task]))
        if len(shared) > 1:
            s, r = [simulated[task][p] for p in shared], [real[task][p] for p in shared]
            rows.append(Agreement(task, tuple(shared), mean_maximum_rank_violation(s, r), pearson(s, r)))
    if not rows:
        raise ValueError(
            f"no task has two policies on both sides; names must match: simulated {sorted(simulated)}, "
            f"real {sorted(real)}"
        )
    return rows


def read_rates(path: Path) -> dict[str, dict[str, float]]:
    """Read success rates: JSON `{task: {policy: rate}}`, or the results.json of `headrace rollout`, one policy's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file has another form; says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of success rates at {path}; `headrace rollout` writes OUT/results.json")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: wanted an object {{task: {{policy: rate}}}}, got {type(data).__name__}")
    if isinstance(data.get("tasks"), list) and "policy" in data:
        return {row["task"]: {data["policy"]: row["success_rate"]} for row in data["tasks"]}
    for task, row in data.items():
        if not isinstance(row, dict) or not all(isinstance(rate, int | float) for rate in row.values()):
            raise ValueError(f"{path}: {task!r} must map policy names to numbers in 0..1, got {str(row)[:60]!r}")
    return data


def merge_rates(files: Sequence[Rates]) -> dict[str, dict[str, float]]:
    """Rates of several files as one.

    Raises:
        ValueError: Two files give the same policy on the same task.
    """
    merged: dict[str, dict[str, float]] = {}
    for rates in files:
        for task, row in rates.items():
            twice = merged.setdefault(task, {}).keys() & row.keys()
            if twice:
                raise ValueError(f"{task}: {', '.join(sorted(twice))} is given twice; leave one of the files out")
            merged[task] |= row
    return merged


def variant_aggregate(rates: Mapping[str, float]) -> float:
    """SIMPLER's variant aggregation: the plain mean over the environments of one task, keyed by variant.

    The paper averages the base scene with its backgrounds, lightings, distractor sets and table textures, and leaves
    camera poses and robot textures out: keys starting with `camera` or `robot` are refused, so that nobody averages
    them in unawares. Defined for the Google robot only; the Bridge tasks have no variants.

    Raises:
        ValueError: No variant, no `base`, or one that the paper leaves out.
    """
    left_out = [name for name in rates if name.startswith(("camera", "robot"))]
    if "base" not in rates or left_out:
        raise ValueError(f"variant aggregation needs 'base' and no camera or robot variants, got {sorted(rates)}")
    return float(np.mean(list(rates.values())))
