"""FlowOpt on a trained policy's action chunks: find their noise, steer them to a pose, keep them off a limit.

    python benchmarks/flowopt_chunk.py --policy checkpoints/demo --task PushCube-v1 --episodes 8

The sampler is the policy's own, ten Euler steps. Noise, chunks and residuals are in normalised actions; what a chunk
moves is printed in action units (one is 0.1 m). Every row is one episode's first observation. Prints for each question
the residual before and after, how many episodes came within a tenth of it, and the noise's norm, 1 where training was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from headrace.flow.flowopt import FlowOptStep, NotContractive, optimise_noise, step_size_bound
from headrace.flow.residual import Residual, inside, sums_to, together, toward
from headrace.flow.solver import SolverSettings
from headrace.robot.policy import FlowPolicy, ObservationHistory, load_policy
from headrace.sim.tasks import find_task, make_environment


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to steer.

    Attributes:
        policy: A trained flow-matching policy.
        task: Where its observations come from.
        episodes: Seeds from 0, one observation each.
        shift: How far the summed translation of a chunk is to move along y, in action units.
        steps: Euler steps of the sampler.
        iterations: Most updates.
        patience: Updates without a new low after which a question is left.
    """

    policy: str = "checkpoints/demo"
    task: str = "PushCube-v1"
    episodes: int = 8
    shift: float = 0.5
    steps: int = 10
    iterations: int = 60
    patience: int = 15


def chunk_sampler(policy: FlowPolicy, settings: Settings) -> Callable[[Tensor], Tensor]:
    """Noise (B, H, A) to normalised chunks, one row per episode, with the pictures read once."""
    environment = make_environment(find_task(settings.task))
    seen = [environment.reset(seed) for seed in range(settings.episodes)]
    environment.close()
    history = ObservationHistory(policy.model)
    prefix = policy.model.compute_prefix(history.inputs(seen, list(range(len(seen)))))
    solver = SolverSettings(steps=settings.steps)
    return lambda noise: solver.sample(lambda x, t: policy.model.velocity(prefix, x, t), noise)


def show(step: FlowOptStep) -> None:
    """A line every ten updates."""
    if step.iteration % 10 == 0:
        print(f"    {step.iteration} updates: residual {step.error:.4f}, worst {step.worst:.4f}, "
              f"noise norm {step.noise_norm:.2f}", flush=True)  # fmt: skip


@torch.no_grad()
def main(settings: Settings) -> None:
    """Ask the three questions and print their answers."""
    policy = load_policy(settings.policy)
    if not isinstance(policy, FlowPolicy):
        raise ValueError(f"{settings.policy} follows no flow, so it has no noise to optimise")
    sampler, draw = chunk_sampler(policy, settings), torch.Generator().manual_seed(0)
    decoder, normal = policy.model.config.decoder, policy.model.config.action_normalizer
    start, other = torch.randn(2, settings.episodes, decoder.horizon, decoder.action_dim, generator=draw)
    scale = torch.tensor(normal.scale)
    plain, reachable = sampler(start), sampler(other)
    try:
        bound = step_size_bound(sampler, start, quantile=0.0, generator=draw)
        step = bound.recommended
        print(f"step sizes below {bound.limit:.3f} (median pair {bound.median:.3f}); used: {step:.3f}")
    except NotContractive as error:
        step = 0.2
        print(f"{error}; used: {step}")

    wanted = plain[..., :3].sum(1) + torch.tensor([0.0, settings.shift, 0.0]) / scale[:3]
    low, high = (plain[..., :2].amin((1, 2)) * 0.8)[:, None, None], (plain[..., :2].amax((1, 2)) * 0.8)[:, None, None]
    limits = torch.full_like(plain, torch.inf)
    bottom, top = -limits, limits.clone()
    bottom[..., :2], top[..., :2] = low, high
    questions: dict[str, Residual] = {
        "the noise of a chunk": toward(reachable),
        f"y moved by {settings.shift}": sums_to(wanted, (0, 1, 2)),
        "x and y 20% off their extremes": inside(bottom, top),
        "both": together(sums_to(wanted, (0, 1, 2)), inside(bottom, top)),
    }
    for name, residual in questions.items():
        found = optimise_noise(
            sampler,
            start,
            residual,
            step_size=step,
            iterations=settings.iterations,
            tolerance=1e-3,
            patience=settings.patience,
            progress=show,
        )
        first = residual(plain).flatten(1).square().mean(1).sqrt()
        reached = int((found.error <= 0.1 * first).sum())
        norm = found.noise.flatten(1).norm(dim=1).mean().item() / found.noise[0].numel() ** 0.5
        moved = ((found.output - plain)[..., :3].sum(1) * scale[:3]).mean(0).tolist()
        print(f"{name}: residual {first.mean():.4f} -> {found.error.mean():.4f}, {reached} of {len(first)} within a "
              f"tenth, {len(found.history) - 1} updates ({found.stopped}), noise norm {norm:.2f}, summed x y z moved "
              "by " + " ".join(f"{v:+.2f}" for v in moved), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Settings))
