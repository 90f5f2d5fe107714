"""Processor time of a step, picture included, in each arena that is installed.

MUJOCO_GL=egl python benchmarks/arena_speed.py [--tasks pusht,metaworld/reach] [--steps 20]
"""

import time

import numpy as np
import tyro

from headrace.sim.tasks import find_tasks, make_environment


def main(tasks: str = "pusht,metaworld/reach,aloha/transfer-cube,libero/spatial-0", steps: int = 20) -> None:
    """Print one Markdown row per task; those whose package is missing say how to get it."""
    print("| task | ms of processor time a step | pictures |")
    print("|---|---|---|")
    for task in find_tasks(tasks):
        if task.missing():
            print(f"| {task.name} | needs: {task.missing()} | |")
            continue
        environment = make_environment(task)
        look = environment.reset(0)
        low, high = np.array(environment.spec.low), np.array(environment.spec.high)
        action = np.clip(look.state, low, high) if task.name.startswith("aloha") else (low + high) / 2
        used = time.process_time()
        for _ in range(steps):
            environment.step(action.astype(np.float32))
        spent = (time.process_time() - used) / steps * 1e3
        sizes = ", ".join(f"{name} {picture.shape[0]} x {picture.shape[1]}" for name, picture in look.images.items())
        print(f"| {task.name} | {spent:.1f} | {sizes} |")
        environment.close()


if __name__ == "__main__":
    tyro.cli(main)
