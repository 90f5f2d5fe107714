"""Time and peak memory of TokenFlow's quantiser against the straightforward one-hot version of the same formulas.

Each method runs in a process of its own on the same random tensors, so that peaks do not mix:

    OMP_NUM_THREADS=2 python benchmarks/tokenflow_search.py --repeats 5 --out search.json

`--no-entropy` leaves the entropy term out of the one-hot version; the release computes it, in evaluation too.
"""

import json
import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from headrace.tokenizers.tokenflow import XL_SCALES


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    scales: tuple[int, ...] = XL_SCALES
    codes: int = 32768
    batch: int = 1
    repeats: int = 5
    threads: int = 2
    seed: int = 0
    entropy: bool = True
    out: Path | None = None


def one_hot_quantize(
    features: torch.Tensor, books: list[torch.Tensor], scales: tuple[int, ...], *, entropy: bool
) -> torch.Tensor:
    """Section 3 of the paper as written: full distances, an entropy term and a one-hot product at every scale."""
    dims = [book.shape[1] for book in books]
    residual, codes = features, []
    for side in scales:
        pooled = F.interpolate(residual, size=(side, side), mode="area")
        flat = pooled.permute(0, 2, 3, 1).reshape(-1, sum(dims))
        parts = [F.normalize(part, dim=-1) for part in flat.split(dims, dim=1)]
        units = [F.normalize(book, dim=-1) for book in books]
        distance = sum(
            (part**2).sum(1, keepdim=True) + (unit**2).sum(1) - 2 * part @ unit.T
            for part, unit in zip(parts, units, strict=True)
        )
        if entropy:
            share = torch.softmax(-distance / 0.01, dim=-1)
            -(share * torch.log_softmax(-distance / 0.01, dim=-1)).sum(-1).mean()
        index = distance.argmin(1)
        hot = torch.zeros(len(index), len(books[0])).scatter_(1, index[:, None], 1)
        chosen = torch.cat([hot @ unit for unit in units], dim=1).view(len(features), side, side, -1)
        residual = residual - F.interpolate(chosen.permute(0, 3, 1, 2), size=features.shape[-2:], mode="bicubic")
        codes.append(index.view(len(features), -1))
    return torch.cat(codes, 1)


def measure(method: str, options: Benchmark) -> dict:
    """Seconds of each repeat, growth of the peak resident size [MiB] and the codes, in a fresh process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = MultiScaleConfig(scales=options.scales, codes=options.codes)
    quantizer = MultiScaleQuantizer(config).eval()
    books = [book.detach() for book in quantizer.books]
    features = torch.randn(options.batch, config.dim, config.grid, config.grid)

    def run() -> torch.Tensor:
        with torch.no_grad():
            if method == "fused":
                return quantizer(features).codes
            return one_hot_quantize(features, books, options.scales, entropy=options.entropy)

    MultiScaleQuantizer(MultiScaleConfig(scales=(1, 2), codes=64))(torch.randn(1, 40, 2, 2))  # start thread pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = run()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = []
    for _ in range(options.repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return {"method": method, "seconds": seconds, "peak_mib": peak, "codes": codes.flatten().tolist()}


def main(options: Benchmark) -> None:
    context = multiprocessing.get_context("spawn")
    results = {}
    for method in ("fused", "one_hot"):
        with context.Pool(1) as pool:
            results[method] = pool.apply(measure, (method, options))
    fused, plain = results["fused"], results["one_hot"]
    same = float(np.mean(np.array(fused.pop("codes")) == np.array(plain.pop("codes"))))
    report = {
        "scales": options.scales,
        "codes": options.codes,
        "batch": options.batch,
        "seed": options.seed,
        "threads": options.threads,
        "entropy": options.entropy,
        "torch": torch.__version__,
        "results": results,
        "same_codes": same,
        "speedup_of_medians": float(np.median(plain["seconds"]) / np.median(fused["seconds"])),
        "memory_ratio": plain["peak_mib"] / max(fused["peak_mib"], 1e-9),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
