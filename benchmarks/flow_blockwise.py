"""Error against FLOPs of blockwise velocities and the plain network on bimodal action chunks: the whole front.

    python benchmarks/flow_blockwise.py --seeds 3

FLOPs are counted by torch.utils.flop_counter for one sample, modulation layers included.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from flow_toys import bimodal_chunks, chunk_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headrace.flow.blockwise import FeatureMode, feature_residual_loss, integrate_blockwise
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate
from headrace.flow.time import segment_time, uniform_time
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity

BORDERS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = (4, 8, 16, 32)


class Point(NamedTuple):
    """One sampler: how it is called, steps, FLOPs of one sample and its error."""

    name: str
    steps: int
    flops: int
    error: float


def config(kind: str, width: int, depth: int) -> BlockwiseConfig:
    """The plain network of `depth` blocks, or a blockwise one with `depth - 1` in the trunk and one per segment."""
    common = {"channels": 16, "width": width, "heads": 1, "grid": (1, 1), "condition_dim": 2, "mixing": "none",
              "mlp_ratio": 2.0, "modulation_rank": max(4, width // 4), "align_dim": 0}  # fmt: skip
    if kind == "plain":
        return BlockwiseConfig(trunk_depth=0, velocity_depth=depth, residual_depth=0, borders=(0.0, 1.0), **common)
    return BlockwiseConfig(trunk_depth=depth - 1, velocity_depth=1, residual_depth=1, borders=BORDERS, **common)


def train(model: BlockwiseVelocity, *, steps: int, draw: torch.Generator, batch: int = 96) -> None:
    """Stage 1; a blockwise network gets its batch split over the segments."""
    stage_two = {id(p) for p in model.residual_parameters()} if model.config.residual_depth else set()
    optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in stage_two], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        data, goal = bimodal_chunks(batch, draw)
        t = (
            segment_time(batch, BORDERS, generator=draw).t
            if model.config.segments > 1
            else uniform_time(batch, generator=draw)
        )
        path = straight_path(torch.randn(data.shape, generator=draw), data, t)
        optimizer.zero_grad()
        flow_matching_loss(model(path.x_t, t, goal), path.target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def train_residual(
    model: BlockwiseVelocity, *, steps: int, draw: torch.Generator, batch: int = 96
) -> tuple[float, float]:
    """Stage 2; returns the residual's error and that of holding the features, on fresh data."""
    optimizer = torch.optim.Adam(model.residual_parameters(), 1e-3)
    for _ in range(steps):
        data, goal = bimodal_chunks(batch, draw)
        noise = torch.randn(data.shape, generator=draw)
        optimizer.zero_grad()
        feature_residual_loss(model.bind(goal), noise, data, borders=BORDERS, generator=draw).backward()
        optimizer.step()
    with torch.no_grad():
        data, goal = bimodal_chunks(4096, draw)
        noise, bound = torch.randn(data.shape, generator=draw), model.bind(goal)
        parts = (bound, _Held(bound))
        made = [
            feature_residual_loss(p, noise, data, borders=BORDERS, generator=torch.Generator().manual_seed(1)).item()
            for p in parts
        ]
    return made[0], made[1]


class _Held:
    """The same network with a residual of zero."""

    def __init__(self, parts) -> None:
        self.features, self.velocity = parts.features, parts.velocity

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        """Nothing changes since the segment's start."""
        return torch.zeros(())


@torch.no_grad()
def sample(model: BlockwiseVelocity, noise: Tensor, goal: Tensor, steps: int, mode: FeatureMode) -> Tensor:
    """Samples of either kind of network."""
    if model.config.segments == 1:
        return integrate(model.bind(goal), noise, steps=steps)
    return integrate_blockwise(model.bind(goal), noise, borders=BORDERS, steps_per_segment=steps // 4, mode=mode)


def measure(model: BlockwiseVelocity, name: str, mode: FeatureMode, seed: int) -> list[Point]:
    """Error over 2048 chunks and FLOPs of one, for every step count."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    goal = bimodal_chunks(2048, draw).goal
    noise = torch.randn(2048, 1, 16, generator=draw)
    points = []
    for steps in STEPS:
        with FlopCounterMode(display=False) as counter:
            sample(model, noise[:1], goal[:1], steps, mode)
        error = chunk_error(sample(model, noise, goal, steps, mode), goal)
        points.append(Point(name, steps, counter.get_total_flops(), error))
    return points


def front(*, width: int, depth: int, steps: int, seed: int) -> tuple[list[Point], tuple[float, float]]:
    """All points of one seed, and the residual's error beside that of holding."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    points = []
    for layers in sorted({depth, depth // 2}, reverse=True):
        plain = BlockwiseVelocity(config("plain", width, layers))
        train(plain, steps=steps, draw=draw)
        points += measure(plain, f"plain {layers}", "full", seed)
    blockwise = BlockwiseVelocity(config("blockwise", width, depth))
    train(blockwise, steps=steps, draw=draw)
    residual = train_residual(blockwise, steps=steps // 3, draw=draw)
    for name, mode in (("blockwise full", "full"), ("blockwise residual", "residual"), ("blockwise hold", "hold")):
        points += measure(blockwise, name, mode, seed)
    return points, residual


def mean_points(runs: list[list[Point]]) -> list[Point]:
    """Mean error over seeds."""
    return [p._replace(error=sum(r[i].error for r in runs) / len(runs)) for i, p in enumerate(runs[0])]


def savings(points: list[Point], depth: int) -> list[tuple[Point, Point, float]]:
    """For each step count of the plain network: the cheapest blockwise sampler at least as good, and the saving."""
    rows = []
    for base in (p for p in points if p.name == f"plain {depth}"):
        good = [p for p in points if p.name.startswith("blockwise") and p.error <= base.error]
        if good:
            best = min(good, key=lambda p: p.flops)
            rows.append((base, best, base.flops / best.flops))
    return rows


def main() -> None:
    """Train, measure, print the front and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started, runs, residuals = time.perf_counter(), [], []
    for seed in range(options.seeds):
        points, residual = front(width=options.width, depth=options.depth, steps=options.steps, seed=seed)
        runs.append(points)
        residuals.append(residual)
        print(f"seed {seed}: residual error {residual[0]:.4f}, held {residual[1]:.4f}", flush=True)
    points = mean_points(runs)
    print(f"\n{'sampler':<20} {'steps':>5} {'kFLOPs':>8} {'error':>7} {'spread':>7}")
    for i, p in enumerate(points):
        errors = [r[i].error for r in runs]
        print(f"{p.name:<20} {p.steps:>5} {p.flops / 1e3:>8.0f} {p.error:>7.4f} {max(errors) - min(errors):>7.4f}")
    for base, best, ratio in savings(points, options.depth):
        print(f"plain {base.steps} steps (error {base.error:.4f}) is reached by {best.name} {best.steps} steps "
              f"(error {best.error:.4f}) with {ratio:.2f} times fewer FLOPs")  # fmt: skip
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out:
        record = {"options": {k: str(v) for k, v in vars(options).items()}, "residual_and_held": residuals,
                  "runs": [[p._asdict() for p in run] for run in runs]}  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
