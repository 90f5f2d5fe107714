"""Every property that the flow-matching spec accepts by, measured and printed with pass or fail.

    python benchmarks/flow_matching.py                # all, under 5 minutes on 2 idle cores
    python benchmarks/flow_matching.py --only boss flowopt

Exits with 1 if a property fails. Names in brackets are those of the spec's tests.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flow_blockwise import Shape, chunk_error, sample, sampling_flops, train, train_residual
from flow_toys import (
    MIXTURES,
    MODES_16D,
    Ensemble,
    bimodal_chunks,
    eight,
    five,
    labelled_moons,
    moons,
    normal,
    train_couplings,
)
from torch.utils.flop_counter import FlopCounterMode

from headrace.flow.bellman import bellman_grids, cheapest_path, local_costs
from headrace.flow.coupling import BiasedCoupling, Coupling, gibbs_weights, sinkhorn_plan, squared_distances
from headrace.flow.flowopt import NotContractive, optimise_noise, step_size_bound, uni_inversion
from headrace.flow.gaussian_mixture import GaussianMixture
from headrace.flow.latent import LatentScaler
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.residual import toward
from headrace.flow.solver import SolverSettings, Velocity, integrate, trajectory, uniform_grid
from headrace.flow.step_grid import GridMismatch, StepGrid
from headrace.flow.straighten import straightening_loss, teacher_states
from headrace.flow.straightness import measure_straightness, root_mean_square, wasserstein2_squared
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity

SPEC_BOUND = 0.127  # of the 16-D mixture, the smallest of one draw of pairs; twelve other draws gave 0.07 to 0.19


class Finding(NamedTuple):
    """One property: its name, whether it holds, and the figures."""

    name: str
    holds: bool
    figures: str


def seeded(seed: int = 0) -> torch.Generator:
    """A source of randomness."""
    return torch.Generator().manual_seed(seed)


def coupling_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-W1, T-W2] straightness and fit of CFM, weighted CFM and OT-CFM on three pairs of distributions."""
    couplings = {"CFM": Coupling(), "W4": Coupling(kind="gibbs", epsilon=4.0),
                 "W2": Coupling(kind="gibbs", epsilon=2.0),
                 "W1": Coupling(kind="gibbs", epsilon=1.0), "OT": Coupling(kind="exact")}  # fmt: skip
    found, figures = [], {}
    for name, source, target in (("N->8g", normal, eight), ("N->5g", normal, five), ("8g->moons", eight, moons)):
        used = {k: v for k, v in couplings.items() if (name, k) != ("8g->moons", "W1")}  # refused: too few pairs count
        bend, fit = dict.fromkeys(used, 0.0), dict.fromkeys(used, 0.0)
        for seed in range(seeds):
            networks = train_couplings(list(used.values()), source, target, steps=steps, seed=seed)
            draw = seeded(100 + seed)
            noise, data = source(768, draw), target(768, draw)
            for index, key in enumerate(used):
                velocity = networks.member(index)
                bend[key] += measure_straightness(velocity, noise, steps=(4,)).curvature / seeds
                fit[key] += wasserstein2_squared(integrate(velocity, noise, steps=100), data) / seeds
        figures[name] = bend, fit
        print("   ", name, " ".join(f"{k}: S {bend[k]:.3f} fit {fit[k]:.3f};" for k in used), flush=True)
    for name in ("N->8g", "N->5g"):
        bend, fit = figures[name]
        order = [bend[k] for k in ("CFM", "W4", "W1", "OT")]
        gaps = all(b < 0.9 * a for a, b in itertools.pairwise(order))
        worst = max(fit[k] for k in ("W4", "W1", "OT")) / fit["CFM"]
        found.append(Finding(f"T-W1 {name}: bends fall CFM > W4 > W1 > OT by over 10%", gaps,
                             " > ".join(f"{v:.3f}" for v in order)))  # fmt: skip
        found.append(Finding(f"T-W1 {name}: fit within 20% of CFM", worst <= 1.2, f"worst ratio {worst:.2f}"))
    bend, fit = figures["8g->moons"]
    found.append(Finding("T-W2 8g->moons: W2 straighter (< 0.5x) and worse in fit (> 1.3x)",
                         bend["W2"] < 0.5 * bend["CFM"] and fit["W2"] > 1.3 * fit["CFM"],
                         f"S {bend['W2'] / bend['CFM']:.2f}, fit {fit['W2'] / fit['CFM']:.2f} of CFM"))  # fmt: skip
    return found


def weight_limits(steps: int, seeds: int) -> list[Finding]:
    """[T-W3] limits of the weights."""
    draw = seeded()
    noise, data = torch.randn(128, 2, generator=draw), 4 + torch.randn(128, 2, generator=draw)
    flat = (gibbs_weights(noise, data, epsilon=1e6) - 1).abs().max().item()
    plan = sinkhorn_plan(squared_distances(noise, data), epsilon=2.0, iterations=50)
    sums = max((plan.sum(0) - 1).abs().max().item(), (plan.sum(1) - 1).abs().max().item())
    scale = (gibbs_weights(10 * noise, 10 * data, epsilon=20.0) - gibbs_weights(noise, data, epsilon=2.0)).abs().max()
    return [
        Finding("T-W3 eps=1e6 gives weights of 1", flat < 1e-4, f"{flat:.1e}"),
        Finding("T-W3 50 Sinkhorn iterations give even marginals", sums < 1e-3, f"{sums:.1e}"),
        Finding("T-W3 weights do not change when all is 10 times larger", scale.item() < 1e-5, f"{scale.item():.1e}"),
    ]


def condition_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-W4] the guard, and what it guards from: distance per condition on conditional moons."""
    try:
        Coupling(kind="exact").pair(torch.randn(8, 2), torch.randn(8, 2), condition=torch.arange(8) % 2)
        refused = False
    except BiasedCoupling:
        refused = True
    couplings = {
        "CFM": Coupling(),
        "OT blind": Coupling(kind="exact", condition_mode="biased"),
        "OT per label": Coupling(kind="exact", condition_mode="block"),
        **{
            f"W{epsilon} blind": Coupling(kind="gibbs", epsilon=epsilon, condition_mode="biased")
            for epsilon in (8, 4, 2)
        },
        "Sinkhorn per label": Coupling(kind="sinkhorn", epsilon=1.0, iterations=20, condition_mode="block"),
    }
    networks = train_couplings(list(couplings.values()), eight, labelled_moons, steps=steps, seed=0)
    draw, distance = seeded(7), {}
    for index, key in enumerate(couplings):
        parts = []
        for label in (0, 1):
            points, labels = labelled_moons(3000, draw)
            end = integrate(networks.member(index, label), eight(512, draw), steps=100)
            parts.append(wasserstein2_squared(end, points[labels == label][:512]))
        distance[key] = sum(parts) / 2
    text = ", ".join(f"{k} {v:.2f}" for k, v in distance.items())
    ordered = (
        distance["OT per label"] < distance["CFM"] * 1.2
        and distance["CFM"] < distance["W8 blind"] < distance["W4 blind"] < distance["W2 blind"] < distance["OT blind"]
    )
    return [
        Finding("T-W4 a coupling on a conditional model is refused", refused, ""),
        Finding("T-W4 W2^2 per condition: OT per label <~ CFM < W8 < W4 < W2 < OT blind", ordered, text),
    ]


def bellman_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-B1, T-B2, T-B3] the dynamic program and its grids on analytic mixtures."""
    costs = np.random.default_rng(0).random((13, 13))

    def brute_force(k: int) -> float:
        paths = ((0, *inner, 12) for inner in itertools.combinations(range(1, 12), k - 1))
        return min(sum(costs[a, b] for a, b in itertools.pairwise(path)) for path in paths)

    exact = all(math.isclose(cheapest_path(costs, k).cost, brute_force(k)) for k in range(2, 6))
    found = [Finding("T-B1 dynamic program equals brute force, K=2..5", exact, "")]
    never_above, helps, rows = True, True, []
    for name, velocity in MIXTURES.items():
        draw, width = seeded(), velocity.means.shape[1]
        noise = torch.randn(1024, width, generator=draw)
        reference = integrate(velocity, noise, steps=400)
        surrogate = local_costs(trajectory(velocity, noise[:256], steps=48))
        grids = bellman_grids(velocity, noise[:256], steps=(2, 4, 8), fine_steps=48)
        ends = bellman_grids(velocity, noise[:32], steps=(2, 4, 8), fine_steps=48, cost="endpoint")
        row = []
        for k in (2, 4, 8):
            even = sum(surrogate[a, b] for a, b in itertools.pairwise(range(0, 49, 48 // k)))
            never_above &= grids[k].cost <= even * (1 + 1e-6)
            errors = [root_mean_square(integrate(velocity, noise, grid=g) - reference)
                      for g in (uniform_grid(k), grids[k].times, ends[k].times)]  # fmt: skip
            row.append(f"K={k} {errors[0]:.3f}/{errors[1]:.3f}/{errors[2]:.3f}")
            if (name, k) == ("8 Gaussians s=.316", 2):
                found.append(Finding("T-B3 the known exception: narrow 8 Gaussians, K=2: Bellman is WORSE",
                                     errors[1] > errors[0], f"{errors[0]:.3f} -> {errors[1]:.3f}"))  # fmt: skip
            elif name != "8 Gaussians s=.316":
                helps &= errors[1] <= 0.95 * errors[0]
        rows.append(f"{name}: " + ", ".join(row))
    print("    end error uniform/local/endpoint\n      " + "\n      ".join(rows), flush=True)
    found.append(Finding("T-B2 surrogate never above uniform's", never_above, "5 targets, K=2, 4, 8"))
    found.append(Finding("T-B3 end error <= 0.95 of uniform on the other four targets", helps, "K=2, 4, 8"))
    return found


def straightened(teacher: Ensemble, pool: torch.Tensor, times: tuple[float, ...], draw: torch.Generator) -> Velocity:
    """A copy of the teacher after 1200 updates of phase 2."""
    states = teacher_states(teacher.member(0), pool, times)
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(student.parameters(), 5e-4)
    for _ in range(1200):
        rows = torch.randint(len(pool), (128,), generator=draw)
        loss = straightening_loss(
            lambda x, t: student(torch.cat([x, t[:, None]], 1)[None])[0], states[:, rows], times, generator=draw
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.member(0)


def straightening_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-B4, T-B5] phase 2 on a trained network, and its refusal of another grid."""
    target = MIXTURES["8 Gaussians s=1"]
    teacher = train_couplings([Coupling()], normal, lambda n, g: target.sample(n, generator=g), steps=steps, seed=0)
    draw = seeded(1)
    noise, pool = torch.randn(1024, 2, generator=draw), torch.randn(2000, 2, generator=draw)
    velocity = teacher.member(0)
    end = integrate(velocity, noise, steps=100)
    found = []
    for k in (2, 4):
        grid = bellman_grids(velocity, noise[:100], steps=(k,))[k]
        student = straightened(teacher, pool, grid.times, draw)
        before, after, other = (
            root_mean_square(integrate(net, noise, grid=times) - end)
            for net, times in ((velocity, grid.times), (student, grid.times), (student, uniform_grid(10)))
        )
        found.append(Finding(f"T-B4 K={k}: straightening cuts the end error at least 5 times", after * 5 <= before,
                             f"{before:.3f} -> {after:.3f}; on 10 uniform steps {other:.3f}"))  # fmt: skip
    tuned = StepGrid(times=grid.times, source="local", tuned=True)
    try:
        tuned.require(SolverSettings(steps=10))
        refused = False
    except GridMismatch:
        refused = True
    return [*found, Finding("T-B5 a tuned network is refused on another grid", refused, "")]


def iterations_needed(step: float, *, std: float) -> float:
    """Updates of FlowOpt to 1% of the initial error inside one mode, where the ten-step sampler's slope is constant."""
    mode = GaussianMixture(means=torch.zeros(1, 1, dtype=torch.float64), std=std)
    slope = integrate(mode, torch.ones(1, 1, dtype=torch.float64), steps=10).item()
    return math.log(0.01) / math.log(1.0 - step * slope)


def affine_findings() -> list[Finding]:
    """[T-O1, T-O2] fixtures with an exact bound."""
    found = []
    for std in (0.2, 0.5, 2.0):
        velocity = GaussianMixture(means=torch.tensor([[3.0, 1.0]], dtype=torch.float64), std=std)
        noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)

        def sampler(z: torch.Tensor, velocity: GaussianMixture = velocity) -> torch.Tensor:
            return integrate(velocity, z, steps=10)

        limit = step_size_bound(sampler, noise, radius=0.5, generator=seeded(1)).limit
        goal = toward(sampler(noise.flip(0)))
        below, above = (optimise_noise(sampler, noise, goal, step_size=f * limit, iterations=200, tolerance=1e-5)
                        for f in (0.5, 1.05))  # fmt: skip
        holds = below.stopped == "converged" and above.history[-1] > above.history[0]
        found.append(Finding(f"T-O1 one Gaussian s={std}: 0.5x bound converges, 1.05x grows", holds,
                             f"bound {limit:.3f}, slope {2 / limit:.3f}"))  # fmt: skip
    angle = math.radians(100)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    try:
        step_size_bound(lambda z: z @ turn, torch.randn(64, 2, generator=seeded()), generator=seeded(1))
        refused = False
    except NotContractive:
        refused = True
    return [*found, Finding("T-O2 a rotation by 100 degrees has no step size", refused, "")]


def flowopt_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-O1 to T-O6] inversion by the sampler as a black box."""
    found = affine_findings()
    velocity, draw = GaussianMixture(means=0.5 * MODES_16D, std=0.8), seeded()
    graph = []

    def sampler(z: torch.Tensor) -> torch.Tensor:
        graph.append(torch.is_grad_enabled())
        return integrate(velocity, z, steps=10)

    truth = torch.randn(256, 16, generator=draw)
    start = truth + 0.5 * torch.randn(256, 16, generator=draw)
    goal = sampler(truth)
    first = (sampler(start) - goal).square().mean(1).sqrt()
    bound = step_size_bound(sampler, torch.randn(4000, 16, generator=draw), quantile=0.0, generator=draw).limit
    graph.clear()
    # A small draw of the bound asks for more than the spec's 200 iterations, so there they follow from the step.
    for limit, budget in ((SPEC_BOUND, 200), (bound, None)):
        for step in (0.35 * limit, 0.75 * limit):
            needed = iterations_needed(step, std=0.8)
            iterations = budget or math.ceil(1.05 * needed)
            end = optimise_noise(sampler, start, toward(goal), step_size=step, iterations=iterations)
            reached = (end.error < 0.01 * first).double().mean().item()
            claim = f"T-O3 {step / limit:.2f} of the bound {limit:.3f}: all reach 1% in {iterations} iterations"
            figures = f"{reached:.1%}; one mode's slope needs {needed:.0f}"
            found.append(Finding(claim, reached == 1.0, figures))
    found.append(Finding("T-O4 no autograd graph is built", not any(graph), f"{len(graph)} samplings"))
    noise = start
    with torch.no_grad():
        for _ in range(100):
            noise = noise - 12.6 * SPEC_BOUND * (sampler(noise) - goal)
    worse = ((sampler(noise) - goal).square().mean(1).sqrt() > first).double().mean().item()
    found.append(Finding("T-O3 1.6, over 12 times the spec's bound: over half end worse than they began",
                         worse > 0.5, f"{worse:.1%}"))  # fmt: skip
    mask = (torch.arange(16) < 6).float()
    masked = optimise_noise(sampler, start, toward(goal, mask=mask), step_size=0.1, iterations=60)
    before, after = (((x - goal)[:, :6]).square().mean().sqrt().item() for x in (sampler(start), masked.output))
    found.append(Finding("T-O5 masked prefix: error falls, other noise bit-identical",
                         after < 0.2 * before and torch.equal(masked.noise[:, 6:], start[:, 6:]),
                         f"{before:.3f} -> {after:.4f}"))  # fmt: skip
    near = (sampler(uni_inversion(velocity, goal, grid=uniform_grid(10))) - goal).square().mean().sqrt().item()
    far = (sampler(torch.randn(256, 16, generator=draw)) - goal).square().mean().sqrt().item()
    found.append(Finding("T-O6 UniInv starts closer than fresh noise", near < far, f"{near:.3f} against {far:.3f}"))
    return found


def plain_network_finding() -> Finding:
    """[T-F2] one segment without a trunk against the same blocks called by hand."""
    torch.manual_seed(0)
    model = BlockwiseVelocity(Shape(depth=3).config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    draw = seeded()
    data, goal = bimodal_chunks(64, draw)
    path = straight_path(torch.randn(data.shape, generator=draw), data, torch.rand(64, generator=draw))
    with torch.no_grad():
        active = torch.nn.functional.silu(model.condition_in(goal) + model.time_embed(path.t))[:, None]
        h, shared = model.velocity_in(path.x_t), model.shared(active)
        for block in model.stacks[0]:
            h = block(h, active, shared, model.angles)
        shift, scale = model.out_modulation(active).chunk(2, -1)
        plain = model.out(torch.nn.functional.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        losses = [flow_matching_loss(v, path.target).item() for v in (model(path.x_t, path.t, goal), plain)]
    return Finding("T-F2 one segment without a trunk has the plain network's loss",
                   math.isclose(*losses, rel_tol=1e-5), f"{losses[0]:.6f} and {losses[1]:.6f}")  # fmt: skip


def blockwise_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-F1 to T-F6] blockwise networks against the plain one on bimodal chunks."""
    shapes = Shape(depth=6), Shape(depth=6, segments=4)
    ratios, flops, residuals, identical, fed = [], [0, 0], [], True, True
    for seed in range(max(3, seeds)):  # the error of T-F5 is a mean of three at least
        torch.manual_seed(seed)
        draw = seeded(seed)
        plain, blockwise = (BlockwiseVelocity(shape.config()) for shape in shapes)
        train(plain, steps=steps // 2, draw=draw)
        train(blockwise, steps=steps // 2, draw=draw)
        own = {id(p) for p in blockwise.residual_parameters()}
        before = [p.clone() for p in blockwise.parameters() if id(p) not in own]
        fed &= all(bool(p.abs().sum() > 0) for p in (stack[0].expand.weight for stack in blockwise.stacks))
        residuals.append(train_residual(blockwise, steps=max(steps // 4, 2), draw=draw))
        after = [p for p in blockwise.parameters() if id(p) not in own]
        identical &= all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        goal = bimodal_chunks(2048, draw).goal
        noise = torch.randn(2048, 1, 16, generator=draw)
        errors = []
        for i, (model, mode) in enumerate(((plain, "full"), (blockwise, "residual"))):
            flops[i] = sampling_flops(model, 16, mode)
            errors.append(chunk_error(sample(model, noise, goal, 16, mode), goal))
        ratios.append(errors[1] / errors[0])
    ends = {
        (steps, mode): sample(blockwise, noise, goal, steps, mode) for steps in (4, 8) for mode in ("full", "residual")
    }
    exact = torch.equal(ends[4, "full"], ends[4, "residual"])
    apart = not torch.equal(ends[8, "full"], ends[8, "residual"])
    mean = sum(ratios) / len(ratios)
    residual, held = (sum(r[i] for r in residuals) / len(residuals) for i in (0, 1))
    return [
        Finding("T-F1 every segment's stack has learned", fed, "zero-initialised gates have moved"),
        plain_network_finding(),
        Finding("T-F3 one step a segment ends alike with and without the approximation, two do not", exact and apart,
                f"difference at two {root_mean_square(ends[8, 'full'] - ends[8, 'residual']):.1e}"),
        Finding("T-F4 residual error < 0.95 of holding", residual < 0.95 * held, f"{residual:.4f} against {held:.4f}"),
        Finding("T-F5 16 steps: <= 0.8 of the plain FLOPs at <= 1.15 of its error", flops[1] <= 0.8 * flops[0] and
                mean <= 1.15, f"FLOPs {flops[1] / flops[0]:.2f}, error {mean:.2f} of plain, {len(ratios)} seeds"),
        Finding("T-F6 stage 2 leaves the rest bit-identical", identical, ""),
    ]  # fmt: skip


def latent_flops_finding() -> Finding:
    """[T-L4] one network on the pixels of 16 x 16 pictures and on latents of a quarter of the side.

    It does not mix tokens: the FLOPs of attention, which would fall by more, are not counted on a CPU.
    """
    flops = []
    for side, channels in ((16, 3), (4, 4)):
        model = BlockwiseVelocity(
            BlockwiseConfig(channels=channels, width=64, heads=2, grid=(side, side), trunk_depth=0, velocity_depth=4,
                            residual_depth=0, borders=(0.0, 1.0), condition_dim=1, modulation_rank=16, align_dim=0,
                            mixing="none")
        ).eval()  # fmt: skip
        bound, noise = model.bind(torch.zeros(1, 1)), torch.zeros(1, side * side, channels)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            end = integrate(bound, noise, steps=10)
            if side == 4:
                end.flatten(1) @ torch.zeros(4 * 4 * 4, 16 * 16 * 3)  # a linear decoder
        flops.append(counter.get_total_flops())
    fall = flops[0] / flops[1]
    return Finding("T-L4 FLOPs of a sample fall by the latent ratio, 16, within 5%, decoding included",
                   0.95 < fall / 16 < 1.05,
                   f"{flops[0]:,} -> {flops[1]:,}, {fall:.1f} times")  # fmt: skip


def latent_properties(steps: int, seeds: int) -> list[Finding]:
    """[T-L1 to T-L4] a linear autoencoder whose decoder's Lipschitz constant is known, and FLOPs."""
    draw = seeded()
    basis, _ = torch.linalg.qr(torch.randn(12, 4, generator=draw))
    sizes = torch.tensor([5.0, 3.0, 1.0, 0.5])
    images = torch.randn(512, 4, generator=draw) * sizes @ basis.T + 0.05 * torch.randn(512, 12, generator=draw)
    latents = images @ basis
    scaler = LatentScaler.fit(latents)
    scaled = scaler.scale(latents)
    back = (scaler.unscale(scaled) @ basis.T - latents @ basis.T).abs().max().item()
    made = scaler.unscale(torch.randn(512, 4, generator=draw))
    left = wasserstein2_squared(images, made @ basis.T) ** 0.5
    right = wasserstein2_squared(images, latents @ basis.T) ** 0.5 + wasserstein2_squared(latents, made) ** 0.5
    spread = scaled.std(0)
    return [
        Finding("T-L1 scaled latents have unit spread", bool(((spread > 0.9) & (spread < 1.1)).all()),
                f"{spread.min():.3f} to {spread.max():.3f}"),
        Finding("T-L2 decoding is not changed by scaling and back", back < 1e-4, f"{back:.1e}"),
        Finding("T-L3 W2(data, decoded) <= W2(data, reconstructed) + L W2(latents, made)", left <= right,
                f"{left:.3f} <= {right:.3f} with L=1"),
        latent_flops_finding(),
    ]  # fmt: skip


PARTS: dict[str, Callable[[int, int], list[Finding]]] = {
    "blockwise": blockwise_properties,  # the longest first
    "coupling": coupling_properties,
    "condition": condition_properties,
    "straighten": straightening_properties,
    "flowopt": flowopt_properties,
    "boss": bellman_properties,
    "weights": weight_limits,
    "latent": latent_properties,
}


class Part(NamedTuple):
    """What came of one part: its findings, what it printed, and the time it took [s]."""

    findings: list[Finding]
    printed: str
    wall: float
    processor: float


def measure_part(name: str, steps: int, seeds: int) -> Part:
    """Run one part on one thread."""
    torch.set_num_threads(1)
    printed, started, worked = io.StringIO(), time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(printed):
        findings = PARTS[name](steps, seeds)
    return Part(findings, printed.getvalue(), time.perf_counter() - started, time.process_time() - worked)


def main() -> int:
    """Measure, print, and return 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--steps", type=int, default=2500, help="training steps of the toys")
    parser.add_argument("--seeds", type=int, default=2, help="of the couplings; blockwise networks take at least 3")
    parser.add_argument("--jobs", type=int, default=2, help="parts that run at the same time, one thread each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun, cpu, rows = time.perf_counter(), 0.0, []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(measure_part, name, options.steps, options.seeds): name for name in options.only or PARTS
        }
        for future in as_completed(running):
            name, part = running[future], future.result()
            cpu += part.processor
            print(f"{name}  ({(PARTS[name].__doc__ or '').splitlines()[0]})\n{part.printed}", end="")
            for f in part.findings:
                print(f"  {'holds' if f.holds else 'FAILS'}  {f.name}  {f.figures}")
            print(f"    {part.wall:.0f} s, {part.processor:.0f} s of processor time", flush=True)
            rows += [{"part": name, **f._replace(holds=bool(f.holds))._asdict()} for f in part.findings]
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    held = sum(row["holds"] for row in rows)
    print(f"{held} of {len(rows)} hold; {time.perf_counter() - begun:.0f} s, {cpu:.0f} s of processor time")
    return 0 if held == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
