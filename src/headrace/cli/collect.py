"""`headrace collect`: demonstrations from a task's scripted expert, as a LeRobotDataset."""

import sys
from pathlib import Path


def collect(
    *,
    task: str,
    out: Path,
    episodes: int = 200,
    seed: int = 1_000_000,
    num_envs: int = 2,
    push: float = 0.05,
    linger: int = 3,
    timeout: float = 300.0,
) -> int:
    """Run a task's scripted expert, keep the successes and write a LeRobotDataset v3.0.

    Args:
        task: Task name; `headrace tasks` shows which have an expert.
        out: Dataset folder; must not exist. It appears only when complete.
        episodes: Successful demonstrations to keep.
        seed: First seed. Evaluations start at 0 by default, so that they never meet a training layout; a benchmark's
            own test episodes are refused.
        num_envs: Simulator processes.
        push: Chance per step of a push that the expert must recover from.
        linger: Steps recorded after the first success, and after the expert has finished where it tells that.
        timeout: Seconds after which a silent simulator counts as hung.
    """
    from headrace.sim.collect import CollectSettings, ExpertFails
    from headrace.sim.collect import collect as run
    from headrace.sim.episode import Perturbation
    from headrace.sim.tasks import find_task

    settings = CollectSettings(
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
        perturbation=Perturbation(probability=push),
        linger=linger,
        timeout=timeout,
    )
    try:
        done = run(find_task(task), settings, out)
    except ExpertFails as error:
        print(
            f"headrace collect: {error}. Nothing was kept; try `headrace rollout oracle --task {task}`", file=sys.stderr
        )
        return 1
    rate = 60 * done.kept / done.seconds
    print(f"{done.kept} demonstrations ({done.frames} frames) in {done.seconds:.0f} s, {rate:.0f} a minute: {out}")
    return 0
