"""What `make demo` runs: the shipped policy in ManiSkill, a few episodes a task, and a report to look at."""

import shutil
import sys
from pathlib import Path

from headrace.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "demo"
TASKS = "PushCube-v1,PickCube-v1"  # each costs half a minute of two cores; the policy also knows StackCube-v1

if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)  # every demo is made anew
    policy = str(ROOT / "checkpoints" / "demo")
    status = main(
        ["rollout", policy, "--task", TASKS, "--episodes", "5", "--num-envs", "2", "--videos", "3", "--out", str(OUT)]
    )
    print(f"open {OUT / 'report.html'} in a browser")
    sys.exit(status)
