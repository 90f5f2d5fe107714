"""`headrace agreement`: how well simulated success predicts success on the robot."""

from pathlib import Path


def agreement(*, simulated: tuple[Path, ...], real: tuple[Path, ...]) -> int:
    """Mean maximum rank violation (0 is best) and Pearson's r of simulated against real success rates, task by task.

    Files are JSON `{task: {policy: rate in 0..1}}`, or results.json of `headrace rollout`. Tasks and policies are
    matched by name; each task needs two policies that both sides have.

    Args:
        simulated: Files of simulated rates.
        real: Files of rates on the robot.
    """
    from headrace.sim.agreement import compare, merge_rates, read_rates

    rows = compare(*(merge_rates([read_rates(path) for path in paths]) for paths in (simulated, real)))
    print("| task | policies | MMRV | Pearson |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.task} | {', '.join(row.policies)} | {row.mmrv:.3f} | {row.pearson:.3f} |")
    if len(rows) > 1:
        mmrv, r = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("mmrv", "pearson"))
        print(f"| mean | | {mmrv:.3f} | {r:.3f} |")
    return 0
