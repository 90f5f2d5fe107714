"""Action decoding with the prefix computed once, against recomputing it at every solver step.

Usage: python benchmarks/cached_decoding.py [--threads 2] [--repeats 10]
Prints one JSON line. The prefix has 256 picture tokens and the few others of the sequence; ten Euler steps, 14 actions.
"""

import json
import platform
import statistics
import time
from dataclasses import dataclass, replace

import torch
import tyro

from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.sizes import policy_config
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_config import BackboneConfig

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SPEC = ActionSpec(names=NAMES, frame="base_delta", rotation="euler_xyz", gripper="open_is_1", rate=20.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Threads, repeats, network width and depth, Euler steps."""

    threads: int = 2
    repeats: int = 10
    width: int = 512
    layers: int = 8
    steps: int = 10


def median_ms(function, repeats: int) -> float:
    """Median wall-clock time of a call [ms], after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main(settings: Settings) -> None:
    """Time both and compare their results."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    width = settings.width
    config = replace(
        policy_config("small", SPEC, cameras=("eye",), camera_size=256),
        image=ImageTokensConfig(backbone="resnet10t", size=256, width=width, stage=3),
        backbone=BackboneConfig(width=width, layers=settings.layers, heads=width // 64, mlp=width * 8 // 3 // 8 * 8),
        decoder=ActionDecoderConfig(width=width),
        crop=(0, 0),
        words=("pick", "it", "up"),
    )
    model = VipraPolicy(config).eval()
    inputs = PolicyInput(
        torch.randint(0, 256, (1, 1, 1, 256, 256, 3), dtype=torch.uint8), torch.zeros(1, 0), torch.tensor([[2, 3, 4]])
    )
    noise, solver = torch.randn(1, 14, 7), SolverSettings(method="euler", steps=settings.steps)
    difference = (model.sample(inputs, noise, solver) - model.sample_uncached(inputs, noise, solver)).abs().max()
    cached = median_ms(lambda: model.sample(inputs, noise, solver), settings.repeats)
    uncached = median_ms(lambda: model.sample_uncached(inputs, noise, solver), settings.repeats)
    result = {
        "prefix_tokens": model.embed_prefix(inputs)[0].shape[1],
        "parameters_million": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "cached_ms": round(cached, 2),
        "uncached_ms": round(uncached, 2),
        "speedup": round(uncached / cached, 2),
        "largest_difference": float(difference),
        "threads": settings.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Settings))
