"""Action decoding with the prefix computed once, against recomputing it at every solver step.

Usage: python benchmarks/cached_decoding.py [--threads 2] [--repeats 10] [--width 512] [--layers 8]
       python benchmarks/cached_decoding.py --shape published --layers 2 --repeats 3
Prints one JSON line; ten Euler steps, 14 actions. `small` has 256 picture tokens and the few others of the sequence,
and the width and depth asked for. `published` is ViPRA's shape (two frames of 256 tokens from DINOv2-B/14, 128 text
tokens, width 4096) with as few of its 32 equal layers as memory allows: the picture encoder, which both paths run once,
weighs more in such a run than in the whole model. Operations are counted for the layers that are there.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.sizes import policy_config
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_config import BackboneConfig

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SPEC = ActionSpec(names=NAMES, frame="base_delta", rotation="euler_xyz", gripper="open_is_1", rate=20.0)
TEXT_TOKENS = 128  # to which the released code pads instructions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the network, threads, repeats, Euler steps; `width` is for the small shape only.

    `clock`: `processor` counts the time of this process on its cores, which other work disturbs least; it
    equals the wall clock at one thread on an idle machine.
    """

    shape: Literal["small", "published"] = "small"
    threads: int = 2
    repeats: int = 10
    width: int = 512
    layers: int = 8
    steps: int = 10
    clock: Literal["wall", "processor"] = "wall"


def median_ms(function: Callable[[], object], settings: Settings) -> float:
    """Median time of a call [ms], after one call that is not counted."""
    now = time.perf_counter if settings.clock == "wall" else time.process_time
    function()
    times = []
    for _ in range(settings.repeats):
        started = now()
        function()
        times.append((now() - started) * 1e3)
    return statistics.median(times)


def network(settings: Settings) -> VipraConfig:
    """The network's config."""
    if settings.shape == "published":
        config = policy_config("published", SPEC, cameras=("eye",))
        words = tuple(f"word{i}" for i in range(TEXT_TOKENS))
        return replace(config, backbone=replace(config.backbone, layers=settings.layers), words=words)
    width = settings.width
    return replace(
        policy_config("small", SPEC, cameras=("eye",), camera_size=256),
        image=ImageTokensConfig(backbone="resnet10t", size=256, width=width, stage=3),
        backbone=BackboneConfig(width=width, layers=settings.layers, heads=width // 64, mlp=width * 8 // 3 // 8 * 8),
        decoder=ActionDecoderConfig(width=width),
        crop=(0, 0),
        words=("pick", "it", "up"),
    )


def operations(function: Callable[[], Tensor]) -> float:
    """Multiply-adds of matrix products and convolutions in a call, counted as two operations each [GFLOP]."""
    with FlopCounterMode(display=False) as counter:
        function()
    return round(counter.get_total_flops() / 1e9, 2)


def main(settings: Settings) -> None:
    """Time both and compare their results."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    config = network(settings)
    model = VipraPolicy(config).eval().requires_grad_(False)
    shape = (1, 1, len(config.history), config.camera_size, config.camera_size, 3)
    text = torch.arange(2, 2 + len(config.words))[None]
    inputs = PolicyInput(torch.randint(0, 256, shape, dtype=torch.uint8), torch.zeros(1, 0), text)
    noise, solver = torch.randn(1, 14, 7), SolverSettings(method="euler", steps=settings.steps)
    cached = lambda: model.sample(inputs, noise, solver)  # noqa: E731
    uncached = lambda: model.sample_uncached(inputs, noise, solver)  # noqa: E731
    difference = (cached() - uncached()).abs().max()
    cached_ms, uncached_ms = median_ms(cached, settings), median_ms(uncached, settings)
    result = {
        "shape": settings.shape,
        "width": config.backbone.width,
        "layers": settings.layers,
        "prefix_tokens": model.embed_prefix(inputs)[0].shape[1],
        "parameters_million": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "pictures_ms": round(median_ms(lambda: model.embed_prefix(inputs), settings), 2),
        "cached_ms": round(cached_ms, 2),
        "uncached_ms": round(uncached_ms, 2),
        "speedup": round(uncached_ms / cached_ms, 2),
        "cached_gflop": operations(cached),
        "uncached_gflop": operations(uncached),
        "largest_difference": float(difference),
        "threads": settings.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Settings))
