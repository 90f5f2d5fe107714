"""How fast ViPRA's two heads act: latency of a chunk, replanning rate and action rate, each with and without the cache.

Usage: python benchmarks/vipra_latency.py [--threads 2] [--repeats 10] [--width 512 --layers 8] [--execute 7]
Prints one JSON line per head. Three numbers that are easily confused: `chunk_ms`, from an observation to its actions;
`replan_hz`, how often a policy can look again, 1000 / chunk_ms; `action_hz`, `execute` times that, the actions carried
out per second of thinking and so the highest control rate at which the next chunk is there in time. Only the second
says how fast the policy reacts.
"""

import json
import platform
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import tyro
from cached_decoding import Settings as Shape
from cached_decoding import median_ms, network

from headrace.flow.solver import SolverSettings
from headrace.robot.action_bins import ActionBinsConfig
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_bins import VipraBins, VipraBinsConfig
from headrace.robot.vipra_config import ActorConfig, shared_fields


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Threads, repeats, network, Euler steps, bins, and actions carried out of a chunk of 14."""

    threads: int = 2
    repeats: int = 10
    width: int = 512
    layers: int = 8
    steps: int = 10
    bins: int = 256
    execute: int = 7


def rates(chunk_ms: float, execute: int) -> dict[str, float]:
    """The three figures of one latency."""
    replan = 1000 / chunk_ms
    figures = {"chunk_ms": chunk_ms, "replan_hz": replan, "action_hz": execute * replan}
    return {name: round(value, 2) for name, value in figures.items()}


@torch.inference_mode()
def write_uncached(model: VipraBins, inputs: PolicyInput) -> torch.Tensor:
    """`VipraBins.sample` with the whole sequence computed anew for every number."""
    count, width = model.config.bins.dim, model.config.bins.dim + 1
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for place in range(model.config.horizon * width):
        if place % width == count:
            chosen = torch.full((1, 1), model.config.bins.bins)
        else:
            logits = model.logits_uncached(inputs, ids)[:, place, : model.config.bins.bins]
            chosen = logits.masked_fill(~model.bins.allowed[place % width], -torch.inf).argmax(-1, keepdim=True)
        ids[:, place : place + 1] = chosen
        ids = torch.cat((ids, ids.new_zeros(1, 1)), 1)
    numbers = ids[:, :-1].unflatten(1, (model.config.horizon, width))[..., :count]
    return model.bins.decode(numbers)


def report(head: str, settings: Settings, cached: float, uncached: float, difference: float) -> dict[str, Any]:
    """A line of output."""
    return {
        "head": head,
        "cached": rates(cached, settings.execute),
        "uncached": rates(uncached, settings.execute),
        "speedup": round(uncached / cached, 2),
        "largest_difference": difference,
        "execute": settings.execute,
        "threads": settings.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main(settings: Settings) -> None:
    """Time both heads of one network, batch 1, float32."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    timing = Shape(width=settings.width, layers=settings.layers, repeats=settings.repeats)
    config = network(timing)
    inputs = PolicyInput(
        torch.randint(0, 256, (1, 1, 1, 256, 256, 3), dtype=torch.uint8), torch.zeros(1, 0), torch.tensor([[2, 3, 4]])
    )
    flow, noise = VipraPolicy(config).eval(), torch.randn(1, 14, 7)
    solver = SolverSettings(method="euler", steps=settings.steps)
    difference = (flow.sample(inputs, noise, solver) - flow.sample_uncached(inputs, noise, solver)).abs().max()
    cached = median_ms(lambda: flow.sample(inputs, noise, solver), timing)
    uncached = median_ms(lambda: flow.sample_uncached(inputs, noise, solver), timing)
    print(json.dumps(report("flow", settings, cached, uncached, float(difference))), flush=True)

    edges = tuple(i / settings.bins * 2 - 1 for i in range(settings.bins + 1))
    middles = tuple((a + b) / 2 for a, b in pairwise(edges))
    table = ActionBinsConfig(edges=(edges,) * 7, values=(middles,) * 7)
    bins = VipraBins(VipraBinsConfig(**shared_fields(config, ActorConfig), bins=table)).eval()
    difference = (bins.sample(inputs) - write_uncached(bins, inputs)).abs().max()
    cached = median_ms(lambda: bins.sample(inputs), timing)
    uncached = median_ms(lambda: write_uncached(bins, inputs), replace(timing, repeats=1))
    print(json.dumps(report("bins", settings, cached, uncached, float(difference))))


if __name__ == "__main__":
    main(tyro.cli(Settings))
