"""Figures of a run from its episodes, and what they were measured on."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from headrace.sim.statistics import wilson_interval


def summarise(task: str, rows: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """One task's results from its episode rows (see the interface in docs/rollout.md)."""
    successes, steps = sum(row["success"] for row in rows), sum(row["steps"] for row in rows)
    whole = [row for row in rows if row["error"] is None]  # one that broke off is no success under any rule
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
        "successes_once": sum(row["success_once"] for row in whole),
        "successes_at_end": sum(row["success_at_end"] for row in whole),
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
