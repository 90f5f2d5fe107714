"""The latent action recipe with and without the optical-flow term, several seeds, as a table with intervals.

    python benchmarks/latent_actions.py --data data/PickCube-v1 data/PushCube-v1 data/StackCube-v1 --out runs/lam

Runs that have a report are not run again; a report of other settings is refused. Intervals are Student's t over seeds,
95 %; the last row is the paired difference. `--flow 0` leaves only the row without the term. About 5 minutes of one
core per run at the default size. docs/results/latent_actions.md, four frames apart, with three seeds and the flow term:

    python benchmarks/latent_actions.py --data data/PushCube-v1 data/PickCube-v1 --out runs/lam4 --stride 4 --width 96 \
        --steps 800 --batch-size 16 --lr 2e-3
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from headrace.training.same_settings import require_same_settings

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "used", "perplexity", "probe", "probe_vectors", "probe_random", "probe_untrained", "own", "swapped", "copied",
    "flow_error", "flow_error_copied", "agreement", "future_margin",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs; what is not here are the recipe's own settings."""

    data: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    batch_size: int = 32
    lr: float = 1e-3
    stride: int = 1  # frames of the videos between neighbouring frames of a clip
    width: int = 128
    tokens: int = 4
    flow: float = 0.1
    window: tuple[float, float, float] = (0.214, 0.339, 0.571)  # of ManiSkill's base camera, where the arm works


def report_of(settings: Settings, seed: int, flow: float) -> dict[str, float]:
    """The report of one run, which is trained if it is not there.

    Raises:
        ValueError: It is there, of other settings.
    """
    out = settings.out / f"flow{flow:g}-seed{seed}"
    names = ("steps", "batch_size", "lr", "stride", "width", "tokens")
    options = {name: getattr(settings, name) for name in names} | {"flow": flow, "seed": seed}
    if not (out / "report.json").is_file():
        recipe = [sys.executable, str(ROOT / "recipes" / "latent_actions.py"), "--data", *settings.data]
        pairs = {**options, "out": out}
        flags = [str(part) for name, value in pairs.items() for part in (f"--{name.replace('_', '-')}", value)]
        flags += ["--window", *map(str, settings.window)]
        subprocess.run([*recipe, *flags, "--resume"], check=True)
    report = json.loads((out / "report.json").read_text())
    wanted = {**options, "data": list(settings.data), "window": list(settings.window)}
    require_same_settings(out, report["recipe"], wanted)
    return report


def cell(values: np.ndarray) -> str:
    """Mean and half width of the 95 % interval."""
    if len(values) < 2:
        return f"{values.mean():.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} +- {half:.3f}"


def main(settings: Settings) -> None:
    rows = {}
    arms = {"without": 0.0, "with": settings.flow} if settings.flow else {"without": 0.0}
    for name, flow in arms.items():
        reports = [report_of(settings, seed, flow) for seed in settings.seeds]
        rows[name] = np.array([[report[column] for column in COLUMNS] for report in reports])
    if "with" in rows:
        rows["difference"] = rows["with"] - rows["without"]
    print("| flow term | " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(cell(column) for column in values.T) + " |")


if __name__ == "__main__":
    main(tyro.cli(Settings))
