"""Train a tiny latent action model on videos of a simulated arm, label held-out videos, and ask what the codes know.

The videos come from LeRobot datasets (`headrace collect --task PickCube-v1 --out data/PickCube-v1`), whose actions are
not read, or from folders of video files. The states are, afterwards, for the probe: how much of the end effector's
motion a linear map reads from the codes of episodes that neither the model nor the probe has seen. Where a source has
no such states there is no probe.

    python recipes/latent_actions.py --data data/PickCube-v1 data/PushCube-v1 data/StackCube-v1 --out runs/lam

`--flow 0` is the same run without the optical-flow term. `--preset vipra`, `lapa`, `univla` or `moto` trains one of the
published settings instead of the flags', at tiny size or, with `--size published`, at its own (for a GPU; `--features`
takes DINOv2's weights). The last line printed is JSON; it is in `report.json` as well.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from headrace.datasets.frame_rate import common_rate
from headrace.datasets.lerobot_files import read_columns, read_info, vector_names
from headrace.datasets.video_clips import ClipBatches, VideoClips
from headrace.datasets.video_source import open_sources
from headrace.nn.optical_flow import LucasKanade
from headrace.nn.quantizers.dead_codes import DeadCodeSchedule
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.latent_action_judge import judge
from headrace.robot.latent_action_loss import LatentActionLoss, LatentActionLossConfig, LossSchedule
from headrace.robot.latent_action_training import LatentActionObjective, StepBatches
from headrace.robot.latent_action_transfer import carry_over, write_page
from headrace.training.loop import fit
from headrace.training.schedule import Schedule

# What a preset decides, and the values without one.
DECIDED: dict[str, Any] = {
    "frames": 4,
    "image_size": 64,
    "patch": 16,
    "width": 128,
    "tokens": 4,
    "codes": 8,
    "distance": "mse",
    "unquantized": 0.3,
    "differences": True,
    "unit_rows": True,
}
PRESETS = {
    "vipra": LatentActionConfig,
    "lapa": LatentActionConfig.lapa,
    "univla": LatentActionConfig.univla,
    "moto": LatentActionConfig.moto,
}
LATER = ("preset", "size", "features")  # not among the facts of a run without a preset, so that older ones go on


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the run; all numbers of the report follow from them. None is decided by `filled`."""

    data: tuple[str, ...]  # LeRobot datasets or folders of video files
    weights: tuple[float, ...] = ()  # share of each of them in the batches; by number of videos if empty
    out: Path
    steps: int = 600
    batch_size: int = 32
    preset: Literal["none", "vipra", "lapa", "univla", "moto"] = "none"  # a published setting in place of the flags
    size: Literal["tiny", "published"] = "tiny"  # of a preset
    features: Path | None = None  # DINOv2's own checkpoint, for the presets of published size that look through it
    frames: int | None = None  # 4 without a preset
    image_size: int | None = None  # 64
    window: tuple[float, float, float] | None = None  # left, top, side of what is seen, as shares of the picture
    patch: int | None = None  # 16
    width: int | None = None  # 128
    tokens: int | None = None  # 4
    codes: int | None = None  # 8
    stride: int = 1
    lr: float = 1e-3
    distance: Literal["l1", "mse"] | None = None  # mse
    flow: float | None = None  # final weight of the optical-flow term, 0 is off; 0.1, with pairs of frames 0
    unquantized: float | None = None  # share of the run before codes take the place of the encoder's rows; 0.3
    differences: bool | None = None  # transitions from differences of frame features, as in LAPA; True
    unit_rows: bool | None = None  # rows as large as the codes; True
    held_out: int = 4  # every n-th episode is kept from training
    state_prefix: str = "tcp."  # names of the states that are the end effector's position
    seed: int = 0
    resume: bool = False


def published(recipe: Recipe) -> LatentActionConfig:
    """The preset's model, at the size that is asked for."""
    config = PRESETS[recipe.preset]()
    return config if recipe.size == "published" else config.at_tiny_size()


def filled(recipe: Recipe) -> Recipe:
    """The recipe with every number that was not given: the preset's, or those of `DECIDED`.

    Raises:
        ValueError: A preset and a flag that it decides, a size or weights without a preset, weights that are missing
            or have no place, or the optical-flow term on pairs of frames.
    """
    if recipe.preset == "none":
        if recipe.size != "tiny" or recipe.features is not None:
            raise ValueError("--size and --features belong to a --preset; give one, or leave them out")
        values = {"flow": 0.1, **DECIDED}
    else:
        given = [f"--{name.replace('_', '-')}" for name in DECIDED if getattr(recipe, name) is not None]
        if given:
            raise ValueError(f"--preset {recipe.preset} decides {', '.join(given)}; leave them out, or the preset")
        config = published(recipe)
        values = {
            "frames": config.frames,
            "image_size": config.image_size,
            "patch": config.features.patch,
            "width": config.encoder.width,
            "tokens": config.tokens,
            "codes": config.quantizer.codes,
            "distance": "l1" if recipe.preset == "vipra" else "mse",
            "unquantized": 0.0,
            "differences": config.differences,
            "unit_rows": config.unit_rows,
            "flow": 0.1 if config.frames > 2 else 0.0,
        }
        if config.frames == 2 and recipe.flow:
            raise ValueError(f"--preset {recipe.preset} predicts one frame of a pair: no motion to compare; --flow 0")
        sees = config.features.kind == "timm"
        if recipe.features is not None and not sees:
            raise ValueError(f"--preset {recipe.preset} at {recipe.size} size has no DINOv2; leave out --features")
        if recipe.features is None and sees and config.features.frozen:
            raise ValueError(
                f"--preset {recipe.preset} looks through a frozen DINOv2: give its weights, --features PATH, or take "
                "--size tiny"
            )
    return replace(recipe, **{name: value for name, value in values.items() if getattr(recipe, name) is None})


def config_of(recipe: Recipe) -> LatentActionConfig:
    """The model of a filled recipe."""
    if recipe.preset != "none":
        return replace(published(recipe), window=recipe.window)
    tiny = LatentActionConfig.tiny(image_size=recipe.image_size, patch=recipe.patch)
    return replace(
        tiny,
        window=recipe.window,
        frames=recipe.frames,
        features=replace(tiny.features, width=recipe.width),
        encoder=replace(tiny.encoder, width=recipe.width, dropout=0.0),
        decoder=replace(tiny.decoder, width=recipe.width, dropout=0.0),
        quantizer=replace(tiny.quantizer, codes=recipe.codes),
        tokens=recipe.tokens,
        differences=recipe.differences,
        unit_rows=recipe.unit_rows,
        residual=True,
    )


def split(recipe: Recipe) -> tuple[VideoClips, VideoClips]:
    """Training and held-out videos; a source with too few for the latter is in training alone."""
    whole = open_sources(recipe.data, strides=(recipe.stride,))
    if all(len(source.videos) < recipe.held_out for source in whole):
        raise ValueError(f"every {recipe.held_out}th video is held out, and no source has so many; lower --held-out")
    parts = []
    for held in (False, True):
        sources = []
        for source in whole:
            keep = [i for i in range(len(source.videos)) if (i % recipe.held_out == recipe.held_out - 1) == held]
            videos, strides = tuple(source.videos[i] for i in keep), tuple(source.strides[i] for i in keep)
            if keep:
                sources.append(replace(source, videos=videos, strides=strides))
        parts.append(VideoClips(sources, image_size=recipe.image_size, window=recipe.window))
    return parts[0], parts[1]


def dead_codes(recipe: Recipe) -> DeadCodeSchedule:
    """Every 20 steps from the start of the codes to four fifths of the run."""
    first, last = round(recipe.unquantized * recipe.steps), max(1, round(0.8 * recipe.steps))
    return DeadCodeSchedule(phases=((first + 1, max(first + 1, last), 20),))


def end_effector(corpus: VideoClips, prefix: str) -> dict[tuple[str, str], np.ndarray] | None:
    """Where the end effector is in each frame [mm], by source and video; None where a source does not say."""
    found = {}
    for source in corpus.sources:
        if not source.camera:  # a folder of video files
            return None
        features = read_info(source.folder)["features"]
        if "observation.state" not in features:
            return None
        names = vector_names(features, ["observation.state"], source.folder)
        keep = [i for i, name in enumerate(names) if name.startswith(prefix)]
        if not keep:
            return None
        columns = read_columns(source.folder, ["episode_index", "observation.state"])
        for video in source.videos:
            rows = columns["episode_index"] == int(video.name.removeprefix("episode_"))
            found[source.name, video.name] = 1000 * columns["observation.state"][rows][:, keep]
    return found


def show_transfer(model: LatentActionModel, held_out: VideoClips, recipe: Recipe) -> None:
    """Four pairs of held-out clips of 10 frames, as `transfer.html`."""
    random = np.random.default_rng(recipe.seed)
    videos = random.integers(len(held_out), size=8)
    starts = np.array([int(random.integers(max(1, held_out.lengths[v] // 2))) for v in videos])
    clips = held_out.clips(videos, starts, 10).frames.float() / 255
    write_page(
        carry_over(model, clips[:4], clips[4:]),
        recipe.out / "transfer.html",
        title="Latent actions of one clip on another",
        note=f"{recipe.steps} updates, seed {recipe.seed}; clips that the model was not trained on.",
    )


def main(recipe: Recipe) -> None:
    recipe = filled(recipe)
    torch.manual_seed(recipe.seed)
    training, held_out = split(recipe)
    config = config_of(recipe)
    config = replace(config, fps=common_rate(source.rate for source in training.sources) or config.fps)
    model = LatentActionModel(config)
    if recipe.features is not None:
        model.encoder.features.load_dinov2(recipe.features)
    slow = 0.1 if config.features.kind == "timm" else 1.0  # trained weights learn on slowly, as published
    optimizer = torch.optim.AdamW(model.optimizer_groups(recipe.lr, features_factor=slow), weight_decay=0.0)
    weights = LatentActionLossConfig(
        distance=recipe.distance,
        perceptual=0.0,
        flow_clips=max(1, recipe.batch_size // 4),
        flow=LossSchedule(start=recipe.steps // 5, ramp=max(1, recipe.steps // 20), weight=recipe.flow),
    )
    loss = LatentActionLoss(weights, estimate=LucasKanade(steps=2) if recipe.flow else None)
    hidden = ("out", "resume", "steps", *(LATER if recipe.preset == "none" else ()))
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(recipe).items()}
    settings = {k: v for k, v in facts.items() if k not in hidden}
    fitted = fit(
        model,
        LatentActionObjective(
            loss, dead_codes(recipe), optimizer, unquantized=round(recipe.unquantized * recipe.steps)
        ),
        optimizer,
        StepBatches(
            ClipBatches(
                training, recipe.batch_size, frames=recipe.frames, seed=recipe.seed, weights=recipe.weights or None
            )
        ),
        steps=recipe.steps,
        out=recipe.out,
        resume=recipe.resume,
        seed=recipe.seed,
        schedule=Schedule(kind="cosine", warmup=min(50, recipe.steps // 4), steps=recipe.steps),
        clip=6.0,
        precision="auto",
        checkpoint_every=max(1, recipe.steps // 2),
        settings=settings,
        find_unused=recipe.unquantized > 0,  # the codebook has no gradient until codes take over
    )
    model.save_pretrained(recipe.out / "model")
    parts = [end_effector(part, recipe.state_prefix) for part in (training, held_out)]
    positions = None if parts[0] is None or parts[1] is None else parts[0] | parts[1]
    report = {
        "recipe": facts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": fitted.seconds,
        "last_loss": sum(fitted.losses[-20:]) / len(fitted.losses[-20:]) if fitted.losses else math.nan,
        **judge(model, training, held_out, positions)._asdict(),
    }
    (recipe.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if config.target == "pixels":
        show_transfer(model, held_out, recipe)
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
