"""One-step UniFlow decoding against a VQGAN decoder of about the same number of parameters, at 256 px, side by side.

UniFlow's decoder has the released sizes (width 1024, 6 global blocks, 12 flow blocks) on a 16 x 16 grid of 16 px
patches. The VQGAN decoder is the family's usual one (five levels, factor 16) with width and blocks chosen for the
nearest parameter count that is not above UniFlow's. Weights are random: speed does not depend on them. Rounds
alternate.

    OMP_NUM_THREADS=2 python benchmarks/uniflow_decoder_speed.py --rounds 5
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ViTConfig
from headrace.tokenizers.vqgan import VQGANConfig, VQGANDecoder

SIDE, GRID = 256, 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    rounds: int = 5
    threads: int = 2
    batch: int = 1
    precision: tuple[str, ...] = ("fp32", "bf16")


def parameters(*modules: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def decoder_parts(model: UniFlow) -> list[nn.Module]:
    """What decoding uses."""
    return [model.from_latent, model.global_positions, model.global_blocks, model.decoder_positions, model.flow_head]


def nearest_vqgan(budget: int) -> VQGANConfig:
    """The largest decoder with at most `budget` parameters."""
    candidates = [VQGANConfig(width=width, blocks=blocks) for width in range(128, 289, 32) for blocks in range(1, 5)]
    with torch.device("meta"):
        sizes = {config: parameters(VQGANDecoder(config)) for config in candidates}
    return max((c for c in candidates if sizes[c] <= budget), key=lambda config: sizes[config])


def seconds(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Processor time of all threads and wall-clock time of one call; on a busy machine compare the former."""
    processor, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - processor, time.perf_counter() - wall


def summary(times: list[tuple[tuple[float, float], tuple[float, float]]], index: int) -> dict[str, object]:
    """Medians [s] and ratios of one of the two clocks."""
    ours, theirs = (torch.tensor([row[side][index] for row in times]) for side in (0, 1))
    ratios = theirs / ours
    return {
        "uniflow_s": round(ours.median().item(), 4),
        "vqgan_s": round(theirs.median().item(), 4),
        "ratio_median": round(ratios.median().item(), 2),
        "ratio_range": [round(ratios.min().item(), 2), round(ratios.max().item(), 2)],
    }


@torch.no_grad()
def measure(options: Options) -> dict[str, object]:
    """Median seconds per batch of both decoders, and their ratio, by processor time and by the wall clock."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Decoding never touches the encoder, so one block of it is enough.
    encoder = ViTConfig(tag="", image_size=SIDE, patch=SIDE // GRID, depth=1)
    uniflow = UniFlow(dataclasses.replace(UniFlowConfig(), encoder=encoder)).eval()
    budget = parameters(*decoder_parts(uniflow))
    config = nearest_vqgan(budget)
    vqgan = VQGANDecoder(config).eval()
    latents = torch.randn(options.batch, GRID * GRID, uniflow.config.latent_channels)
    plane = torch.randn(options.batch, config.latent, GRID, GRID)
    assert uniflow.decode(latents).shape == vqgan(plane).shape == (options.batch, 3, SIDE, SIDE)
    out: dict[str, object] = {
        "uniflow_decoder_parameters": budget,
        "vqgan_decoder_parameters": parameters(vqgan),
        "vqgan_config": dataclasses.asdict(config),
        "threads": options.threads,
        "batch": options.batch,
        "rounds": options.rounds,
    }
    for precision in options.precision:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            uniflow.decode(latents), vqgan(plane)
            times = [
                (seconds(lambda: uniflow.decode(latents)), seconds(lambda: vqgan(plane))) for _ in range(options.rounds)
            ]
        out[precision] = {name: summary(times, index) for index, name in enumerate(("processor", "wall"))}
    return out


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options)), indent=1))
