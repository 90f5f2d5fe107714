"""`headrace tokenizer train`: train TokenFlow, or only a new pixel decoder for a trained one."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from headrace.nn.perceptual import Frozen
    from headrace.tokenizers.tokenflow import TokenFlow
    from headrace.tokenizers.tokenflow_loss import TokenFlowTraining
    from headrace.tokenizers.tokenflow_teacher import Taught


def train(
    *,
    data: str,
    out: Path,
    variant: str | None = None,
    start: str | None = None,
    stage: Literal["all", "decoder"] = "all",
    teacher: Literal["efficientnet", "tower"] = "efficientnet",
    vgg: Path | None = None,
    steps: int = 1000,
    batch_size: int = 8,
    lr: float = 1e-4,
    decay_over: int = 0,
    tower_factor: float = 1.0,
    book_factor: float = 1.0,
    pool: int = 0,
    recolour: float = 0.0,
    adversarial_start: int = 20_000,
    pixel_weight: float = 1.0,
    scale_drop: float = 0.1,
    distance_weights: tuple[float, float] = (1.0, 1.0),
    restart_every: int = 0,
    ema_decay: float | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    checkpoint_every: int = 1000,
    seed: int = 0,
    resume: bool = False,
) -> int:
    """Train a TokenFlow tokenizer and write it to OUT/model.

    Args:
        data: A folder of pictures, or `crops`, `shapes`, `mixed` (made from what packages ship).
        out: Run folder; checkpoints, log, and at the end the tokenizer in `model` (and `model_ema`).
        variant: Configuration, such as `mini`, `b`, `b_256`, `l`, `xl`. For stage `decoder`, the one whose pixel
            decoder is wanted. Default: that of `start`, or `mini`.
        start: Tokenizer to go on from: a folder, a Hub id, or a file of the release as `tokenflow:FILE`. Stage
            `decoder` needs it.
        stage: `all`, or `decoder` for an enhanced pixel decoder on fixed codes.
        teacher: `efficientnet` works offline; `tower` loads the published weights of the variant's tower. Where the
            tower is the teacher's network, the student starts from the teacher.
        vgg: VGG-16 weights for LPIPS; without them the perceptual term is EfficientNet-Lite0's.
        steps: Updates in all.
        batch_size: Pictures per update, over all processes.
        lr: Learning rate.
        decay_over: Updates in which it falls to 0 on a half cosine; 0 keeps it constant, as published.
        tower_factor: Factor on it for the tower; 0 freezes the tower, which saves its backward pass.
        book_factor: Factor on it for the codebooks.
        pool: Take pictures from this many only and keep the EfficientNet teacher's features of them in memory; 0 takes
            fresh ones all the time. A built-in set is the same pool for every seed.
        recolour: Share of the built-in photographs' crops that come in other colours; their pictures hold few.
        adversarial_start: Update from which the critic takes part.
        pixel_weight: Weight of the mean squared error of pixels.
        scale_drop: Probability of leaving out a scale in an update.
        distance_weights: Weight of the semantic and the pixel codebook in the shared distance; a tiny weight for one
            makes the other choose alone.
        restart_every: Updates between restarts of unused codes; 0 for none, as published.
        ema_decay: Average the weights with this decay, too.
        precision: Of the forward pass (`auto`: bf16 where native, else fp32); quantisation always runs in float32.
        checkpoint_every: Updates between checkpoints.
        seed: Of weights, order and crops.
        resume: Go on with the run in OUT.
    """
    import torch

    from headrace.cli.tokenizer_pictures import open_pictures
    from headrace.nn.quantizers.code_restart import CodeRestart
    from headrace.tokenizers.tokenflow_critic import PatchCritic
    from headrace.tokenizers.tokenflow_loss import TokenFlowLossConfig, TokenFlowTraining, build_optimizer
    from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher, TaughtPictures
    from headrace.training.batches import batches
    from headrace.training.loop import fit
    from headrace.training.schedule import Schedule

    if pool and (stage != "all" or teacher != "efficientnet"):
        raise ValueError("--pool keeps features of the EfficientNet teacher: it goes with stage 'all' and that teacher")
    torch.manual_seed(seed)
    variant = variant or ("mini" if start is None else None)
    model = _model(variant, start, stage, distance_weights)
    taught_by = _teacher(model, teacher, fresh=start is None) if stage == "all" else None
    if tower_factor == 0:
        model.tower.requires_grad_(False)
    config = TokenFlowLossConfig(
        stage=stage,
        pixel=pixel_weight,
        adversarial_start=adversarial_start,
        scale_drop=scale_drop,
        tower_is_teacher=tower_factor == 0
        and start is None
        and isinstance(taught_by, EfficientNetTeacher)
        and model.config.tower.family == "efficientnet",
    )
    training = TokenFlowTraining(
        model,
        teacher=taught_by,
        perceptual=_perceptual(vgg),
        critic=PatchCritic() if model.config.size > 64 else PatchCritic(width=16, layers=2),
        config=config,
        restart=CodeRestart(model.config.quantizer.codes, every=restart_every, seed=seed) if restart_every else None,
    )
    optimizer = build_optimizer(training, lr=lr, tower_factor=tower_factor, book_factor=book_factor)
    pictures = open_pictures(
        data,
        model.preprocessing,
        part="training",
        count=pool or None,
        seed=0 if pool else seed,
        recolour=recolour,
    )
    source = TaughtPictures(pictures, taught_by) if pool and isinstance(taught_by, EfficientNetTeacher) else pictures
    fitted = fit(
        training,
        _terms,
        optimizer,
        batches(source, batch_size, seed=seed, visits=not pool),  # a pool is the same at each visit
        steps=steps,
        out=out,
        resume=resume,
        seed=seed,
        schedule=Schedule(kind="cosine", steps=decay_over) if decay_over else Schedule(),
        clip=None,  # each network is clipped by the optimizer's hook
        ema_decay=ema_decay,
        precision=precision,
        checkpoint_every=checkpoint_every,
        keep=1,
        find_unused=True,  # the critic has no gradient before its start
        settings={
            "data": data,
            "variant": variant,
            "start": start,
            "stage": stage,
            "teacher": teacher,
            "batch_size": batch_size,
            "perceptual": "efficientnet" if vgg is None else "vgg",
            "pool": pool,
            "recolour": recolour,
            "tower_factor": tower_factor,
            "book_factor": book_factor,
            "adversarial_start": adversarial_start,
            "pixel_weight": pixel_weight,
            "scale_drop": scale_drop,
            "distance_weights": list(distance_weights),
            "restart_every": restart_every,
        },
    )
    model.save_pretrained(out / "model")
    if fitted.ema is not None:
        with fitted.ema.applied_to(training):
            model.save_pretrained(out / "model_ema")
    print(f"{fitted.step} updates, {fitted.seconds:.0f} s in this run; the tokenizer is in {out / 'model'}")
    return 0


def _terms(training: "TokenFlowTraining", batch: "Taught | Tensor", generator: "Generator") -> dict[str, "Tensor"]:
    if isinstance(batch, tuple):
        return training(batch.images, generator, taught=batch.features)
    return training(batch, generator)


def _model(variant: str | None, start: str | None, stage: str, distance_weights: tuple[float, float]) -> "TokenFlow":
    from headrace.tokenizers.auto import load_tokenizer, tokenizer_config
    from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
    from headrace.tokenizers.tokenflow_loss import with_new_decoder

    wanted: TokenFlowConfig | None = None if variant is None else tokenizer_config(f"tokenflow:{variant}")
    if start is None:
        if stage == "decoder" or wanted is None:
            raise ValueError("stage 'decoder' trains a decoder for a trained tokenizer: name it with --start")
        return TokenFlow(replace(wanted, quantizer=replace(wanted.quantizer, weights=distance_weights)))
    if distance_weights != (1.0, 1.0):
        raise ValueError("--distance-weights is for a new tokenizer; one named with --start keeps its own")
    model = load_tokenizer(start)
    if not isinstance(model, TokenFlow):
        raise ValueError(f"{start} is a {type(model).__name__}, not a TokenFlow")
    found = replace(model.config, quantizer=replace(model.config.quantizer, weights=(1.0, 1.0)))
    parts = [field.name for field in fields(found) if stage == "all" or field.name != "pixel_decoder"]
    if wanted is not None and any(getattr(found, part) != getattr(wanted, part) for part in parts):
        names = [name for name in TokenFlow.VARIANTS if getattr(TokenFlowConfig, name)() == found]
        raise ValueError(
            f"--start {start} is {names[0] if names else 'no named variant'!r}, which does not fit --variant "
            f"{variant!r}; leave --variant out, or name the other"
        )
    if stage == "all":
        return model
    return with_new_decoder(model, (wanted or found).pixel_decoder)


def _teacher(model: "TokenFlow", name: str, *, fresh: bool) -> "Frozen":
    from headrace.nn.perceptual import EfficientNetLite0
    from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher, pretrained_teacher

    if name == "tower":
        teacher = pretrained_teacher(model.config.tower)
        if fresh:
            model.tower.load_state_dict(teacher.tower.state_dict())
        return teacher
    wanted, grid = model.config.semantic_decoder.teacher, model.config.quantizer.grid
    if wanted != EfficientNetTeacher.width:
        raise ValueError(
            f"the EfficientNet teacher has {EfficientNetTeacher.width} channels, this variant predicts {wanted}; use "
            "--teacher tower, or --variant mini"
        )
    side = max(64, min(224, 8 * grid // 32 * 32))
    lite = EfficientNetTeacher(EfficientNetLite0.from_package(side=side), grid=grid)
    if fresh and model.config.tower.family == "efficientnet":
        lite.start(model.tower)
    return lite


def _perceptual(vgg: Path | None) -> "Frozen":
    from headrace.nn.perceptual import EfficientNetLite0, LpipsVGG

    return LpipsVGG.from_files(vgg) if vgg is not None else EfficientNetLite0.from_package(side=64)
