"""Make the shipped policy: collect demonstrations with scripted experts, train on 2 CPU cores, save `checkpoints/demo`.

Usage: python recipes/demo_policy.py [--steps 3600] [--out runs/demo_policy]
Every number stands in this file; `checkpoints/demo/README.md` says what came out and how it was measured. Training runs
in one process per core: two processes of one thread are a third faster here than one of two threads.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from headrace.contracts import ActionSpec
from headrace.robot.finetune import FinetuneSettings, fit_to_data, read_demonstrations, train_policy
from headrace.robot.sizes import policy_config
from headrace.robot.vipra import VipraPolicy
from headrace.sim.collect import CollectSettings, collect
from headrace.sim.episode import Perturbation
from headrace.sim.tasks import find_task

ROOT = Path(__file__).resolve().parents[1]
DEMONSTRATIONS = {"PickCube-v1": 200, "PushCube-v1": 120, "StackCube-v1": 200}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What can be chosen.

    Attributes:
        out: Demonstrations and the training run go here.
        checkpoint: Where the finished policy goes.
        steps: Updates.
        tasks: Tasks to learn, names of `DEMONSTRATIONS`.
        demonstrations: Overrides the number of demonstrations per task, for a quick try.
        processes: Training processes, and simulator processes while collecting.
        resume: Go on with an interrupted training.
    """

    out: Path = ROOT / "runs" / "demo_policy"
    checkpoint: Path = ROOT / "checkpoints" / "demo"
    steps: int = 3600
    batch_size: int = 64
    tasks: tuple[str, ...] = tuple(DEMONSTRATIONS)
    demonstrations: int | None = None
    processes: int = 2
    resume: bool = False


def collect_all(recipe: Recipe) -> list[Path]:
    """Collect what is not there yet; returns the dataset folders."""
    folders = [recipe.out / "demonstrations" / name for name in recipe.tasks]
    for name, folder in zip(recipe.tasks, folders, strict=True):
        if not folder.exists():
            settings = CollectSettings(
                episodes=recipe.demonstrations or DEMONSTRATIONS[name],
                num_envs=recipe.processes,
                perturbation=Perturbation(probability=0.05),
            )
            collect(find_task(name), settings, folder)
    return folders


def train(recipe: Recipe, folders: list[Path]) -> None:
    """Train on the collected demonstrations; one of `recipe.processes` processes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // recipe.processes))
    spec = ActionSpec.from_dict(json.loads((folders[0] / "meta" / "headrace.json").read_text())["spec"])
    # The crop is the table in front of the robot; the rest of the picture never matters.
    config = policy_config("small", spec, cameras=("base_camera",), camera_size=224, crop=(48, 76))
    data = read_demonstrations(folders, horizon=config.decoder.horizon, history=config.history)
    config = fit_to_data(config, data, spec)
    torch.manual_seed(0)
    settings = FinetuneSettings(steps=recipe.steps, batch_size=recipe.batch_size, lr=5e-4, warmup=200, ema=0.998)
    train_policy(VipraPolicy(config), data, settings, recipe.out / "training", resume=recipe.resume)


def main(recipe: Recipe) -> None:
    """Collect, train, save."""
    if "RANK" in os.environ:
        train(recipe, [recipe.out / "demonstrations" / name for name in recipe.tasks])
        return
    collect_all(recipe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(recipe.processes), __file__]
    subprocess.run([*launch, *sys.argv[1:]], check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    recipe.checkpoint.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(recipe.out / "training" / "model" / name, recipe.checkpoint / name)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
