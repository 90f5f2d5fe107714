"""Does a trained FlowTok draw what a caption says, and say what a picture shows? Judged on 36 captions of shapes.

A small convolutional probe is trained on real pictures (colour, shape, row and column); its accuracy on fresh real
pictures is reported beside its verdict on generated ones. The image decoder reads the caption as well, so generated
tokens are also decoded with an empty caption, which leaves only what the flow brought. Captions are compared word for
word. Two properties are judged by bounds: copies must be 6 dB better than the mean picture, and the two rows of the
indicator must mean the picture of this caption and the mean of all pictures (`indicator_semantics`).

    python benchmarks/flowtok_accuracy.py --model runs/flowtok/model --picture samples.png
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from headrace.datasets.captioned_shapes import CAPTIONS, CaptionedShapes
from headrace.flow.path import straight_path
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.uniflow_protocol import psnr

Verdict = dict[str, float | bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: Path
    per_caption: int = 10
    steps: tuple[int, ...] = (5, 20)
    guidance: tuple[float, ...] = (1.0, 2.0)
    probe_steps: int = 400
    picture: Path | None = None
    seed: int = 1000


def probe(size: int, steps: int, seed: int) -> nn.Module:
    """A classifier of the 36 captions, trained on real pictures."""
    torch.manual_seed(seed)
    widths, parts = (3, 16, 32, 64), []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    net = nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(len(CAPTIONS)))
    shapes = CaptionedShapes(size=size, count=10**6, seed=seed)
    net(shapes.batch(np.arange(2)).images)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(steps):
        batch = shapes.batch(np.arange(step * 72, (step + 1) * 72))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch.images), batch.label).backward()
        optimizer.step()
    return net.eval()


def interval(right: int, total: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * (p * (1 - p) / total + z * z / (4 * total**2)) ** 0.5 / (1 + z * z / total)
    return [round(centre - half, 4), round(min(1.0, centre + half), 4)]


def share(hits: Tensor) -> dict[str, object]:
    """Share of hits with its interval and size."""
    right, total = int(hits.sum()), hits.numel()
    return {"share": round(right / total, 4), "interval95": interval(right, total), "n": total}


@torch.no_grad()
def indicator_semantics(model: FlowTok, tokens: Tensor, texts: list[str], *, seed: int, t: float = 0.02) -> Verdict:
    """What the network says of a picture that has hardly begun, matched and unmatched.

    At an early time the source plus the velocity is the network's guess of the picture's tokens. With the matched
    label it should tell this caption's picture from others, with the unmatched one it may only know the mean picture.

    Args:
        model: A trained one.
        tokens: Scaled image tokens, (B, K, D), of varied pictures.
        texts: Their captions.
        seed: Of the source's noise.
        t: Time of the guess, 0 text to 1 image.

    Returns:
        `matched_r2` (passes above 0.6) and `unmatched_r2` (below 0.2), shares of the tokens' variance explained;
        `unmatched_shift`, distance of the mean guess from the mean picture in deviations (passes within 0.2), as a
        mean over tokens and channels; and `passes`.
    """
    posterior = model.to_image.projector(model.text_tokens(texts))
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens)
    source = posterior.sample(noise)
    times = torch.full((len(tokens),), t, device=tokens.device)
    x = straight_path(source, tokens, times, sigma_min=model.config.sigma_min).x_t
    matched, unmatched = (
        source + model.to_image.velocity(x, times, torch.full_like(times, label, dtype=torch.long)) for label in (0, 1)
    )
    mean, spread = tokens.mean(0), tokens.std()
    total = (tokens - mean).square().sum()
    shares = [1 - float((guess - tokens).square().sum() / total) for guess in (matched, unmatched)]
    shift = float(((unmatched.mean(0) - mean).abs() / spread).mean())
    return {
        "matched_r2": round(shares[0], 4),
        "unmatched_r2": round(shares[1], 4),
        "unmatched_shift": round(shift, 4),
        "passes": shares[0] > 0.6 and shares[1] < 0.2 and shift < 0.2,
    }


def beats_mean_picture(copies: float, mean_picture: float) -> Verdict:
    """Whether the PSNR of copies [dB] is at least 6 dB above that of the mean picture."""
    return {"gain": round(copies - mean_picture, 2), "passes": copies >= mean_picture + 6}


@torch.no_grad()
def measure(options: Options) -> dict[str, object]:
    """All figures as JSON-ready values."""
    model = FlowTok.from_pretrained(options.model)
    size = model.config.image.image_size
    with torch.enable_grad():
        judge = probe(size, options.probe_steps, seed=options.seed + 1)
    count = options.per_caption * len(CAPTIONS)
    real = CaptionedShapes(size=size, count=count, seed=options.seed).batch(np.arange(count))
    texts = [CAPTIONS[i] for i in real.label.tolist()]
    tokens = model.encode(real.images)
    again = model.decode(tokens, captions=texts).clamp(0, 1)
    bare = model.decode(tokens).clamp(0, 1)
    flat = real.images.mean(0, keepdim=True).expand_as(real.images)
    copied, levelled = (psnr(real.images, images).mean().item() for images in (again, flat))
    out: dict[str, object] = {
        "probe_on_real": share(judge(real.images).argmax(1) == real.label),
        "probe_on_reconstructions": share(judge(again).argmax(1) == real.label),
        "probe_on_reconstructions_without_caption": share(judge(bare).argmax(1) == real.label),
        "reconstruction_psnr": round(copied, 2),
        "reconstruction_psnr_without_caption": round(psnr(real.images, bare).mean().item(), 2),
        "mean_image_psnr": round(levelled, 2),
        "reconstruction_over_mean_image": beats_mean_picture(copied, levelled),
        "indicator_semantics": indicator_semantics(model, tokens, texts, seed=options.seed),
    }
    for guidance in options.guidance:
        for steps in options.steps:
            started = time.perf_counter()
            flowed = model.generate_tokens(texts, steps=steps, guidance=guidance, seed=None)
            drawn = model.decode(flowed, captions=texts).clamp(0, 1)
            alone = model.decode(flowed).clamp(0, 1)
            key = f"guidance {guidance:g}, {steps} steps"
            noisy = model.generate(texts, steps=steps, guidance=guidance, seed=options.seed)
            written = model.caption(real.images, steps=steps, guidance=guidance)
            read_back = model.caption(drawn, steps=steps, guidance=guidance)
            pairs = [(a == b, c == b) for a, b, c in zip(written, texts, read_back, strict=True)]
            correct, loop = torch.tensor(pairs).T
            out[key] = {
                "text_to_image_noise_free": share(judge(drawn).argmax(1) == real.label),
                "text_to_image_tokens_alone": share(judge(alone).argmax(1) == real.label),
                "text_to_image_sampled": share(judge(noisy).argmax(1) == real.label),
                "image_to_text": share(correct),
                "text_to_image_to_text": share(loop),
                "seconds": round(time.perf_counter() - started, 2),
            }
    shuffled = model.generate(texts[7:] + texts[:7], steps=options.steps[-1], guidance=1.0, seed=None)
    out["wrong_captions_guidance_1"] = share(judge(shuffled).argmax(1) == real.label)
    if options.picture is not None:
        save_samples(model, real.images, texts, options.picture, seed=options.seed)
    return out


def save_samples(model: FlowTok, images: Tensor, texts: list[str], path: Path, *, seed: int, count: int = 12) -> None:
    """Rows of one PNG: pictures, their copies, drawn from the caption noise-free and sampled, and tokens alone."""
    kept = np.arange(count) * 3
    images, texts = images[kept], [texts[i] for i in kept]
    tokens = model.generate_tokens(texts, seed=seed)
    rows = [
        images,
        model.decode(model.encode(images), captions=texts),
        model.generate(texts, seed=None),
        model.decode(tokens, captions=texts),
        model.decode(tokens),
    ]
    plane = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2).clamp(0, 1)
    Image.fromarray(plane.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(json.dumps(measure(options), indent=1))
