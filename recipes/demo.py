"""What `make demo` runs: the shipped policy in ManiSkill, a few episodes a task, and a report to look at."""

import shutil
import sys
from pathlib import Path

import tyro

from headrace.cli.main import EXIT_USAGE, main
from headrace.sim.run_folder import LOCK_FILE, claim

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "demo"
TASKS = "PushCube-v1,PickCube-v1"  # each costs half a minute of two cores; the policy also knows StackCube-v1


def empty(folder: Path) -> None:
    """Remove what an earlier demo left, but for the lock, which says whether one is at work.

    Raises:
        FileExistsError: Another demo is writing there.
    """
    with claim(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()


def demo(*, out: Path = OUT, episodes: int = 5, task: str = TASKS) -> int:
    """Roll the shipped policy out anew; returns the exit status of `headrace rollout`, 2 while another demo runs."""
    try:
        empty(out)
    except FileExistsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_USAGE
    chosen = ["--task", task, "--episodes", str(episodes), "--num-envs", "2", "--videos", "3", "--out", str(out)]
    status = main(["rollout", str(ROOT / "checkpoints" / "demo"), *chosen])
    if (out / "report.html").exists():
        print(f"open {out / 'report.html'} in a browser")
    return status


if __name__ == "__main__":
    sys.exit(tyro.cli(demo))
