"""FlowTok sampling against a diffusion transformer on a 2D latent of the same depth and width, at 256 px, side by side.

FlowTok carries 77 tokens of 16 numbers and decodes them with its transformer. The peer carries a 32 x 32 x 4 latent,
cut into 2 x 2 patches (256 tokens, as DiT-XL/2 and PixArt-alpha) or 1 x 1 (1024 tokens: every cell of the latent), with
the same blocks and conditioning, and decodes with a VQGAN decoder of factor 8. Same Euler steps and guidance, two
network calls per step in one batch, text encoding left out on both sides. Weights are random: speed does not depend on
them. Steps cost alike, so `--timed-steps` of them may stand for all. Rounds alternate.

    OMP_NUM_THREADS=2 python benchmarks/flowtok_sampling_speed.py --size b --rounds 3
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from headrace.nn.dit import SequenceDiT, SequenceDiTConfig
from headrace.tokenizers.flowtok_bridge import transport
from headrace.tokenizers.flowtok_config import NETS, published_net
from headrace.tokenizers.flowtok_image import TokenVAE, TokenVAEConfig
from headrace.tokenizers.vqgan import VQGANConfig, VQGANDecoder

LATENT_SIDE, LATENT_CHANNELS = 32, 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    size: Literal["s", "b", "l", "xl"] = "b"
    steps: int = 20
    guidance: float = 2.0
    timed_steps: int = 20
    rounds: int = 3
    threads: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"


def plane_net(size: str, patch: int) -> SequenceDiT:
    """The same transformer over the patches of a 2D latent."""
    width, depth, heads = NETS[size]
    tokens = (LATENT_SIDE // patch) ** 2
    channels = LATENT_CHANNELS * patch * patch
    return SequenceDiT(
        SequenceDiTConfig(tokens=tokens, channels=channels, width=width, depth=depth, heads=heads)
    ).eval()


def seconds(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Processor time of all threads and wall-clock time of one call; on a busy machine compare the former."""
    processor, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - processor, time.perf_counter() - wall


def summary(times: list[dict[str, tuple[float, float]]], index: int, factor: float) -> dict[str, object]:
    """Medians [s] and ratios to FlowTok of one of the two clocks; `factor` is steps over timed steps."""
    medians = {name: torch.tensor([row[name][index] for row in times]).median().item() for name in times[0]}
    medians = {name: value * (factor if name.endswith("flow") else 1) for name, value in medians.items()}
    ours = medians["flowtok_flow"] + medians["flowtok_decoder"]
    ratios = {}
    for patch in (1, 2):
        theirs = medians[f"plane_patch{patch}_flow"] + medians["plane_decoder"]
        ratios[f"patch{patch}_flow_alone"] = round(medians[f"plane_patch{patch}_flow"] / medians["flowtok_flow"], 2)
        ratios[f"patch{patch}_with_decoder"] = round(theirs / ours, 2)
    return {"seconds": {name: round(value, 3) for name, value in medians.items()}, "ratio": ratios}


@torch.no_grad()
def measure(options: Options) -> dict[str, object]:
    """Seconds per image: flow alone, decoder alone, and the ratios to FlowTok, by processor time and by the wall."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = SequenceDiT(published_net(options.size)).eval()
    vae = TokenVAE(TokenVAEConfig()).eval()
    planes = {patch: plane_net(options.size, patch) for patch in (1, 2)}
    conv = VQGANDecoder(VQGANConfig(multipliers=(1, 2, 4, 4), latent=LATENT_CHANNELS)).eval()
    text = torch.randn(1, 77, 768)

    def flow(which: SequenceDiT, steps: int = options.timed_steps) -> Tensor:
        source = torch.randn(1, which.config.tokens, which.config.channels)
        return transport(which, source, steps=steps, guidance=options.guidance)

    runs: dict[str, Callable[[], Tensor]] = {
        "flowtok_flow": lambda: flow(net),
        "flowtok_decoder": lambda: vae.decode(torch.randn(1, 77, 16), text),
        "plane_patch1_flow": lambda: flow(planes[1]),
        "plane_patch2_flow": lambda: flow(planes[2]),
        "plane_decoder": lambda: conv(torch.randn(1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        for which in (net, *planes.values()):
            flow(which, steps=1)
        runs["flowtok_decoder"](), runs["plane_decoder"]()
        times = [{name: seconds(run) for name, run in runs.items()} for _ in range(options.rounds)]
    return {
        "size": options.size,
        "steps": options.steps,
        "timed_steps": options.timed_steps,
        "guidance": options.guidance,
        "precision": options.precision,
        "threads": options.threads,
        "rounds": options.rounds,
        "net_parameters": sum(p.numel() for p in net.parameters()),
        "processor": summary(times, 0, options.steps / options.timed_steps),
        "wall": summary(times, 1, options.steps / options.timed_steps),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options)), indent=1))
