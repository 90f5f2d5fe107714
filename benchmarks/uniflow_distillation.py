"""Adaptive layer-wise distillation against plain last-layer distillation and none, on one budget, several seeds.

Runs recipes/uniflow.py for each weighting and seed and gathers the figures: accuracy of the linear probe on the adapted
encoder and on its teacher, cosine distance of the two after each block, and one-step PSNR on held-out pictures. The
first run of a seed trains the teacher, the others take it from there.

    python benchmarks/uniflow_distillation.py --out runs/distillation --steps 300
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from headrace.training.same_settings import require_same_settings

RECIPE = Path(__file__).parents[1] / "recipes" / "uniflow.py"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and on which budget."""

    out: Path
    weightings: tuple[str, ...] = ("adaptive", "last")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    batch: int = 8
    teachers: Path | None = None  # `--out` of an earlier comparison whose teachers are taken, one per seed
    encoder_factor: float = (
        0.05  # the encoder's learning rate as a share of the other's: small keeps it near the teacher
    )


def options_of(options: Options, weighting: str) -> dict[str, Any]:
    """What the figures of a run depend on beside its weighting and seed, as JSON gives it back."""
    first = options.weightings[0]
    own = "trained in it" if weighting == first else f"of {first}"
    return {
        "steps": options.steps,
        "batch": options.batch,
        "encoder_factor": options.encoder_factor,
        "teacher": own if options.teachers is None else f"{options.teachers}, of {first}",
    }


def run(options: Options, weighting: str, seed: int) -> dict[str, float]:
    """Figures of one run; a finished one is read again, and refused if it was run with other options."""
    folder = options.out / f"{weighting}_{seed}"
    kept, own = folder / "figures.json", options_of(options, weighting)
    if kept.is_file():
        found = json.loads(kept.read_text())
        require_same_settings(kept, found.get("options", {}), own)
        return found["figures"]
    chosen = ["--distill-weight", "0"] if weighting == "none" else ["--weighting", weighting]
    command = [sys.executable, str(RECIPE), "--out", str(folder), "--seed", str(seed), "--steps", str(options.steps)]
    command += ["--batch", str(options.batch), "--encoder-factor", str(options.encoder_factor), *chosen]
    if weighting != options.weightings[0] or options.teachers is not None:
        origin = options.teachers or options.out
        command += ["--teacher", str(origin / f"{options.weightings[0]}_{seed}" / "teacher")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    kept.write_text(json.dumps({"options": own, "figures": figures}))
    return figures


def main(options: Options) -> None:
    """Print mean and standard deviation over seeds of every figure, by weighting, and the runs themselves."""
    runs = {w: [run(options, w, seed) for seed in options.seeds] for w in options.weightings}
    table = {
        weighting: {
            name: [round(statistics.mean(column), 4), round(statistics.stdev(column) if len(column) > 1 else 0.0, 4)]
            for name in rows[0]
            for column in ([row[name] for row in rows],)
        }
        for weighting, rows in runs.items()
    }
    print(json.dumps({"mean_and_deviation": table, "runs": runs, "steps": options.steps}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
