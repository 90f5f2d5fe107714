"""SIMPLER steps per second against a bare ManiSkill loop, and the oracles' table.

    MS_ASSET_DIR=... python benchmarks/simpler_speed.py [--render] [--oracle]

The bare loop is the stock class stepped directly. Bursts of both alternate, so that a busy machine slows them alike;
reported is the ratio of CPU times, and its spread over the rounds.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from headrace.sim.simpler import TASKS
from headrace.sim.simpler_oracle import run_oracle
from headrace.sim.simpler_scene import SimplerScene

STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


def burst(step, count: int) -> tuple[float, float]:
    """CPU and wall-clock seconds of `count` steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        step(STILL)
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(task: str, render: bool, rounds: int, steps: int) -> dict[str, float | str]:
    """Our environment against the bare stock class."""
    ours, bare = SimplerScene(task, render=render), SimplerScene(task, render=render, port="stock").simulation
    bare.reset(seed=0, options={"episode_id": torch.tensor([0])})
    ratios, cpus, walls = [], [], []
    for round_ in range(rounds + 1):
        ours.reset(0)
        mine, wall = burst(ours.step, steps)
        theirs, _ = burst(bare.step, steps)
        if round_:  # the first one warms up
            ratios.append(mine / theirs)
            cpus.append(mine / steps)
            walls.append(wall / steps)
    ours.close()
    bare.close()
    return {
        "task": task,
        "cpu_ms_per_step": round(1e3 * float(np.median(cpus)), 2),
        "steps_per_second": round(1 / float(np.median(walls)), 1),
        "cpu_ratio_to_bare": round(float(np.median(ratios)), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def oracle(task: str, port: str, layouts: str, episodes: int) -> dict[str, int | str]:
    """How many episodes the scripted expert solves."""
    scene = SimplerScene(task, render=False, port=port, layouts=layouts)
    done = [run_oracle(scene, seed) for seed in range(episodes)]
    scene.close()
    return {
        "task": task,
        "port": port,
        "layouts": layouts,
        "episodes": episodes,
        "last": sum(o.last for o in done),
        "ever": sum(o.ever for o in done),
        "grasped": sum(o.grasped for o in done),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for task in args.tasks.split(","):
        if args.oracle:
            for port, layouts, episodes in (
                ("restored", "official", 24),
                ("restored", "random", 100),
                ("stock", "official", 24),
            ):
                rows.append(oracle(task, port, layouts, episodes))
                print(json.dumps(rows[-1]), flush=True)
        else:
            rows.append(compare(task, args.render, args.rounds, args.steps))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "load_average": os.getloadavg()[0]}, indent=1))


if __name__ == "__main__":
    main()
