"""Few-step policies with BOSS: the best step grids of a trained policy, then a network straightened on each.

    python recipes/boss_straighten.py --policy runs/policy/model --data DATASET --out runs/boss
    headrace rollout runs/boss/k5/model --grid runs/boss/k5/model ...

Phase 1 needs no training and no actions: `out/grids/k5/step_grid.json` fits the policy as it is. Phase 2 writes
`out/k5/model` with its own `step_grid.json`, marked as tuned: that network is right on this grid only.

Source: arXiv 2312.16414; nguyenngocbaocmt02/BOSS@0c170f9 (facts only). Published phase 2: 12,000 steps of batch 15 on
5,000 noises, Adam 2e-4, EMA 0.999.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from headrace.flow.bellman import bellman_grids
from headrace.flow.solver import SolverSettings, Velocity, trajectory
from headrace.flow.step_grid import StepGrid
from headrace.flow.straighten import straightening_loss
from headrace.flow.straightness import root_mean_square
from headrace.robot.finetune import read_demonstrations
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_trunk import encode_text
from headrace.training.batches import batches
from headrace.training.loop import fit
from headrace.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to straighten.

    Attributes:
        policy: Checkpoint folder or Hub id of a flow-matching policy.
        data: Demonstrations; only what the policy sees is used, never the actions.
        out: Run folder.
        counts: Step counts to make grids and networks for.
        cost: `local` as published, or `endpoint`, which follows each error to the end.
        straighten: Phase 2 too; without it only the grids are made.
        observations: Observations in the pool; an eighth of them is held out.
        fine_steps: Euler steps that count as exact.
        steps, batch_size, lr, ema: Of phase 2.
        draws: Chords per observation and update; they share the observation's prefix.
        precision: Of phase 2.
        seed: Of observations and noise.
    """

    policy: str
    data: tuple[str, ...]
    out: Path
    counts: tuple[int, ...] = (5, 4, 3, 2, 1)
    cost: Literal["local", "endpoint"] = "local"
    straighten: bool = True
    observations: int = 2048
    fine_steps: int = 50
    steps: int = 2000
    batch_size: int = 32
    lr: float = 2e-4
    ema: float = 0.99
    draws: int = 4
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0


def observe(model: VipraPolicy, sources: tuple[str, ...], count: int, seed: int) -> PolicyInput:
    """Observations drawn from demonstrations."""
    data = read_demonstrations(sources, model.config)
    chosen = np.random.default_rng(seed).choice(len(data), min(count, len(data)), replace=False)
    batch = data.batch(np.sort(chosen))
    return PolicyInput(batch.images, batch.state, encode_text(batch.instructions, model.config.words))


def rows_of(inputs: PolicyInput, rows: Tensor | slice) -> PolicyInput:
    """Some of the observations."""
    return PolicyInput(*(part[rows] for part in inputs))


def velocity_under(model: VipraPolicy, inputs: PolicyInput) -> Velocity:
    """The policy's velocity with one observation per row."""
    prefix = model.compute_prefix(inputs)
    return lambda x, t: model.velocity(prefix, x, t)


@torch.no_grad()
def teach(model: VipraPolicy, inputs: PolicyInput, recipe: Recipe) -> Tensor:
    """The teacher's fine Euler run from one noise per observation, shape (N, fine_steps + 1, H, A), normalised."""
    made, draw = [], torch.Generator().manual_seed(recipe.seed + 1)
    for start in range(0, len(inputs.state), 64):
        part = rows_of(inputs, slice(start, start + 64))
        noise = torch.randn(len(part.state), *chunk_shape(model), generator=draw)
        made.append(trajectory(velocity_under(model, part), noise, steps=recipe.fine_steps).states.transpose(0, 1))
    return torch.cat(made)


class Chords:
    """Teacher states on one grid for every observation; a dataset for `batches`.

    Args:
        inputs: Observations, N rows.
        fine: From `teach`, shape (N, F+1, H, A).
        grid: Times to keep, each of them on the fine grid.

    Attributes:
        states: Shape (N, K+1, H, A).

    Raises:
        ValueError: A time that the fine grid lacks.
    """

    def __init__(self, inputs: PolicyInput, fine: Tensor, grid: StepGrid) -> None:
        steps = fine.shape[1] - 1
        indices = [round(t * steps) for t in grid.times]
        off = [t for t, index in zip(grid.times, indices, strict=True) if abs(t * steps - index) > 1e-6]
        if off:
            raise ValueError(f"the fine grid of {steps} steps has no state at {', '.join(f'{t:.4g}' for t in off)}")
        self.inputs, self.states = inputs, fine[:, indices]

    def __len__(self) -> int:
        return len(self.states)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Observations and states of these rows."""
        rows = torch.from_numpy(indices)
        return {**rows_of(self.inputs, rows)._asdict(), "states": self.states[rows]}


def chunk_shape(model: VipraPolicy) -> tuple[int, int]:
    """Horizon and action dimension."""
    return model.config.decoder.horizon, model.config.decoder.action_dim


class ChordLoss:
    """The straightening loss as `fit` calls it."""

    def __init__(self, grid: StepGrid, draws: int) -> None:
        self.grid, self.draws = grid, draws

    def __call__(self, model: VipraPolicy, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        inputs = PolicyInput(batch["images"], batch["state"], batch["text"])
        velocity, states = velocity_under(model, inputs), batch["states"].transpose(0, 1)
        losses = [straightening_loss(velocity, states, self.grid.times, generator=generator) for _ in range(self.draws)]
        return {"total": torch.stack(losses).mean()}


@torch.no_grad()
def end_error(model: VipraPolicy, chords: Chords, settings: SolverSettings) -> float:
    """Root mean square distance, per action number, between a few-step end and the teacher's fine end."""
    distances = []
    for start in range(0, len(chords), 64):
        rows = slice(start, start + 64)
        velocity = velocity_under(model, rows_of(chords.inputs, rows))
        distances.append(settings.sample(velocity, chords.states[rows, 0]) - chords.states[rows, -1])
    return root_mean_square(torch.cat(distances)) / (distances[0][0].numel() ** 0.5)


def straighten(
    recipe: Recipe, teacher: VipraPolicy, inputs: PolicyInput, fine: Tensor, grid: StepGrid
) -> dict[str, float]:
    """One network for one grid, saved with it; returns its errors on held-out observations."""
    held_out = max(1, len(inputs.state) // 8)
    chords, unseen = (
        Chords(rows_of(inputs, part), fine[part], grid) for part in (slice(held_out, None), slice(held_out))
    )
    student = copy.deepcopy(teacher).train()
    fitted = fit(
        student,
        ChordLoss(grid, recipe.draws),
        torch.optim.AdamW(student.parameters(), recipe.lr, weight_decay=0.0),
        batches(chords, recipe.batch_size, seed=recipe.seed),
        steps=recipe.steps,
        out=recipe.out / f"k{grid.steps}",
        seed=recipe.seed,
        schedule=Schedule(kind="cosine", warmup=min(100, recipe.steps // 4), steps=recipe.steps, floor=0.1),
        ema_decay=recipe.ema,
        precision=recipe.precision,
    )
    if fitted.ema is None:
        raise RuntimeError("fit returned no averaged weights although a decay was given")
    with fitted.ema.applied_to(student):
        student.eval()
        folder = recipe.out / f"k{grid.steps}" / "model"
        student.save_pretrained(folder)
        replace(grid, tuned=True).save(folder)
        return {
            "uniform": end_error(teacher, unseen, SolverSettings(steps=grid.steps)),
            "bellman": end_error(teacher, unseen, grid.settings),
            "straightened": end_error(student, unseen, grid.settings),
        }


def main(recipe: Recipe) -> dict[int, dict[str, float]]:
    """Grids, then networks; returns and writes the end errors by step count."""
    teacher = VipraPolicy.from_pretrained(recipe.policy)
    inputs = observe(teacher, recipe.data, recipe.observations, recipe.seed)
    probe = rows_of(inputs, slice(128))
    noise = torch.randn(len(probe.state), *chunk_shape(teacher), generator=torch.Generator().manual_seed(recipe.seed))
    with torch.no_grad():
        grids = bellman_grids(velocity_under(teacher, probe), noise, steps=recipe.counts, fine_steps=recipe.fine_steps,
                              cost=recipe.cost)  # fmt: skip
    fine = teach(teacher, inputs, recipe) if recipe.straighten else None
    errors = {}
    for count, grid in grids.items():
        grid.save(recipe.out / "grids" / f"k{count}")
        print(f"K={count}: " + " ".join(f"{t:.2f}" for t in grid.times), flush=True)
        if fine is not None:
            errors[count] = straighten(recipe, teacher, inputs, fine, grid)
            print(json.dumps(errors[count]), flush=True)
    (recipe.out / "errors.json").write_text(json.dumps(errors, indent=2) + "\n")
    return errors


if __name__ == "__main__":
    main(tyro.cli(Recipe))
