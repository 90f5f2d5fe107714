"""Time from pixels to the first token, with and without FlowCut, on a LLaVA-shaped model with random weights.

    python benchmarks/flowcut_prefill.py --shape llava --keep 32 --sharpness 1 --out llava.json

Encoder CLIP-L/336 (24 blocks, width 1024, 577 tokens), language model of about 1.1 billion parameters (22 blocks,
width 2048, 32 heads over 4 key/value heads), in bfloat16 where the processor multiplies it natively, else float32.
`--shape llava` reads one crop, `--shape llava-next` five of them, 2880 tokens. What is timed is the encoder, the
projector and the reading of the whole prompt, in one process, methods taking turns; wall time and CPU time are given,
the latter because it depends less on what else is running. Random weights attend almost evenly, which leaves FlowCut's
adaptive schedule little to cut before its last block; `--sharpness` multiplies the encoder's query and key weights to
give rows of attention a shape, and the entropy that results is reported.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from headrace.nn.precision import resolve_precision
from headrace.vlm.huggingface import HuggingFaceVLM
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import read
from headrace.vlm.prompt import left_pad
from headrace.vlm.pruning.auto import PruningConfig, pruning_config
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig
from headrace.vlm.pruning.policy import FlowCutPolicy
from headrace.vlm.pruning.reading import decoder_reading, tokens_kept

TEXT_TOKENS = 40
IMAGE_ID = 5


def build(shape: str, *, sharpness: float, seed: int, layers: int, dtype: torch.dtype) -> HuggingFaceVLM:
    """The model with random weights, and no processor: pixels and ids are given directly."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    with no_init_weights():
        model = _model(shape, vision, text)
    torch.set_default_dtype(torch.float32)
    _fill(model, seed)
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(sharpness)
    return HuggingFaceVLM(model, None)


def _model(shape: str, vision: CLIPVisionConfig, text: LlamaConfig) -> Any:
    if shape == "llava":
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
        return LlavaForConditionalGeneration(config)
    pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=pins
    )
    return LlavaNextForConditionalGeneration(config)


@torch.no_grad()
def _fill(model: Any, seed: int) -> None:
    """Normal weights of the usual size, cut from one long draw: a billion draws would take longer than the timing."""
    draw = torch.randn(5_000_011, generator=torch.Generator().manual_seed(seed))
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if parameter.ndim else 0.0)
            continue
        times = -(-parameter.numel() // len(draw))
        parameter.copy_(draw.repeat(times)[: parameter.numel()].view_as(parameter)).mul_(parameter[0].numel() ** -0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def inputs_of(shape: str, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A picture with structure: smooth noise, so that patches differ."""
    generator = torch.Generator().manual_seed(seed)
    crops = 1 if shape == "llava" else 5
    coarse = torch.randn(crops, 3, 12, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(336, 336), mode="bicubic").to(dtype)
    if shape == "llava":
        return {"pixel_values": pixels}
    return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[672, 672]])}


@torch.no_grad()
def first_logits(vlm: HuggingFaceVLM, inputs: dict, ids: torch.Tensor, pruning: PruningConfig | None) -> torch.Tensor:
    """From pixels to the logits after the prompt; what is timed."""
    vlm.pruning = pruning
    features = vlm._timed_features(inputs, video=False)
    prompt = vlm._prompt(ids, features, inputs, IMAGE_ID, video=False)
    cache, batch = KVCache(), left_pad([prompt])
    reading = decoder_reading(vlm.model, pruning, vlm.record)
    with nullcontext() if reading is None else reading(prompt, cache):
        return read(vlm.model, batch, cache, past=batch.mask[:, :0])


class Stopwatch:
    """CPU time spent in FlowCut's scoring and selection; wraps `FlowCutPolicy.decide` for the run."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self.plain = FlowCutPolicy.decide
        watch, plain = self, self.plain

        def timed(policy: FlowCutPolicy, *args: Any) -> Any:
            start = time.process_time()
            try:
                return plain(policy, *args)
            finally:
                watch.seconds += time.process_time() - start

        FlowCutPolicy.decide = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        FlowCutPolicy.decide = self.plain  # type: ignore[method-assign]


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles [s]."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("llava", "llava-next"), default="llava")
    parser.add_argument("--keep", type=int, default=32, help="tokens kept per crop")
    parser.add_argument("--sharpness", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=22, help="blocks of the language model")
    parser.add_argument("--methods", nargs="+", default=["flowcut"])
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--encoder-alone", type=int, default=3, help="timed runs of the encoder by itself; 0 leaves it out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.precision = resolve_precision(arguments.precision, "cpu")
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    vlm = build(
        arguments.shape, sharpness=arguments.sharpness, seed=arguments.seed, layers=arguments.layers, dtype=dtype
    )
    inputs = inputs_of(arguments.shape, arguments.seed, dtype)
    with torch.no_grad():
        visual = len(vlm._features(inputs, video=False))
    ids = torch.randint(10, 32000, (TEXT_TOKENS + visual,), generator=torch.Generator().manual_seed(1))
    ids[4 : 4 + visual] = IMAGE_ID
    crops = 1 if arguments.shape == "llava" else 5
    methods: dict[str, PruningConfig | None] = {"none": None}
    for name in arguments.methods:
        budget = arguments.keep * crops if name == "flowcut-decoder" else arguments.keep  # counted over the prompt
        methods[name] = pruning_config(name, Budget(tokens=budget))
    facts = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "versions": {"torch": torch.__version__},
        "visual_tokens": visual,
        "text_tokens": TEXT_TOKENS,
        "parameters": sum(p.numel() for p in vlm.model.parameters()),
    }
    if "flowcut" in methods and arguments.encoder_alone:
        facts |= encoder_facts(vlm, inputs, methods["flowcut"], arguments.encoder_alone)
    runs: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": [], "scoring_cpu": []} for n in methods}
    kept: dict[str, int] = {}
    for turn in range(-arguments.warmup, arguments.rounds):
        for name, pruning in methods.items():
            with Stopwatch() as watch:
                start, cpu = time.perf_counter(), time.process_time()
                first_logits(vlm, inputs, ids, pruning)
                took = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            kept[name] = tokens_kept(pruning, vlm.record)
            for kind, value in (took | {"scoring_cpu": watch.seconds}).items():
                runs[name][kind] += [value] * (turn >= 0)
        if turn >= 0:
            arguments.out.write_text(json.dumps(facts | summary(runs, kept), indent=2) + "\n")
    print(json.dumps(facts | summary(runs, kept), indent=1))


def summary(runs: dict[str, dict[str, list[float]]], kept: dict[str, int]) -> dict[str, Any]:
    """Times per method, and how many times faster than no pruning, round by round."""
    plain = runs["none"]
    return {
        "rounds": len(plain["wall"]),
        "times": {n: {k: spread(v) for k, v in r.items()} | {"visual_tokens": kept[n]} for n, r in runs.items()},
        "speedup": {
            n: {k: spread([a / b for a, b in zip(plain[k], r[k], strict=True)]) for k in ("wall", "cpu")}
            for n, r in runs.items()
        },
    }


@torch.no_grad()
def encoder_facts(vlm: HuggingFaceVLM, inputs: dict, pruning: PruningConfig | None, times: int) -> dict[str, Any]:
    """CPU time of the unpruned encoder alone, FlowCut's counts per block and mean entropy ratio."""
    from headrace.vlm.pruning.auto import prune

    assert isinstance(pruning, FlowCutConfig)
    pixels = inputs["pixel_values"].flatten(0, -4)
    tower = vlm.model.model.vision_tower
    cpu = []
    for _ in range(times):
        start = time.process_time()
        tower(pixels)
        cpu.append(time.process_time() - start)
    with prune(vlm.model, pruning) as cut:
        vlm.model.model.get_image_features(pixels) if "image_sizes" not in inputs else tower(pixels)
    entropy = [value for fact in cut.report.facts for row in fact["entropy"].values() for value in row]
    return {
        "encoder_cpu_seconds": spread(cpu),
        "counts": [fact["counts"] for fact in cut.report.facts],
        "mean_entropy_ratio": statistics.fmean(entropy) if entropy else None,
    }


if __name__ == "__main__":
    main()
