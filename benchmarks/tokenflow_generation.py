"""Next-scale generation with the key/value cache against computing the whole sequence anew in every pass.

Greedy, with guidance, at the published 9 scales (817 codes) or another list, on a small random language model. Time is
the processor time of this process on one thread, so that a busy machine does not change the ratio:

    OMP_NUM_THREADS=1 python benchmarks/tokenflow_generation.py --passes 3 --prompt 128 --out generation.json
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from headrace.vlm.next_scale import NextScaleConfig, NextScaleGenerator
from headrace.vlm.next_scale_sampling import Sampling, generate_codes


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    codes: int = 1024
    width: int = 256
    depth: int = 6
    prompt: int = 128
    passes: int = 3
    guidance: float = 7.5
    repeats: int = 1
    seed: int = 0
    out: Path | None = None


def positions_computed(options: Benchmark, cached: bool) -> int:
    """Positions that go through the transformer for one prompt; the ratio of the two is what a large model gains."""
    total, before = options.prompt, 1
    for side in options.scales[1:]:
        own = side * side
        before += own
        total += options.passes * (own if cached else options.prompt + before - 1)
    return total


def main(options: Benchmark) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    sizes = {"width": options.width, "depth": options.depth, "heads": options.width // 64, "hidden": 2 * options.width}
    config = NextScaleConfig(scales=options.scales, codes=options.codes, feature_dim=40, text_vocab=1000, **sizes)
    model = NextScaleGenerator(config).eval()
    with torch.no_grad():
        model.language.lm_head.weight.normal_(std=0.5)
        model.language.model.embed_tokens.weight.normal_()
    quantizer = MultiScaleQuantizer(MultiScaleConfig(scales=options.scales, codes=options.codes)).eval()
    prompt = model.pad([torch.randint(0, 1000, (options.prompt,)).tolist()])
    nothing = model.pad([[1]])
    sampling = Sampling.greedy(passes=options.passes, guidance=options.guidance)
    seconds: dict[str, list[float]] = {"cached": [], "anew": []}
    same = True
    for _ in range(options.repeats):
        drawn = []
        for name in seconds:
            start = time.process_time()
            drawn.append(
                generate_codes(
                    model, quantizer, prompt, unconditional=nothing, sampling=sampling, cached=name == "cached"
                )
            )
            seconds[name].append(time.process_time() - start)
        same = same and torch.equal(*drawn)
    report = {
        "scales": options.scales,
        "codes": options.codes,
        "width": options.width,
        "depth": options.depth,
        "prompt": options.prompt,
        "passes": options.passes,
        "seed": options.seed,
        "torch": torch.__version__,
        "identical_codes": same,
        "cpu_seconds": seconds,
        "speedup": sum(seconds["anew"]) / sum(seconds["cached"]),
        "ratio_of_positions": positions_computed(options, False) / positions_computed(options, True),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
