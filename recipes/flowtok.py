"""Train FlowTok in its stages on rendered shapes with captions: image tokenizer, text to image, and back to text.

Sources: arXiv 2503.10772 and TACJu/FlowTok (flow), bytedance/1d-tokenizer (image tokenizer). The published sizes run
the same code; the published data (DataComp and others, 10^9 pictures) is not to be had offline.

    python recipes/flowtok.py --out runs/flowtok                      # tiny, all stages, about 10 minutes on 2 cores
    python recipes/flowtok.py --out runs/flowtok-xl --size xl --stage image-tokenizer
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from headrace.datasets.captioned_shapes import CAPTIONS, Captioned, CaptionedShapes
from headrace.nn.perceptual import EfficientNetLite0, LpipsVGG
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import TINY_WORDS, FlowTokConfig
from headrace.tokenizers.flowtok_critic import ImageTokenizerTraining
from headrace.tokenizers.flowtok_loss import (
    image_to_text_loss,
    image_tokenizer_loss,
    text_to_image_loss,
    text_tokenizer_loss,
)
from headrace.tokenizers.tokenflow_critic import PatchCritic
from headrace.training.batches import batches
from headrace.training.loop import fit
from headrace.training.schedule import Schedule

Stage = Literal["image-tokenizer", "text-to-image", "text-tokenizer", "image-to-text"]
STAGES: tuple[Stage, ...] = ("image-tokenizer", "text-to-image", "text-tokenizer", "image-to-text")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Optimizer of one stage: AdamW, warm-up, then constant, or cosine to `floor`."""

    steps: int
    batch: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.03
    warmup: int = 5_000
    cosine: bool = False
    floor: float = 0.0
    clip: float | None = None
    ema: float = 0.9999


# Image tokenizer: TA-TiTok's single-stage recipe. Flow: the released configuration. Text stages: not published, ours.
PUBLISHED: dict[Stage, Settings] = {
    "image-tokenizer": Settings(
        steps=650_000,
        batch=1024,
        lr=1e-4,
        betas=(0.9, 0.999),
        decay=1e-4,
        warmup=10_000,
        cosine=True,
        floor=0.1,
        clip=1.0,
    ),
    "text-to-image": Settings(steps=1_000_000, batch=4096, lr=4e-4),
    "text-tokenizer": Settings(steps=50_000, batch=1024, lr=1e-4, clip=1.0),
    "image-to-text": Settings(steps=200_000, batch=1024, lr=4e-4),
}
TINY: dict[Stage, Settings] = {
    "image-tokenizer": Settings(steps=1500, batch=64, lr=2e-3, warmup=50, cosine=True, floor=0.05, clip=1.0, ema=0.99),
    "text-to-image": Settings(steps=2000, batch=64, lr=1e-3, warmup=50, cosine=True, floor=0.05, clip=1.0, ema=0.99),
    "text-tokenizer": Settings(steps=400, batch=64, lr=3e-3, warmup=20, cosine=True, floor=0.05, clip=1.0, ema=0.99),
    "image-to-text": Settings(steps=1500, batch=64, lr=1e-3, warmup=50, cosine=True, floor=0.05, clip=1.0, ema=0.99),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train.

    Attributes:
        out: Run folder; each stage writes into a folder of its name, the model into `model`.
        stage: One stage, or all in order. A later stage starts from `out/model`.
        size: Configuration; `tiny` is 32 px.
        clip_words: Captions in CLIP's vocabulary with CLIP's weights (fetched from the Hub); else the 10 words.
        pictures: Rendered training pictures.
        steps: Override of each stage's steps.
        batch: Override of each stage's batch.
        perceptual: Perceptual network of the image tokenizer, with which comes the critic: `lpips` needs `vgg`,
            `efficientnet` is the offline one, `none` trains on squared error and KL alone; `auto` is `none` for tiny
            and `efficientnet` else.
        vgg: File of torchvision's VGG-16 weights.
        precision: bf16 runs under autocast.
        seed: Of weights, data and noise.
        resume: Go on from the newest checkpoint of each stage.
    """

    out: Path
    stage: Literal["all", "image-tokenizer", "text-to-image", "text-tokenizer", "image-to-text"] = "all"
    size: Literal["tiny", "b", "xl", "h"] = "tiny"
    clip_words: bool = False
    pictures: int = 20_000
    steps: int | None = None
    batch: int | None = None
    perceptual: Literal["auto", "none", "efficientnet", "lpips"] = "auto"
    vgg: Path | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    resume: bool = False


def new_model(recipe: Recipe) -> FlowTok:
    """The untrained model of a recipe."""
    torch.manual_seed(recipe.seed)
    config: FlowTokConfig = getattr(FlowTokConfig, recipe.size)()
    if not recipe.clip_words:
        config = dataclasses.replace(config, captions=dataclasses.replace(config.captions, words=TINY_WORDS))
    model = FlowTok(config)
    if recipe.clip_words:
        model.captions.load_clip()
    return model


class StageLoss:
    """The loss of one stage as `fit` calls it."""

    def __init__(self, stage: Stage, ids: Tensor) -> None:
        self.stage, self.ids = stage, ids

    def __call__(
        self, model: FlowTok | ImageTokenizerTraining, batch: Captioned, generator: torch.Generator
    ) -> dict[str, Tensor]:
        ids = self.ids.to(batch.label.device)[batch.label]
        if isinstance(model, ImageTokenizerTraining):
            return model(batch.images, model.model.captions(ids), generator)
        if self.stage == "image-tokenizer":
            image = image_tokenizer_loss(model, batch.images, model.captions(ids), generator=generator)
            return {"total": image.total, "squared": image.squared, "kl": image.kl}
        if self.stage == "text-tokenizer":
            text = text_tokenizer_loss(model, ids, generator=generator)
            return {"total": text.total, "words": text.words, "kl": text.kl, "accuracy": text.accuracy}
        with torch.no_grad():
            posterior = model.posterior(batch.images)
            noise = torch.randn(posterior.mean.shape, generator=generator, device=posterior.mean.device)
            tokens = posterior.sample(noise) * model.scale
        if self.stage == "image-to-text":
            return {"total": image_to_text_loss(model, tokens, ids, generator=generator)}
        flow = text_to_image_loss(model, ids, tokens, generator=generator)
        return {**flow._asdict(), "flow": flow.flow.mean()}


def trained_parts(stage: Stage, model: FlowTok) -> list[nn.Module]:
    """What a stage trains; everything else is frozen."""
    if stage == "image-tokenizer":
        return [model.image]
    if stage == "text-to-image":
        return [model.to_image]
    captioner = model.captioner()
    return [captioner.projector, captioner.decoder] if stage == "text-tokenizer" else [captioner.velocity]


def with_critic(recipe: Recipe, model: FlowTok) -> ImageTokenizerTraining | None:
    """The image tokenizer beside its perceptual network and critic, or None where the recipe wants neither."""
    kind = recipe.perceptual
    if kind == "auto":
        kind = "none" if recipe.size == "tiny" else "efficientnet"
    if kind == "none":
        return None
    if kind == "lpips" and recipe.vgg is None:
        raise SystemExit("--perceptual lpips needs --vgg FILE")
    perceptual = LpipsVGG.from_files(recipe.vgg) if recipe.vgg is not None else EfficientNetLite0.from_package()
    return ImageTokenizerTraining(model, perceptual=perceptual, critic=PatchCritic())


def train_stage(recipe: Recipe, stage: Stage, model: FlowTok) -> float:
    """One stage in place, ending with the averaged weights; returns the mean total of the last tenth."""
    settings = (TINY if recipe.size == "tiny" else PUBLISHED)[stage]
    steps = recipe.steps or settings.steps
    model.requires_grad_(False)
    parameters = [p for part in trained_parts(stage, model) for p in part.requires_grad_(True).parameters()]
    size = model.config.image.image_size
    pictures = CaptionedShapes(size=size, count=recipe.pictures, seed=recipe.seed)
    warmup = min(settings.warmup, steps // 4)
    training = with_critic(recipe, model) if stage == "image-tokenizer" else None
    if training is not None:
        parameters += list(training.critic.parameters())
    fitted = fit(
        model if training is None else training,
        StageLoss(stage, model.captions.ids(CAPTIONS)),
        torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.decay),
        batches(pictures, recipe.batch or settings.batch, seed=recipe.seed),
        steps=steps,
        out=recipe.out / stage,
        resume=recipe.resume,
        seed=recipe.seed,
        schedule=Schedule(kind="cosine", warmup=warmup, steps=steps, floor=settings.floor)
        if settings.cosine
        else Schedule(warmup=warmup),
        clip=settings.clip,
        ema_decay=settings.ema,
        precision=recipe.precision,
        settings={"stage": stage, "size": recipe.size, "pictures": recipe.pictures},
        progress=False,
    )
    assert fitted.ema is not None
    with fitted.ema.applied_to(model if training is None else training):
        averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(averaged)
    if stage == "image-tokenizer":
        first = pictures.batch(torch.arange(min(256, len(pictures))).numpy())
        model.eval().measure_scale(first.images.to(model.device))
    model.save_pretrained(recipe.out / "model")
    tail = fitted.losses[-max(1, len(fitted.losses) // 10) :]
    return sum(tail) / max(1, len(tail))


def main(recipe: Recipe) -> None:
    """Train the wanted stages in order."""
    if recipe.clip_words and recipe.size == "tiny":
        raise SystemExit("the tiny text tower is no CLIP; leave out --clip-words")
    folder = recipe.out / "model"
    wanted = STAGES if recipe.stage == "all" else (recipe.stage,)
    fresh = recipe.stage in ("all", "image-tokenizer") and not (recipe.resume and folder.is_dir())
    model = new_model(recipe) if fresh else FlowTok.from_pretrained(folder)
    for stage in wanted:
        print(json.dumps({"stage": stage, "loss": round(train_stage(recipe, stage, model), 5)}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
