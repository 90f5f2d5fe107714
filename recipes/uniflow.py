"""Adapt a vision transformer into a UniFlow tokenizer: pixels by flow, meaning by layer-wise adaptive distillation.

Source: arXiv 2510.10575; the authors released no training code, and optimizer settings that the paper does not state
are our defaults. At published size give `--encoder internvit_300m` and a folder of pictures; `tiny` needs nothing: it
first trains a small transformer to read 36 captions of rendered shapes, which then plays the pretrained encoder.

    python recipes/uniflow.py --out runs/uniflow                       # tiny, 14 minutes of one core
    python recipes/uniflow.py --out runs/again --teacher runs/uniflow/teacher --weighting last
    python recipes/uniflow.py --out runs/uniflow-l --encoder internvit_300m --pictures photos/
"""

import copy
import dataclasses
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from headrace.cli.tokenizer_pictures import FolderPictures
from headrace.datasets.captioned_shapes import CAPTIONS, COLOURS, COLUMNS, ROWS, SHAPES, CaptionedShapes
from headrace.datasets.picture_crops import PictureCrops
from headrace.nn.distill import LayerwiseDistillation, Weighting
from headrace.nn.precision import mixed
from headrace.tokenizers.base import Preprocessing
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_loss import parameter_groups, uniflow_loss
from headrace.tokenizers.uniflow_protocol import psnr, seam_ratio
from headrace.tokenizers.uniflow_start import start_bottleneck
from headrace.training.batches import Dataset, batches
from headrace.training.loop import fit
from headrace.training.schedule import Schedule

ENCODER_FACTOR, ENCODER_FACTOR_TINY = 0.25, 0.05  # of the new modules' learning rate
MEASURED = 512  # pictures whose latents give the stored statistics


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train. Zeros mean the size's own value: 70,000 steps of 512 pictures at published size.

    Attributes:
        out: Run folder; `model`, `teacher` and `copies.png` (held-out pictures above their one-step copies).
        encoder: Configuration; `tiny` trains its own teacher first.
        pictures: Folder of pictures; needed for every size but `tiny`. Trained on random crops of at least 0.8 of the
            short side, half of them mirrored.
        teacher: Tiny teacher of an earlier run, instead of training one.
        teacher_steps: Updates of the tiny teacher.
        steps: Updates.
        batch: Pictures per update.
        lr: Learning rate of the new modules; the encoder gets a quarter, the tiny one a twentieth.
        encoder_factor: The encoder's learning rate as a share of `lr`, in place of the quarter or twentieth.
        pixel_start: Begin the tiny bottleneck as the best linear reading of the pixels, see `start_bottleneck`.
        weighting: Layer weighting of the distillation, `last` for plain feature distillation.
        distill_weight: Factor on it; 0 trains on pixels alone.
        ema: Keep an average of the weights with this decay and save that; 0.9999 is usual, the paper does not say.
        precision: bf16 computes under autocast, losses stay float32.
        seed: Of everything.
        resume: Go on from the newest checkpoint; with the teacher that the run was begun with.
    """

    out: Path
    encoder: Literal["tiny", "internvit_300m", "dinov2_l", "dfn_clip_l", "siglip2_so400m"] = "tiny"
    pictures: Path | None = None
    teacher: Path | None = None
    teacher_steps: int = 300
    steps: int = 0
    batch: int = 0
    lr: float = 0.0
    encoder_factor: float | None = None
    pixel_start: bool = True
    weighting: Weighting = "adaptive"
    distill_weight: float = 1.0
    ema: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    resume: bool = False


class ShapesAndPhotos:
    """Half rendered shapes, half crops of photographs, normalised for the encoder."""

    def __init__(self, preprocessing: Preprocessing, *, count: int, seed: int) -> None:
        self.shapes = CaptionedShapes(size=preprocessing.size, count=count, seed=seed)
        self.photos = PictureCrops(size=preprocessing.size, count=count, seed=seed)
        self.preprocessing, self.count = preprocessing, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Tensor:
        half = len(indices) // 2
        parts = [self.shapes.batch(indices[:half]).images] if half else []
        return normalised(torch.cat([*parts, self.photos.batch(indices[half:])]), self.preprocessing)


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pictures in [0, 1] as the encoder takes them."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std


def tiny_config() -> UniFlowConfig:
    """The tiny configuration with 64 latent channels, a third of a patch's 192 numbers."""
    return dataclasses.replace(UniFlowConfig.tiny(), latent_channels=64)


class Reader(nn.Module):
    """The tiny teacher in training: its patch tokens, averaged, name each word of the caption."""

    choices = (len(COLOURS), len(SHAPES), len(ROWS), len(COLUMNS))

    def __init__(self, model: UniFlow) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, nn.Linear(model.feature_dim, sum(self.choices))

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy of all words, a scalar, for images (B, 3, S, S) with captions (B,)."""
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        scores = self.head(tokens.mean(1)).float().split(self.choices, dim=-1)
        words = np.unravel_index(label.numpy(), self.choices)
        pairs = zip(scores, words, strict=True)
        return torch.stack([nn.functional.cross_entropy(s, torch.from_numpy(w)) for s, w in pairs]).sum()


def plain_attention() -> sdpa_kernel:
    """Attention from matrix products: on a processor and 64 tokens the fused kernel takes a third of an update."""
    return sdpa_kernel(SDPBackend.MATH)


def train_tiny_teacher(model: UniFlow, *, steps: int, seed: int, batch: int = 32, lr: float = 1e-3) -> float:
    """Teach the model's encoder to read captions of shapes, in place; returns the last loss."""
    reader = Reader(model).train()
    shapes = CaptionedShapes(size=model.preprocessing.size, count=10**6, seed=seed + 10_000)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=lr, fused=True)
    schedule = Schedule(kind="cosine", warmup=max(1, steps // 10), steps=max(2, steps), floor=0.05)
    loss = torch.tensor(0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor(step)
        images, label = shapes.batch(np.arange(step * batch, (step + 1) * batch))
        optimizer.zero_grad()
        with mixed("cpu"), plain_attention():
            loss = reader(normalised(images, model.preprocessing), label)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def pooled(encoder: nn.Module, images: Tensor, size: int = 64) -> Tensor:
    """Mean patch token after the last norm, in batches; teacher and adapted encoder compute alike."""
    with mixed("cpu"), plain_attention():
        parts = [encoder.forward_features(part)[:, encoder.num_prefix_tokens :] for part in images.split(size)]
    return torch.cat([part.float().mean(1) for part in parts])


def linear_probe(encoder: nn.Module, preprocessing: Preprocessing, *, train: int = 1440, test: int = 1080) -> float:
    """Accuracy on held-out shapes of a ridge regression from pooled tokens to one of 36 captions."""
    encoder.eval()
    sets = [CaptionedShapes(size=preprocessing.size, count=n, seed=s) for n, s in ((train, 777), (test, 778))]
    features, labels = [], []
    for shapes in sets:
        images, label = shapes.batch(np.arange(len(shapes)))
        features.append(pooled(encoder, normalised(images, preprocessing)).double())
        labels.append(label)
    mean, std = features[0].mean(0), features[0].std(0) + 1e-6
    x, y = ((f - mean) / std for f in features)
    goal = nn.functional.one_hot(labels[0], len(CAPTIONS)).double() - 1 / len(CAPTIONS)
    weights = torch.linalg.solve(x.T @ x + 10.0 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ goal)
    return float(((y @ weights).argmax(1) == labels[1]).double().mean())


def held_out(size: int, count: int, seed: int) -> dict[str, Tensor]:
    """Shapes of another seed and crops of photographs that training never sees, (count, 3, size, size) in [0, 1]."""
    return {
        "shapes": CaptionedShapes(size=size, count=count, seed=seed).batch(np.arange(count)).images,
        "photos": PictureCrops(size=size, count=count, part="held_out", seed=seed).batch(np.arange(count)),
    }


@torch.no_grad()
def save_copies(model: UniFlow, path: Path, *, count: int = 8, seed: int = 779) -> None:
    """Held-out pictures, and below each row their one-step copies, as one PNG."""
    rows = []
    for pictures in held_out(model.preprocessing.size, count, seed).values():
        copies = model.decode(model.encode(normalised(pictures, model.preprocessing)), steps=1)
        rows += [torch.cat(list(row), dim=-1) for row in (pictures, model.preprocessing.to_unit(copies))]
    plane = torch.cat(rows, dim=-2).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane.numpy()).save(path)


@torch.no_grad()
def report(model: UniFlow, *, count: int = 64, seed: int = 779) -> dict[str, float]:
    """One-step and four-step PSNR [dB] on held-out shapes and photographs, and the seam ratio of picture and copy."""
    model.eval()
    size, unit = model.preprocessing.size, model.preprocessing.to_unit
    figures: dict[str, float] = {}
    for name, pictures in held_out(size, count, seed).items():
        latents = model.encode(normalised(pictures, model.preprocessing))
        copies = {steps: unit(model.decode(latents, steps=steps)) for steps in (1, 4)}
        figures |= {f"psnr_{name}_{s}step": round(psnr(pictures, copy).mean().item(), 2) for s, copy in copies.items()}
        patch = model.config.encoder.patch
        figures[f"seam_{name}"] = round(seam_ratio(copies[1], patch).mean().item(), 3)
        figures[f"seam_{name}_original"] = round(seam_ratio(pictures, patch).mean().item(), 3)
    return figures


@torch.no_grad()
def drift(model: UniFlow, teacher: nn.Module, *, count: int = 128, seed: int = 780) -> dict[str, float]:
    """Mean cosine distance of adapted encoder and teacher after each block, on held-out shapes."""
    images = CaptionedShapes(size=model.preprocessing.size, count=count, seed=seed).batch(np.arange(count)).images
    pixels = normalised(images, model.preprocessing)
    terms = LayerwiseDistillation(teacher, model.encoder)(pixels, model.eval().hidden(pixels)[0])
    return {f"drift_{layer}": round(alpha.item(), 4) for layer, alpha in enumerate(terms.alpha, start=1)}


class Loss:
    """UniFlow's loss as `fit` calls it; holds the frozen teacher.

    Every `every` updates it also decodes a few watched pictures in one step from fixed noise; their PSNR [dB] and seam
    ratio stand in the log until the next time.
    """

    def __init__(self, distillation: LayerwiseDistillation | None, watched: Tensor, *, every: int = 100) -> None:
        self.distillation, self.watched, self.every = distillation, watched, every
        self.calls, self.seen = 0, {"watched/psnr": torch.tensor(0.0), "watched/seam": torch.tensor(0.0)}

    @torch.no_grad()
    def watch(self, model: UniFlow) -> None:
        """Measure the watched pictures."""
        model.eval()
        pixels, unit = self.watched.to(model.device), model.preprocessing.to_unit
        copies = unit(model.decode(model.encode(pixels), steps=1).float())
        seam = seam_ratio(copies, model.config.encoder.patch)
        self.seen = {"watched/psnr": psnr(unit(pixels), copies).mean(), "watched/seam": seam.mean()}
        model.train()

    def __call__(self, model: UniFlow, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.distillation is not None:
            self.distillation.to(batch.device)
        terms = uniflow_loss(model, batch, distillation=self.distillation, generator=generator)
        layers = {f"alpha/{i}": a for i, a in enumerate(terms.alpha, start=1)}
        layers |= {f"weight/{i}": w for i, w in enumerate(terms.weight, start=1)}
        times = {f"flow/t{i}": f for i, f in enumerate(terms.flow_by_time)}
        if self.calls % self.every == 0:
            self.watch(model)
        self.calls += 1
        spread = {"latent/std": terms.latents.float().std()}
        return {
            "total": terms.total,
            "flow": terms.flow,
            "distill": terms.distill,
            **layers,
            **times,
            **spread,
            **self.seen,
        }


@torch.no_grad()
def measure_latents(model: UniFlow, data: Dataset, *, batch: int) -> None:
    """Latent statistics of the model as it is now, on training pictures from all over `data`, in eval mode.

    What the encoder gave while it was learning does not describe what it gives afterwards.
    """
    model.eval().forget_latents()
    chosen = np.linspace(0, len(data) - 1, min(MEASURED, len(data))).astype(np.int64)
    for start in range(0, len(chosen), batch):
        pixels = data.batch(chosen[start : start + batch])
        model.observe_latents(model.encode(pixels.to(model.device)))


def weights_hash(module: nn.Module) -> str:
    """Sixteen hexadecimal digits of a module's weights, wherever they lie."""
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapt(recipe: Recipe, model: UniFlow, teacher: nn.Module) -> None:
    """Train `model` in place, measure its latents and save it; model and teacher end on the CPU."""
    tiny = recipe.encoder == "tiny"
    steps, batch = recipe.steps or (1200 if tiny else 70_000), recipe.batch or (8 if tiny else 512)
    lr = recipe.lr or (3e-3 if tiny else 2e-4)
    if recipe.pictures is not None:
        data: Dataset = FolderPictures(recipe.pictures, model.preprocessing, part="training", seed=recipe.seed)
    else:
        data = ShapesAndPhotos(model.preprocessing, count=20_000, seed=recipe.seed)
    distillation = None
    if recipe.distill_weight > 0:
        distillation = LayerwiseDistillation(
            teacher, model.encoder, beta=model.config.beta, weighting=model.config.weighting
        )
    usual = ENCODER_FACTOR_TINY if tiny else ENCODER_FACTOR
    factor = usual if recipe.encoder_factor is None else recipe.encoder_factor
    groups = parameter_groups(model, lr=lr, encoder_factor=factor)
    warmup = min(50 if tiny else 2000, steps // 4)
    with plain_attention() if tiny else nullcontext():
        fitted = fit(
            model,
            Loss(distillation, data.batch(np.arange(min(8, len(data))))),
            torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            batches(data, batch, seed=recipe.seed, visits=recipe.pictures is not None),
            steps=steps,
            out=recipe.out / "run",
            resume=recipe.resume,
            seed=recipe.seed,
            schedule=Schedule(kind="cosine", warmup=warmup, steps=steps, floor=0.1),
            clip=1.0,
            ema_decay=recipe.ema,
            precision=recipe.precision,
            settings={
                "encoder": recipe.encoder,
                "weighting": recipe.weighting,
                "distill": recipe.distill_weight,
                "teacher": weights_hash(teacher),
            },
            progress=False,
        )
    if fitted.ema is not None:
        with fitted.ema.applied_to(model):
            averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(averaged)
    measure_latents(model, data, batch=min(batch, 64))
    teacher.cpu()
    model.cpu().save_pretrained(recipe.out / "model")


def new_model(recipe: Recipe) -> UniFlow:
    """The untrained tokenizer around its pretrained encoder; a tiny encoder is trained first, and kept in `teacher`."""
    torch.manual_seed(recipe.seed)
    config: UniFlowConfig = tiny_config() if recipe.encoder == "tiny" else getattr(UniFlowConfig, recipe.encoder)()
    config = dataclasses.replace(config, weighting=recipe.weighting, distill_weight=recipe.distill_weight)
    if recipe.encoder != "tiny":
        return UniFlow.adapt(config)
    model = UniFlow(config)
    teacher = recipe.teacher
    if teacher is None and recipe.resume and (recipe.out / "teacher").is_dir():
        teacher = recipe.out / "teacher"
    if teacher is None and recipe.resume and (recipe.out / "run" / "run.json").is_file():
        raise SystemExit(f"the run in {recipe.out} was begun with a teacher from elsewhere; name it again: --teacher")
    if teacher is None:
        train_tiny_teacher(model, steps=recipe.teacher_steps, seed=recipe.seed)
        model.save_pretrained(recipe.out / "teacher")
    else:
        model.encoder.load_state_dict(UniFlow.from_pretrained(teacher).encoder.state_dict())
    if recipe.pixel_start:
        pictures = ShapesAndPhotos(model.preprocessing, count=128, seed=recipe.seed)
        told = start_bottleneck(model, pictures.batch(np.arange(len(pictures))), seed=recipe.seed)
        print(json.dumps({"pixels_told_by_latents": round(told, 4)}), flush=True)
    return model


def main(recipe: Recipe) -> dict[str, float]:
    """Make or fetch the encoder, adapt it, measure; prints one JSON line."""
    if recipe.encoder != "tiny" and recipe.pictures is None:
        raise SystemExit(f"--encoder {recipe.encoder} needs --pictures FOLDER")
    if recipe.encoder != "tiny" and recipe.teacher is not None:
        raise SystemExit("--teacher is for the tiny encoder; the others begin from their published weights")
    model = new_model(recipe)
    teacher = copy.deepcopy(model.encoder).eval()
    figures = {"probe_teacher": linear_probe(teacher, model.preprocessing)} if recipe.encoder == "tiny" else {}
    started = time.process_time()
    adapt(recipe, model, teacher)
    figures["adapting_cpu_seconds"] = round(time.process_time() - started)
    if recipe.encoder == "tiny":
        figures |= {"probe_adapted": linear_probe(model.encoder, model.preprocessing), **report(model)}
        figures |= drift(model, teacher)
        save_copies(model, recipe.out / "copies.png")
    print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Recipe))
