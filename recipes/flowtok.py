"""Train FlowTok in its stages on captioned pictures: image tokenizer, text to image, and back to text.

The pictures are rendered shapes, generated flowcharts, or both. The two flow stages read stored posteriors of the
pictures, as the release does.

Sources: arXiv 2503.10772 and TACJu/FlowTok (flow), bytedance/1d-tokenizer (image tokenizer). The published sizes run
the same code; the published data (DataComp and others, 10^9 pictures) is not to be had offline.

    python recipes/flowtok.py --out runs/flowtok                      # tiny, all stages, about 10 minutes on 2 cores
    python recipes/flowtok.py --out runs/flowtok-xl --size xl --stage image-tokenizer
    headrace flowlearn generate --count 2000 --variant char --out data/charts
    python recipes/flowtok.py --out runs/flowtok-charts --source both --charts data/charts --image-size 64
    python recipes/flowtok.py --out runs/second --start runs/flowtok/model --stage text-to-image --pictures 5000
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from headrace.datasets.captioned_charts import CHART_CAPTIONS, CaptionedCharts
from headrace.datasets.captioned_shapes import Captioned, CaptionedShapes
from headrace.nn.perceptual import EfficientNetLite0, LpipsVGG
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import TINY_WORDS, FlowTokConfig
from headrace.tokenizers.flowtok_critic import CriticConfig, ImageTokenizerTraining
from headrace.tokenizers.flowtok_image import Posterior
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
Size = Literal["tiny", "b", "xl", "h"]
SIZES: tuple[Size, ...] = ("tiny", "b", "xl", "h")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Optimizer of one stage: AdamW, warm-up, then constant, or cosine to `floor`.

    `uncaptioned` is the share of pictures that the image tokenizer decodes with an empty caption: without any, a small
    decoder draws the caption and lets the tokens be. `divergence` weighs the image tokens' KL: its gradient is tiny but
    always points the same way, and while the picture says nothing yet Adam follows it until noise covers the tokens.
    `adversarial_start` is the update from which the image tokenizer's critic counts, where there is one.
    """

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
    uncaptioned: float = 0.0
    divergence: float = 1e-6
    adversarial_start: int = 200_000


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
    "image-tokenizer": Settings(
        steps=1500,
        batch=32,
        lr=2e-3,
        warmup=30,
        cosine=True,
        floor=0.05,
        clip=1.0,
        ema=0.99,
        uncaptioned=0.5,
        divergence=0.0,
        adversarial_start=50,
    ),
    "text-to-image": Settings(steps=1000, batch=64, lr=1e-3, warmup=50, cosine=True, floor=0.05, clip=1.0, ema=0.99),
    "text-tokenizer": Settings(steps=300, batch=64, lr=3e-3, warmup=20, cosine=True, floor=0.05, clip=1.0, ema=0.99),
    "image-to-text": Settings(steps=800, batch=64, lr=1e-3, warmup=50, cosine=True, floor=0.05, clip=1.0, ema=0.99),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train.

    Attributes:
        out: Run folder; each stage writes into a folder of its name, the model into `model`.
        stage: One stage, or all in order. A later stage starts from `out/model`.
        start: Folder of an earlier run's model whose weights training begins with, for a second set of data; its
            captions must cover those of the data.
        size: Configuration of a new model, default `tiny`, which is 32 px. A model that is read has its own.
        source: Rendered shapes, generated flowcharts, or both with one vocabulary.
        charts: Folder that `headrace flowlearn generate` wrote; needed for flowcharts.
        image_size: Side [px] of a new model other than the configuration's; boxes of a chart want 64 at least.
        clip_words: Captions in CLIP's vocabulary with CLIP's weights (fetched from the Hub); else only the words of the
            source.
        pictures: Rendered shapes.
        steps: Override of each stage's steps.
        batch: Override of each stage's batch.
        uncaptioned: Override of the share of pictures that the image tokenizer decodes with an empty caption. What the
            caption says, the tokens need not hold, and image-to-text then cannot find it in them.
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
    start: Path | None = None
    size: Size | None = None
    source: Literal["shapes", "charts", "both"] = "shapes"
    charts: Path | None = None
    image_size: int | None = None
    clip_words: bool = False
    pictures: int = 20_000
    steps: int | None = None
    batch: int | None = None
    uncaptioned: float | None = None
    perceptual: Literal["auto", "none", "efficientnet", "lpips"] = "auto"
    vgg: Path | None = None
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    seed: int = 0
    resume: bool = False


class Joined:
    """Two sets of captioned pictures as one; the second's captions are numbered after the first's."""

    def __init__(self, first: CaptionedShapes, second: CaptionedCharts) -> None:
        self.first, self.second = first, second
        self.captions = first.captions + second.captions

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def batch(self, indices: np.ndarray) -> Captioned:
        """Pictures of these indices, those of the first set first."""
        later = indices >= len(self.first)
        parts = [self.first.batch(indices[~later])] if (~later).any() else []
        if later.any():
            images, label = self.second.batch(indices[later] - len(self.first))
            parts.append(Captioned(images, label + len(self.first.captions)))
        return Captioned(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


Pictures = CaptionedShapes | CaptionedCharts | Joined


def pictures_of(recipe: Recipe, size: int) -> Pictures:
    """The training pictures of a recipe at `size` px; ends with a message when there are no charts to read."""
    shapes = CaptionedShapes(size=size, count=recipe.pictures, seed=recipe.seed)
    if recipe.source == "shapes":
        return shapes
    if recipe.charts is None:
        raise SystemExit(f"--source {recipe.source} needs --charts FOLDER")
    charts = CaptionedCharts(recipe.charts, size=size)
    return charts if recipe.source == "charts" else Joined(shapes, charts)


class Coded(NamedTuple):
    """Stored posteriors of pictures, mean and log-variance (B, K, D), and the index of each one's caption, (B,)."""

    mean: Tensor
    logvar: Tensor
    label: Tensor


class CodedPictures:
    """The posteriors of all pictures, computed once with the frozen image tokenizer."""

    def __init__(self, model: FlowTok, pictures: Pictures, *, size: int = 256) -> None:
        parts = []
        with torch.no_grad():
            for start in range(0, len(pictures), size):
                images, label = pictures.batch(np.arange(start, min(start + size, len(pictures))))
                posterior = model.posterior(images.to(model.device))
                parts.append(Coded(posterior.mean.cpu(), posterior.logvar.cpu(), label))
        self.coded = Coded(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.coded.label)

    def batch(self, indices: np.ndarray) -> Coded:
        """Posteriors of these pictures."""
        return Coded(*(column[torch.from_numpy(indices)] for column in self.coded))


def new_model(recipe: Recipe) -> FlowTok:
    """The untrained model of a recipe; ends with a message when CLIP's words are asked of the tiny tower."""
    if recipe.clip_words and recipe.size in (None, "tiny"):
        raise SystemExit("the tiny text tower is no CLIP; leave out --clip-words")
    torch.manual_seed(recipe.seed)
    config: FlowTokConfig = getattr(FlowTokConfig, recipe.size or "tiny")()
    if not recipe.clip_words:
        charted = [] if recipe.source == "shapes" else [word for text in CHART_CAPTIONS for word in text.split()]
        words = tuple(dict.fromkeys([*TINY_WORDS, *charted]))
        config = dataclasses.replace(config, captions=dataclasses.replace(config.captions, words=words))
    if recipe.image_size is not None:
        config = dataclasses.replace(config, image=dataclasses.replace(config.image, image_size=recipe.image_size))
    model = FlowTok(config)
    if recipe.clip_words:
        model.captions.load_clip()
    return model


def size_of(model: FlowTok) -> Size:
    """The size whose velocity network the model has; ends with a message if it has another."""
    for size in SIZES:
        if getattr(FlowTokConfig, size)().net == model.config.net:
            return size
    raise SystemExit(f"the model's velocity network is of none of the sizes {', '.join(SIZES)}: {model.config.net}")


def first_model(recipe: Recipe) -> FlowTok:
    """The model that the first wanted stage trains: a new one, that of `start`, or that of `out/model`.

    Ends with a message when options ask for another size than a model that is read has.
    """
    kept = recipe.out / "model"
    source = kept if recipe.resume and kept.is_dir() else recipe.start
    if source is None and recipe.stage in ("all", "image-tokenizer"):
        return new_model(recipe)
    source = source or kept
    model = FlowTok.from_pretrained(source)
    side = model.config.image.image_size
    for option, wanted, got in (("size", recipe.size, size_of(model)), ("image-size", recipe.image_size, side)):
        if wanted not in (None, got):
            raise SystemExit(f"--{option} {wanted}, but the model in {source} has {got}; leave --{option} out")
    if recipe.clip_words:
        raise SystemExit(f"--clip-words is for a new model; the one in {source} has its words; leave --clip-words out")
    return model


class StageLoss:
    """The loss of one stage as `fit` calls it: pictures for the image tokenizer, stored posteriors for the flows.

    `frozen` is put into the model at the first call: a checkpoint that `fit` went on from holds the whole model, and
    what this stage does not train may have been trained since.
    """

    def __init__(
        self,
        stage: Stage,
        ids: Tensor,
        empty: Tensor,
        *,
        uncaptioned: float = 0.0,
        divergence: float = 1e-6,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.stage, self.ids, self.empty = stage, ids, empty
        self.uncaptioned, self.divergence, self.frozen = uncaptioned, divergence, frozen

    def __call__(
        self, model: FlowTok | ImageTokenizerTraining, batch: Captioned | Coded, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.frozen is not None:
            flowtok = model.model if isinstance(model, ImageTokenizerTraining) else model
            flowtok.load_state_dict(self.frozen, strict=False)
            self.frozen = None
        ids = self.ids.to(batch.label.device)[batch.label]
        if self.stage == "image-tokenizer":
            assert isinstance(batch, Captioned)
            return self.image_tokenizer(model, batch.images, ids, generator)
        assert isinstance(model, FlowTok)
        if self.stage == "text-tokenizer":
            text = text_tokenizer_loss(model, ids, generator=generator)
            return {"total": text.total, "words": text.words, "kl": text.kl, "accuracy": text.accuracy}
        assert isinstance(batch, Coded)
        noise = torch.randn(batch.mean.shape, generator=generator, device=batch.mean.device)
        tokens = Posterior(batch.mean, batch.logvar).sample(noise) * model.scale
        if self.stage == "image-to-text":
            return {"total": image_to_text_loss(model, tokens, ids, generator=generator)}
        flow = text_to_image_loss(model, ids, tokens, generator=generator)
        return {**flow._asdict(), "flow": flow.flow.mean()}

    def image_tokenizer(
        self, model: FlowTok | ImageTokenizerTraining, images: Tensor, ids: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Squared error and divergence, with perceptual distance and critic where the recipe has them."""
        if self.uncaptioned:
            bare = torch.rand(len(ids), generator=generator, device=ids.device) < self.uncaptioned
            ids = torch.where(bare[:, None], self.empty.to(ids.device), ids)
        if isinstance(model, ImageTokenizerTraining):
            return model(images, model.model.captions(ids), generator)
        text = model.captions(ids)
        image = image_tokenizer_loss(model, images, text, kl_weight=self.divergence, generator=generator)
        return {"total": image.total, "squared": image.squared, "kl": image.kl}


def trained_parts(stage: Stage, model: FlowTok) -> list[nn.Module]:
    """What a stage trains; everything else is frozen."""
    if stage == "image-tokenizer":
        return [model.image]
    if stage == "text-to-image":
        return [model.to_image]
    captioner = model.captioner()
    return [captioner.projector, captioner.decoder] if stage == "text-tokenizer" else [captioner.velocity]


def frozen_state(stage: Stage, model: FlowTok) -> dict[str, Tensor]:
    """Copies of the weights and buffers, such as the tokens' scale, that a stage does not train."""
    trained = {id(t) for part in trained_parts(stage, model) for t in part.state_dict(keep_vars=True).values()}
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach().clone() for name, tensor in state.items() if id(tensor) not in trained}


def with_critic(recipe: Recipe, settings: Settings, model: FlowTok) -> ImageTokenizerTraining | None:
    """The image tokenizer beside its perceptual network and critic, or None where the recipe wants neither."""
    kind = recipe.perceptual
    if recipe.vgg is not None and kind != "lpips":
        raise SystemExit(f"--vgg is read by --perceptual lpips only, which is {kind} here")
    if kind == "auto":
        kind = "none" if size_of(model) == "tiny" else "efficientnet"
    if kind == "none":
        return None
    if kind == "efficientnet":
        perceptual: nn.Module = EfficientNetLite0.from_package()
    elif recipe.vgg is not None:
        perceptual = LpipsVGG.from_files(recipe.vgg)
    else:
        raise SystemExit("--perceptual lpips needs --vgg FILE")
    config = CriticConfig(start=settings.adversarial_start, kl=settings.divergence)
    torch.manual_seed(recipe.seed)  # a model that was read has drawn nothing
    return ImageTokenizerTraining(model, perceptual=perceptual, critic=PatchCritic(), config=config)


def train_stage(recipe: Recipe, stage: Stage, model: FlowTok) -> float:
    """One stage in place, ending with the averaged weights; returns the mean total of the last tenth."""
    size_name = size_of(model)
    if stage == "text-to-image":
        model.step_grid = None  # it fitted the velocity from before
    settings = (TINY if size_name == "tiny" else PUBLISHED)[stage]
    steps = recipe.steps or settings.steps
    model.requires_grad_(False)
    parameters = [p for part in trained_parts(stage, model) for p in part.requires_grad_(True).parameters()]
    size = model.config.image.image_size
    pictures = pictures_of(recipe, size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = CodedPictures(model.eval(), pictures) if stage in ("text-to-image", "image-to-text") else pictures
    kept = frozen_state(stage, model)
    warmup = min(settings.warmup, steps // 4)
    ids = model.captions.ids
    training = with_critic(recipe, settings, model) if stage == "image-tokenizer" else None
    networks = [parameters] if training is None else [parameters, list(training.critic.parameters())]
    optimizer = torch.optim.AdamW(
        [{"params": part} for part in networks], lr=settings.lr, betas=settings.betas, weight_decay=settings.decay
    )

    def clip_each(*_: object) -> None:  # the critic's gradient must not shorten the tokenizer's step
        for part in networks:
            nn.utils.clip_grad_norm_(part, settings.clip or math.inf)

    optimizer.register_step_pre_hook(clip_each)
    fitted = fit(
        model if training is None else training,
        StageLoss(
            stage,
            ids(pictures.captions),
            ids([""]),
            uncaptioned=settings.uncaptioned if recipe.uncaptioned is None else recipe.uncaptioned,
            divergence=settings.divergence,
            frozen=kept,
        ),
        optimizer,
        batches(data, recipe.batch or settings.batch, seed=recipe.seed),
        steps=steps,
        out=recipe.out / stage,
        resume=recipe.resume,
        seed=recipe.seed,
        schedule=Schedule(kind="cosine", warmup=warmup, steps=steps, floor=settings.floor)
        if settings.cosine
        else Schedule(warmup=warmup),
        clip=None,  # by the optimizer's hook
        ema_decay=settings.ema,
        precision=recipe.precision,
        settings={
            "stage": stage,
            "size": size_name,
            "pictures": len(pictures),
            "source": recipe.source,
            "uncaptioned": recipe.uncaptioned,
        },
        progress=False,
        find_unused=training is not None,
    )
    assert fitted.ema is not None
    with fitted.ema.applied_to(model if training is None else training):
        averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A checkpoint holds the whole model: what later stages have trained must outlive a stage that is gone on with.
    model.load_state_dict(averaged | {name: tensor.to(averaged[name]) for name, tensor in kept.items()})
    if stage == "image-tokenizer":
        spread = np.linspace(0, len(pictures) - 1, min(256, len(pictures))).astype(np.int64)  # of both sources
        model.eval().measure_scale(pictures.batch(spread).images.to(model.device))
    model.save_pretrained(recipe.out / "model")
    tail = fitted.losses[-max(1, len(fitted.losses) // 10) :]
    return sum(tail) / max(1, len(tail))


def main(recipe: Recipe) -> None:
    """Train the wanted stages in order."""
    wanted = STAGES if recipe.stage == "all" else (recipe.stage,)
    model = first_model(recipe)
    for stage in wanted:
        print(json.dumps({"stage": stage, "loss": round(train_stage(recipe, stage, model), 5)}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
