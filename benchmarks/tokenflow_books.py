"""Two codebooks against one: reconstruction, use of the codes and linear probes of trained `mini` tokenizers.

Folders are named BOOKS_SEED, as `recipes/tokenflow.py mini --books BOOKS --seed SEED --out runs/BOOKS_SEED` fills them:

    python benchmarks/tokenflow_books.py runs/dual_0 runs/semantic_0 runs/pixel_0 runs/dual_1 ... --out books.json

Pictures are held out: crops of two photographs and rendered shapes that training never saw. Probes are ridge regression
on the mean of quantised features over the grid: `shape` (square, circle, triangle in any colour, size and place),
`faces` (faces or other patches of 25 px, scikit-image's subset of LFW), `scenes` (which of ten grey photographs a
crop is from, left half to learn, right half to test; none of the ten was trained on). Source: TokenFlow, table 1 and 6.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from headrace.cli.tokenizer_pictures import in_batches, open_pictures
from headrace.datasets.captioned_shapes import CaptionedShapes
from headrace.nn.perceptual import EfficientNetLite0
from headrace.tokenizers.reconstruction import evaluate
from headrace.tokenizers.tokenflow import TokenFlow
from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher

SCENES = {
    "skimage.data": ("chelsea.png", "coffee.png", "moon.png", "page.png", "text.png", "cell.png", "clock_motion.png"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
SIZE = 64
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by number of runs
PENALTIES = tuple(10.0**power for power in range(-3, 4))


@dataclass(frozen=True, kw_only=True)
class Options:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None
    pictures: int = 512
    probe_pictures: int = 720
    seed: int = 0


class Probe(NamedTuple):
    """Pictures (N, 3, 64, 64) in [-1, 1] and classes (N,) to learn from and to test on; several splits are averaged."""

    images: Tensor
    classes: Tensor
    splits: tuple[tuple[Tensor, Tensor], ...]


def shapes(count: int, seed: int) -> Probe:
    made = CaptionedShapes(size=SIZE, count=2 * count, seed=10_000 + seed).batch(np.arange(2 * count))
    order = torch.arange(2 * count)
    return Probe(made.images * 2 - 1, made.label // 4 % 3, ((order[:count], order[count:]),))


def faces(seed: int) -> Probe:
    """The file's first hundred patches are faces. Ten random halves, because there are two hundred only."""
    folder = Path(str(import_module("skimage.data").__file__)).parent
    patches = torch.from_numpy(np.load(folder / "lfw_subset.npy")).float()[:, None]
    images = F.interpolate(patches / patches.max(), size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(10)]
    half = len(images) // 2
    classes = (torch.arange(len(images)) >= half).long()
    return Probe(images.expand(-1, 3, -1, -1) * 2 - 1, classes, tuple((o[:half], o[half:]) for o in orders))


def scenes(count: int, seed: int) -> Probe:
    rng = np.random.default_rng(seed)
    files = [Path(str(import_module(m).__file__)).parent / name for m, names in SCENES.items() for name in names]
    images, classes = [], []
    for side in range(2):
        for place in range(count):
            number = place % len(files)
            picture = Image.open(files[number]).convert("L")
            width, height = picture.size
            half = width // 2
            edge = min(int(SIZE * rng.uniform(1, 2)), half, height)
            left = side * half + int(rng.integers(half - edge + 1))
            top = int(rng.integers(height - edge + 1))
            crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
            images.append(np.asarray(crop))
            classes.append(number)
    pixels = torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    order = torch.arange(2 * count)
    return Probe(pixels, torch.tensor(classes), ((order[:count], order[count:]),))


def accuracy(features: Tensor, probe: Probe) -> float:
    """Share of right answers of ridge regression on one-hot classes; the penalty is chosen on a fifth of the split."""
    right = []
    for learn, test in probe.splits:
        fold = len(learn) // 5
        tried = [(_right(features, probe.classes, learn[fold:], learn[:fold], p), p) for p in PENALTIES]
        right.append(_right(features, probe.classes, learn, test, max(tried)[1]))
    return statistics.mean(right)


def _right(features: Tensor, classes: Tensor, learn: Tensor, test: Tensor, penalty: float) -> float:
    mean, std = features[learn].mean(0), features[learn].std(0) + 1e-6
    x, y = ((torch.cat([(features[i] - mean) / std, torch.ones(len(i), 1)], dim=1)).double() for i in (learn, test))
    wanted = F.one_hot(classes[learn]).double()
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ wanted)
    return ((y @ weights).argmax(1) == classes[test]).double().mean().item()


@torch.no_grad()
def rows(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean over the grid of (B, places, channels), for all pictures."""
    return torch.cat([function(part).float().mean(1) for part in images.split(32)])


def reference(probes: dict[str, Probe], teacher: EfficientNetTeacher) -> dict[str, dict[str, float]]:
    """What the teacher's own features give, and pictures of 8x8 px without any network."""

    def small(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 8).flatten(1)[:, None]

    return {
        "teacher": {name: accuracy(rows(teacher, p.images), p) for name, p in probes.items()},
        "pixels": {name: accuracy(rows(small, p.images), p) for name, p in probes.items()},
    }


def measure(folder: Path, options: Options, probes: dict[str, Probe], net: EfficientNetLite0) -> dict[str, float]:
    """All figures of one tokenizer, by name."""
    model = TokenFlow.from_pretrained(folder / "model" if (folder / "model").is_dir() else folder)
    figures: dict[str, float] = {}
    for data in ("crops", "shapes"):
        pictures = open_pictures(data, model.preprocessing, part="held_out", count=options.pictures, seed=options.seed)
        report = evaluate(model, in_batches(pictures, options.pictures, 32), efficientnet=net)
        figures[f"{data} PSNR"] = report.psnr
        figures[f"{data} usage"] = report.usage["all"]["share"]
        figures[f"{data} perplexity"] = report.usage["all"]["perplexity"]
        for name, value in (("distance", report.efficientnet), ("Fréchet", report.fd_efficientnet)):
            if value is not None:
                figures[f"{data} {name}"] = value
    semantic, _ = model.config.quantizer.dims
    for name, probe in probes.items():
        pooled = rows(model.features, probe.images)
        figures[f"{name}, both halves"] = accuracy(pooled, probe)
        figures[f"{name}, semantic half"] = accuracy(pooled[:, :semantic], probe)
        figures[f"{name}, pixel half"] = accuracy(pooled[:, semantic:], probe)
    for part in ("both halves", "semantic half", "pixel half"):
        figures[f"mean probe, {part}"] = statistics.mean(figures[f"{name}, {part}"] for name in probes)
    return figures


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95 % interval (Student's t over runs)."""
    half = QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in QUANTILE else None
    return statistics.mean(values), half


def main(options: Options) -> None:
    net = EfficientNetLite0.from_package(side=128)
    probes = {
        "shape": shapes(options.probe_pictures, options.seed),
        "faces": faces(options.seed),
        "scenes": scenes(options.probe_pictures, options.seed),
    }
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for folder in options.folders:
        books, _, seed = folder.name.rpartition("_")
        runs.setdefault(books, {})[seed] = measure(folder, options, probes, net)
    names = next(iter(next(iter(runs.values())).values()))
    table = {b: {n: interval([run[n] for run in own.values()]) for n in names} for b, own in runs.items()}
    against = {
        f"dual - {books}": {n: interval([runs["dual"][s][n] - own[s][n] for s in own]) for n in names}
        for books, own in runs.items()
        if books != "dual" and "dual" in runs and own.keys() == runs["dual"].keys()
    }
    report = {
        "mean_and_half_width": table,
        "differences_of_runs_with_the_same_seed": against,
        "probe_references": reference(probes, EfficientNetTeacher(net, grid=16)),
        "runs": runs,
    }
    for line in markdown(names, table | against):
        print(line)
    print(json.dumps(report["probe_references"]))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def markdown(names: dict[str, float], table: dict[str, dict[str, tuple[float, float | None]]]) -> Iterator[str]:
    yield "| | " + " | ".join(table) + " |"
    yield "|---" * (len(table) + 1) + "|"
    for name in names:
        cells = [f"{m:.3f}" + ("" if h is None else f" ± {h:.3f}") for m, h in (own[name] for own in table.values())]
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options))
