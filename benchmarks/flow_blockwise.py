"""Error against FLOPs of blockwise velocities and of plain networks on bimodal action chunks: the whole front.

    python benchmarks/flow_blockwise.py --seeds 0 1 2 --out front.json      # goes on where it was cut off
    python benchmarks/flow_blockwise.py --report --out front.json

FLOPs are of one sample, counted by torch.utils.flop_counter, time embedding and modulation included. The distance to
the nearest clean detour is printed, but falls below the data's own where a sampler has too little spread, so it decides
nothing. Two errors do: how far the distribution of these distances is from the data's (`spread`), and the squared
Wasserstein distance between made and fresh chunks of the same goals, which shows lost modes. The latter is one draw
with noise of its own, so no sampler has to be nearer than the data are.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flow_toys import bimodal_chunks, chunk_error, clean_chunks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headrace.flow.blockwise import FeatureMode, feature_residual_loss, integrate_blockwise
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate
from headrace.flow.straightness import wasserstein2_squared
from headrace.flow.time import segment_time, uniform_time
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity

STEPS = (2, 4, 6, 8, 12, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network: plain with one segment, else blockwise.

    Attributes:
        depth: Blocks that a full step runs through: all of a plain network, trunk and stack of a blockwise one.
        segments: Time segments; 1 for the plain network.
        velocity: Blocks of each segment's stack.
        residual: Blocks of the feature residual network.
        width, mlp_ratio: Of every block.
    """

    depth: int
    segments: int = 1
    velocity: int = 1
    residual: int = 1
    width: int = 64
    mlp_ratio: float = 4.0

    def config(self) -> BlockwiseConfig:
        """One token of 16 numbers, conditioned on a goal of two."""
        blockwise = self.segments > 1
        return BlockwiseConfig(
            channels=16,
            width=self.width,
            heads=1,
            grid=(1, 1),
            condition_dim=2,
            mixing="none",
            mlp_ratio=self.mlp_ratio,
            modulation_rank=max(4, self.width // 4),
            align_dim=0,
            trunk_depth=self.depth - self.velocity if blockwise else 0,
            velocity_depth=self.velocity if blockwise else self.depth,
            residual_depth=self.residual if blockwise else 0,
            borders=tuple(k / self.segments for k in range(self.segments + 1)),
        )


SHAPES = {
    "plain 12": Shape(depth=12),
    "plain 6": Shape(depth=6),
    "plain 3": Shape(depth=3),
    "2 segments": Shape(depth=12, segments=2),
    "4 segments": Shape(depth=12, segments=4),
    "4 segments, stacks of 2": Shape(depth=12, segments=4, velocity=2, residual=2),
    "2 segments, half depth": Shape(depth=6, segments=2),
}
BASELINE = "plain 12"


class Point(NamedTuple):
    """One sampler of one trained network.

    Attributes:
        network: Name in SHAPES.
        mode: How features are made inside a segment; `plain` for plain networks.
        steps: Euler steps.
        flops: Of one sample.
        error: Root mean square distance to the nearer clean detour.
        spread: Mean difference between the sorted distances to the nearer detour and the data's; 0 is perfect.
        w2: Squared Wasserstein distance to fresh chunks of the same goals.
    """

    network: str
    mode: str
    steps: int
    flops: int
    error: float
    spread: float
    w2: float


def train(model: BlockwiseVelocity, *, steps: int, draw: torch.Generator, batch: int = 128) -> None:
    """Stage 1; a blockwise network gets its batch split over the segments."""
    borders = model.config.borders
    stage_two = {id(p) for p in model.residual_parameters()} if model.config.residual_depth else set()
    optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in stage_two], 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        data, goal = bimodal_chunks(batch, draw)
        split = model.config.segments > 1
        t = segment_time(batch, borders, generator=draw).t if split else uniform_time(batch, generator=draw)
        path = straight_path(torch.randn(data.shape, generator=draw), data, t)
        optimizer.zero_grad()
        flow_matching_loss(model(path.x_t, t, goal), path.target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


class _Held:
    """The same network with a residual of zero."""

    def __init__(self, parts: Any) -> None:
        self.at, self.features, self.velocity = parts.at, parts.features, parts.velocity
        self.borders = parts.borders

    def residual(self, x: Tensor, moment: Any) -> Tensor:
        """Nothing changes since the segment's start."""
        return torch.zeros(())


def train_residual(
    model: BlockwiseVelocity, *, steps: int, draw: torch.Generator, batch: int = 128
) -> tuple[float, float]:
    """Stage 2; returns the residual's error and that of holding the features, on fresh data."""
    borders = model.config.borders
    optimizer = torch.optim.Adam(model.residual_parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        data, goal = bimodal_chunks(batch, draw)
        noise = torch.randn(data.shape, generator=draw)
        optimizer.zero_grad()
        feature_residual_loss(model.bind(goal), noise, data, borders=borders, generator=draw).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        data, goal = bimodal_chunks(4096, draw)
        noise, bound = torch.randn(data.shape, generator=draw), model.bind(goal)
        made = [
            feature_residual_loss(p, noise, data, borders=borders, generator=torch.Generator().manual_seed(1)).item()
            for p in (bound, _Held(bound))
        ]
    return made[0], made[1]


@torch.no_grad()
def sample(model: BlockwiseVelocity, noise: Tensor, goal: Tensor, steps: int, mode: FeatureMode) -> Tensor:
    """Samples of either kind of network; `steps` is a multiple of the segments."""
    segments, bound = model.config.segments, model.bind(goal)
    if segments == 1:
        return integrate(bound, noise, steps=steps)
    return integrate_blockwise(bound, noise, borders=model.config.borders, steps_per_segment=steps // segments,
                               mode=mode)  # fmt: skip


def sampling_flops(model: BlockwiseVelocity, steps: int, mode: FeatureMode) -> int:
    """FLOPs of one sample."""
    with FlopCounterMode(display=False) as counter:
        sample(model, torch.zeros(1, 1, 16), torch.zeros(1, 2), steps, mode)
    return counter.get_total_flops()


def spread_error(made: Tensor, fresh: Tensor, goal: Tensor) -> float:
    """1-Wasserstein distance between the distances to the nearer clean detour of made and of fresh chunks."""
    made_far, fresh_far = (
        (actions - clean_chunks(goal)).square().mean((-1, -2)).amin(0).sqrt().sort().values for actions in (made, fresh)
    )
    return (made_far - fresh_far).abs().mean().item()


def joint_distance(actions: Tensor, goal: Tensor, others: Tensor) -> float:
    """Squared Wasserstein distance between chunks with their goals; goals weigh so much that pairs share them."""
    return wasserstein2_squared(*(torch.cat([part.flatten(1), 10.0 * goal], 1) for part in (actions, others)))


def measure(model: BlockwiseVelocity, name: str, seed: int) -> list[Point]:
    """Errors over 1024 chunks (512 for the Wasserstein distance) and FLOPs, for all step counts and modes."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    fresh, goal = bimodal_chunks(1024, draw)
    noise = torch.randn(1024, 1, 16, generator=draw)
    segments, points = model.config.segments, []
    modes: tuple[FeatureMode, ...] = ("full",) if segments == 1 else ("full", "residual", "hold")
    for steps in (s for s in STEPS if s % segments == 0):
        for mode in modes if steps > segments else modes[:1]:  # with one step a segment all modes are the same
            made = sample(model, noise, goal, steps, mode)
            far = joint_distance(made[:512], goal[:512], fresh[:512])
            shown = "plain" if segments == 1 else mode
            errors = chunk_error(made, goal), spread_error(made, fresh, goal), far
            points.append(Point(name, shown, steps, sampling_flops(model, steps, mode), *errors))
    return points


def floor(seed: int) -> tuple[float, float]:
    """Both errors of the data itself."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    fresh, goal = bimodal_chunks(1024, draw)
    side = torch.randint(0, 2, (1024,), generator=draw)
    clean = torch.stack([fresh, reflected(fresh, goal)])[side, torch.arange(1024)]
    return chunk_error(fresh, goal), joint_distance(clean[:512], goal[:512], fresh[:512])


def reflected(actions: Tensor, goal: Tensor) -> Tensor:
    """The same chunks mirrored at the line to the goal: the other detour, as likely as the first."""
    along = (goal / goal.norm(dim=1, keepdim=True))[:, None, None]
    points = actions.unflatten(-1, (8, 2))
    return (2 * (points * along).sum(-1, keepdim=True) * along - points).flatten(-2)


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and measure one network; JSON-ready."""
    started = time.process_time()
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = BlockwiseVelocity(SHAPES[name].config())
    train(model, steps=steps, draw=draw)
    residual = train_residual(model, steps=steps // 2, draw=draw) if model.config.residual_depth else None
    points = measure(model, name, seed)
    return {"network": name, "seed": seed, "steps": steps, "residual_and_held": residual, "floor": floor(seed),
            "parameters": sum(p.numel() for p in model.parameters()), "points": [p._asdict() for p in points],
            "cpu_seconds": round(time.process_time() - started)}  # fmt: skip


def mean_points(runs: list[dict[str, Any]]) -> list[Point]:
    """Every sampler's errors as means over the seeds that all networks have."""
    names = {r["network"] for r in runs}
    shared = set.intersection(*({r["seed"] for r in runs if r["network"] == name} for name in names))
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for one in runs:
        for p in (Point(**raw) for raw in one["points"] if one["seed"] in shared):
            groups.setdefault((p.network, p.mode, p.steps), []).append(p)
    return [
        ps[0]._replace(**{part: statistics.mean(getattr(p, part) for p in ps) for part in ("error", "spread", "w2")})
        for ps in groups.values()
    ]


def savings(points: list[Point], base: Point, floor: float) -> tuple[Point | None, Point]:
    """The cheapest blockwise sampler at least as good as `base` in both errors, and the cheapest plain one."""
    near = max(base.w2, floor)
    good = sorted((p for p in points if p.spread <= base.spread and p.w2 <= near), key=lambda p: p.flops)
    return next((p for p in good if p.mode != "plain"), None), next(p for p in good if p.mode == "plain")


def report(runs: list[dict[str, Any]]) -> None:
    """The front, and for every step count of the baseline what reaches it more cheaply."""
    points = mean_points(runs)
    near, far = (statistics.mean(r["floor"][i] for r in runs) for i in (0, 1))
    print(f"{len({r['seed'] for r in runs})} seeds; the data's own: error {near:.4f}, W2^2 {far:.4f}")
    print("| network | features | steps | kFLOPs | error | spread | W2^2 |\n|---|---|---|---|---|---|---|")
    for p in points:
        errors = f"{p.error:.4f} | {p.spread:.4f} | {p.w2:.4f}"
        print(f"| {p.network} | {p.mode} | {p.steps} | {p.flops / 1e3:.0f} | {errors} |")
    for r in runs:
        if r["residual_and_held"]:
            new, held = r["residual_and_held"]
            print(f"{r['network']}, seed {r['seed']}: residual error {new:.4f}, held {held:.4f}")
    for base in (p for p in points if p.network == BASELINE):
        found, plain = savings(points, base, far)
        text = "by no blockwise sampler"
        if found:
            text = (f"by {found.network}, {found.mode}, {found.steps} steps (spread {found.spread:.4f}, W2^2 "
                    f"{found.w2:.4f}) with {base.flops / found.flops:.2f} times fewer FLOPs")  # fmt: skip
        print(f"{BASELINE}, {base.steps} steps (spread {base.spread:.4f}, W2^2 {base.w2:.4f}) is reached {text}; by "
              f"{plain.network}, {plain.steps} steps with {base.flops / plain.flops:.2f} times fewer")  # fmt: skip


def main() -> None:
    """Train and measure what the output file lacks, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("flow_blockwise.json"))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    for seed in [] if options.report else options.seeds:
        for name in options.networks:
            runs = json.loads(options.out.read_text()) if options.out.is_file() else []
            if any((r["network"], r["seed"], r["steps"]) == (name, seed, options.steps) for r in runs):
                continue
            made = run(name, seed, options.steps)
            runs = json.loads(options.out.read_text()) if options.out.is_file() else []
            options.out.write_text(json.dumps([*runs, made], indent=1) + "\n")
            print(f"{name}, seed {seed}: {made['cpu_seconds']} s of processor time", flush=True)
    report(json.loads(options.out.read_text()))


if __name__ == "__main__":
    main()
