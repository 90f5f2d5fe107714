"""The latent action recipe with and without the optical-flow term, several seeds, as a table with intervals.

    python benchmarks/latent_actions.py --data data/PickCube-v1 data/PushCube-v1 data/StackCube-v1 --out runs/lam

Runs that have a report are not run again. Intervals are Student's t over seeds, 95 %; the last row is the paired
difference. About 5 minutes of one core per run at the default size.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).parents[1]
COLUMNS = ("used", "perplexity", "probe", "probe_vectors", "probe_random", "flow_error", "agreement", "future_margin")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs."""

    data: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    flow: float = 0.1
    window: tuple[float, float, float] = (0.214, 0.339, 0.571)  # of ManiSkill's base camera, where the arm works


def report_of(settings: Settings, seed: int, flow: float) -> dict[str, float]:
    """The report of one run, which is trained if it is not there."""
    out = settings.out / f"flow{flow:g}-seed{seed}"
    if not (out / "report.json").is_file():
        recipe = [sys.executable, str(ROOT / "recipes" / "latent_actions.py"), "--data", *settings.data]
        options = {"steps": settings.steps, "flow": flow, "seed": seed, "out": out}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        flags += ["--window", *map(str, settings.window)]
        subprocess.run([*recipe, *flags, "--resume"], check=True)
    return json.loads((out / "report.json").read_text())


def cell(values: np.ndarray) -> str:
    """Mean and half width of the 95 % interval."""
    if len(values) < 2:
        return f"{values.mean():.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} +- {half:.3f}"


def main(settings: Settings) -> None:
    rows = {}
    for name, flow in (("without", 0.0), ("with", settings.flow)):
        reports = [report_of(settings, seed, flow) for seed in settings.seeds]
        rows[name] = np.array([[report[column] for column in COLUMNS] for report in reports])
    rows["difference"] = rows["with"] - rows["without"]
    print("| flow term | " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(cell(column) for column in values.T) + " |")


if __name__ == "__main__":
    main(tyro.cli(Settings))
