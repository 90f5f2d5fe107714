"""Next-scale generation with the key/value cache against computing the whole sequence anew in every pass.

Three ways, greedy with guidance, at the published 9 scales (817 codes) or another list, on a random language model:

* cached: `headrace.vlm.next_scale_passes.CachedPasses`;
* recomputed: no cache, everything else the same;
* released: as the release does it (ByteVisionLab/TokenFlow, t2i/llava_t2i/model/language_model/llava_llama.py): no
  cache, attention of the kind "eager", and in every pass float32 logits of the whole vocabulary at all positions of
  both branches of the guidance, of which the last scale's are used.

    OMP_NUM_THREADS=2 python benchmarks/tokenflow_generation.py --threads 2 --out generation.json
    python benchmarks/tokenflow_generation.py --count-only --width 4096 --depth 32    # operations of the 7B model

Time is the processor time of this process, so that a busy machine hardly changes the ratio, and the wall-clock time.
Operations are counted by formula; their ratio is what a machine would gain that does nothing else. `--no-released`
leaves the third way out of the timing.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from headrace.vlm.next_scale import NextScaleConfig, NextScaleGenerator, Prompt, positions_of
from headrace.vlm.next_scale_passes import CachedPasses, RecomputedPasses
from headrace.vlm.next_scale_sampling import Sampling, generate_codes, stack


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Sizes; vocabulary and scales are the published ones, depth and width are not.

    Attributes:
        scales, codes, text: Of the tokenizer, and the number of text tokens.
        width, depth: Of the language model; feed-forward layers have Llama's share of the width.
        prompt, unconditional: Tokens of the prompt and of what guidance leads away from.
        passes: Passes over each scale but the first.
        guidance: At the last scale.
        threads, repeats, seed: Of the measurement; the median run counts.
        count_only: Count operations and measure no time.
        released: Time the release's way, too.
        out: JSON file to write.
    """

    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    codes: int = 32768
    text: int = 32000
    width: int = 512
    depth: int = 6
    prompt: int = 128
    unconditional: int = 40
    passes: int = 3
    guidance: float = 7.5
    threads: int = 1
    repeats: int = 1
    seed: int = 0
    count_only: bool = False
    released: bool = True
    out: Path | None = None


class Setting:
    """A model with random weights, its quantiser, and prompts."""

    def __init__(self, options: Benchmark) -> None:
        torch.manual_seed(options.seed)
        config = NextScaleConfig(
            scales=options.scales,
            codes=options.codes,
            feature_dim=40,
            text_vocab=options.text,
            width=options.width,
            depth=options.depth,
            heads=max(options.width // 128, 1),
            hidden=options.width * 11008 // 4096,
        )
        self.model = NextScaleGenerator(config).eval()
        self.quantizer = MultiScaleQuantizer(MultiScaleConfig(scales=options.scales, codes=options.codes)).eval()
        with torch.no_grad():  # the initial 0.02 makes all codes about equally likely
            self.model.language.lm_head.weight.normal_(std=0.5)
            self.model.language.model.embed_tokens.weight.normal_()
        self.options = options
        self.sampling = Sampling.greedy(passes=options.passes, guidance=options.guidance)
        words = [torch.randint(options.text, (n,)).tolist() for n in (options.prompt, options.unconditional)]
        self.prompt, self.nothing = (self.model.pad([ids]) for ids in words)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """What is compared."""

        def ours(passes: type[CachedPasses] | type[RecomputedPasses]) -> Callable[[], Tensor]:
            return lambda: generate_codes(
                self.model,
                self.quantizer,
                self.prompt,
                unconditional=self.nothing,
                sampling=self.sampling,
                passes=passes,
            )

        both = {"cached": ours(CachedPasses), "recomputed": ours(RecomputedPasses)}
        return both | {"released": self.released} if self.options.released else both

    @torch.no_grad()
    def released(self) -> Tensor:
        """Greedy generation in the release's way."""
        model, config = self.model, self.model.config
        both = stack(model, self.prompt, self.nothing)
        codes = torch.zeros(1, 0, dtype=torch.int64, device=model.device)
        model.language.model.config._attn_implementation = "eager"
        for scale, count in enumerate(config.counts):
            strength = self.sampling.guidance * scale / (len(config.scales) - 1)
            fresh = codes
            for number in range(1 if scale == 0 else len(self.sampling.top_k)):
                logits = self._all_logits(both, fresh, refine=number > 0)[:, -count:]
                wanted, unwanted = logits.chunk(2)
                mixed = (1 + strength) * wanted - strength * unwanted
                mixed[..., : config.text_vocab] = -torch.inf
                mixed[..., config.pad] = -torch.inf
                fresh = torch.cat([codes, mixed.argmax(-1) - config.text_vocab], dim=1)
            codes = fresh
        model.language.model.config._attn_implementation = "sdpa"
        return codes

    def _all_logits(self, both: Prompt, codes: Tensor, *, refine: bool) -> Tensor:
        model = self.model
        rows = torch.zeros(2, 0, model.config.feature_dim, device=model.device)
        if codes.shape[1]:
            rows = self.quantizer.next_scale_inputs(codes.repeat(2, 1), refine=refine)
        embeds = torch.cat([model.embed_prompt(both), model.embed_rows(rows, start=1)], dim=1)
        bias = torch.zeros(2, 1, embeds.shape[1], embeds.shape[1], device=model.device)
        bias = bias.masked_fill(~model.mask(both.real, rows.shape[1])[:, None], torch.finfo(bias.dtype).min)
        out = model.language.model(
            inputs_embeds=embeds,
            attention_mask=bias,
            position_ids=positions_of(both.real, rows.shape[1]),
            use_cache=False,
        )
        return model.language.lm_head(out.last_hidden_state).float()


def operations(options: Benchmark) -> dict[str, float]:
    """Multiplications and additions of each way: linear layers, attention, features and logits, for both branches."""
    width, counts = options.width, [side * side for side in options.scales]
    layer = 2 * (4 * width**2 + 3 * width * (width * 11008 // 4096))
    feature = 2 * (40 * width + width**2)  # 40 channels through the projector
    prompt = max(options.prompt, options.unconditional)

    def states(positions: int, keys: int, features: int) -> float:
        return 2 * (options.depth * positions * (layer + 4 * width * keys) + features * feature)

    counted = dict.fromkeys(("cached", "recomputed", "released"), 0.0)
    for scale, count in enumerate(counts):
        rows = sum(counts[:scale]) - 1 + count if scale else 0
        whole = states(prompt + rows, prompt + rows, rows)
        part = states(count if scale else prompt, prompt + rows, count if scale else 0)
        vocabulary = options.text + options.codes + 1
        for _ in range(options.passes if scale else 1):
            counted["cached"] += part + 2 * count * options.codes * width
            counted["recomputed"] += whole + 2 * count * options.codes * width
            counted["released"] += whole + 4 * (prompt + rows) * vocabulary * width
    return counted


def timings(options: Benchmark) -> tuple[dict[str, dict[str, float]], bool]:
    """Median processor and wall-clock seconds of each way, and whether all gave the same codes."""
    torch.set_num_threads(options.threads)
    setting = Setting(options)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in setting.ways()}
    same = True
    for _ in range(options.repeats):
        drawn = []
        for name, way in setting.ways().items():
            start, wall = time.process_time(), time.perf_counter()
            drawn.append(way())
            runs[name].append((time.process_time() - start, time.perf_counter() - wall))
        same = same and all(torch.equal(drawn[0], other) for other in drawn[1:])
    middle = options.repeats // 2
    return {
        name: {"cpu_s": sorted(c for c, _ in pairs)[middle], "wall_s": sorted(w for _, w in pairs)[middle]}
        for name, pairs in runs.items()
    }, same


def main(options: Benchmark) -> None:
    counted = operations(options)
    sizes = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    report: dict = {"options": sizes, "torch": torch.__version__, "operations": counted}
    report["ratio_of_operations"] = {name: counted[name] / counted["cached"] for name in ("recomputed", "released")}
    if not options.count_only:
        seconds, same = timings(options)
        report |= {"seconds": seconds, "identical_codes": same}
        report["speedup"] = {
            name: {kind: seconds[name][kind] / seconds["cached"][kind] for kind in ("cpu_s", "wall_s")}
            for name in seconds
            if name != "cached"
        }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
