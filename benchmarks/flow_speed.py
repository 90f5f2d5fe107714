"""Time of one sampling by headrace, diffusers and torchcfm (torchdyn) on the same network, interleaved in one run.

    python benchmarks/flow_speed.py --rounds 30 --compile

Medians with the interquartile range of wall-clock time, and the median processor time, which other programs on the same
machine disturb less. The network's own time is measured as well, so what is left is the sampler's.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headrace.flow.diffusers_import import sigmas_of, to_diffusers
from headrace.flow.solver import integrate, uniform_grid

STEPS = 10


class Times(NamedTuple):
    """Wall-clock and processor times of one sampling [ms]."""

    wall: list[float]
    worked: list[float]


class Network(nn.Module):
    """A small velocity network over (B, 64) states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(65, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity from noise to data."""
        return self.layers(torch.cat([x, t[:, None]], 1))


def ours(network: Network) -> Callable[[Tensor], Tensor]:
    """headrace, Euler."""
    return lambda x: integrate(network, x, steps=STEPS)


def network_only(network: Network) -> Callable[[Tensor], Tensor]:
    """Ten calls of the network and nothing else: the floor."""
    times = [torch.full((1,), k / STEPS) for k in range(STEPS)]

    def run(x: Tensor) -> Tensor:
        for t in times:
            network(x, t.expand(len(x)))
        return x

    return run


def diffusers_euler(network: Network) -> Callable[[Tensor], Tensor]:
    """diffusers' flow-matching Euler scheduler; its time is the noise level, so the velocity is turned round."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, sigmas = FlowMatchEulerDiscreteScheduler(shift=1.0), sigmas_of(uniform_grid(STEPS))
    theirs = to_diffusers(network)

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(sigmas=sigmas)
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t.expand(len(x))), t, x).prev_sample
        return x

    return run


def torchcfm_euler(network: Network) -> Callable[[Tensor], Tensor]:
    """torchdyn's NeuralODE as torchcfm's examples use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdyn.core import NeuralODE

    class Wrapped(nn.Module):
        """torchdyn's argument order."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
            """Velocity at one scalar time."""
            return self.network(x, t.expand(len(x)))

    ode = NeuralODE(Wrapped(), solver="euler", sensitivity="adjoint")
    span = torch.linspace(0, 1, STEPS + 1)
    return lambda x: ode.trajectory(x, t_span=span)[-1]


def compiled(network: Network) -> Callable[[Tensor], Tensor]:
    """headrace, the whole sampler as one graph; `fullgraph` makes a graph break an error."""
    return torch.compile(ours(network), fullgraph=True)


def interleaved(samplers: dict[str, Callable[[Tensor], Tensor]], noise: Tensor, rounds: int) -> dict[str, Times]:
    """Times of one sampling by each, taking turns [ms]."""
    found = {name: Times([], []) for name in samplers}
    for _ in range(rounds):
        for name, run in samplers.items():
            started, began = time.perf_counter(), time.process_time()
            for _ in range(5):
                run(noise)
            found[name].worked.append((time.process_time() - began) / 5 * 1e3)
            found[name].wall.append((time.perf_counter() - started) / 5 * 1e3)
    return found


@torch.no_grad()
def main() -> None:
    """Interleave the samplers and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="also headrace under torch.compile; needs a C++ compiler"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for width in (64, 1024):
        network = Network(width).eval()
        samplers = {"network only": network_only(network), "headrace": ours(network),
                    "diffusers": diffusers_euler(network), "torchcfm": torchcfm_euler(network)}  # fmt: skip
        if options.compile:
            samplers["compiled"] = compiled(network)
        noise = torch.randn(options.batch, 64)
        ends = {name: run(noise) for name, run in samplers.items() if name != "network only"}
        for name, end in ends.items():
            torch.testing.assert_close(end, ends["headrace"], atol=1e-4, rtol=1e-4, msg=f"{name} ends elsewhere")
        spent = interleaved(samplers, noise, options.rounds)
        print(f"\nwidth {width}, batch {options.batch}, {STEPS} Euler steps, {options.threads} threads [ms]")
        for name, times in spent.items():
            low, middle, high = statistics.quantiles(times.wall, n=4)
            print(f"  {name:<13} wall best {min(times.wall):.3f}, median {middle:.3f} (quartiles {low:.3f} to "
                  f"{high:.3f}), processor {statistics.median(times.worked):.3f}")  # fmt: skip
        rivals = [statistics.median(spent[name].wall) for name in ("diffusers", "torchcfm")]
        holds = statistics.median(spent["headrace"].wall) <= min(rivals)
        print(f"  headrace is {'at least as fast as' if holds else 'SLOWER than'} the faster of diffusers and torchcfm")


if __name__ == "__main__":
    main()
