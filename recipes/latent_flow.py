"""Flow matching in the latent space of an autoencoder: free, by label, inpainting, or from a semantic map.

    python recipes/latent_flow.py --out runs/latent --task label                     # crops of scikit-image's pictures
    python recipes/latent_flow.py --out runs/frames --task semantic --maniskill PickCube-v1 StackCube-v1
    python recipes/latent_flow.py --out runs/mine --task inpaint --data pictures/    # sub-folders are the labels
    python recipes/latent_flow.py --out runs/blocks --blockwise --align --residual-steps 1000
    python recipes/latent_flow.py --out runs/big --autoencoder stabilityai/sd-vae-ft-mse --size l2 --image-size 256

Without `--autoencoder` a small KL autoencoder is trained first and kept in `out/autoencoder`. A folder or Hub id of
diffusers' AutoencoderKL works, and so does any continuous headrace tokenizer, written as `headrace:SOURCE`.

`--blockwise` is Blockwise Flow Matching: every batch is split over the six segments, `--align` adds the semantic
guidance of the trunk, and `--residual-steps` trains the feature residual afterwards, which then stands in for the trunk
after each segment's first step.

Source: arXiv 2307.08698; VinAIResearch/LFM@4d8e43d (facts only); blockwise: arXiv 2510.21167. LFM concatenates maps and
masked latents to the input; here they enter as a condition per token, which needs no second network shape.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from headrace.flow.blockwise import BlockwiseParts, feature_residual_loss, integrate_blockwise
from headrace.flow.coupling import ConditionMode, Coupled, Coupling, Kind
from headrace.flow.guidance import GuidedParts, integrate_guided
from headrace.flow.latent import LatentScaler, draw_latent
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate
from headrace.flow.straightness import wasserstein2_squared
from headrace.flow.time import segment_time, uniform_time
from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity
from headrace.training.batches import batches
from headrace.training.loop import fit
from headrace.training.schedule import Schedule

CLASSES = 8  # of a semantic map
SEGMENTS = 6  # of a blockwise network
ALIGN_WEIGHT = 0.05  # as released
SIZES = {  # width, heads, depth; b2 and l2 are DiT-B/2 and DiT-L/2 of the paper
    "tiny": (64, 2, 4),
    "small": (192, 6, 8),
    "b2": (768, 12, 12),
    "l2": (1024, 16, 24),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train.

    Attributes:
        out: Run folder.
        task: What the flow is conditioned on.
        data: Folder of pictures; sub-folders are labels, `NAME.map.png` beside `NAME.png` is a semantic map.
        maniskill: Render frames of these environments instead; the environment is the label.
        autoencoder: diffusers folder or Hub id, `headrace:SOURCE`, or nothing to train a small one.
        image_size: Side of the pictures [px].
        pictures: How many crops or frames.
        size: Network.
        blockwise: Six time segments with shared features instead of the plain network.
        align: Teach the shared features those of EfficientNet-Lite0, which needs `headrace[offline]` and a square
            latent grid. Do not score the samples with that network afterwards.
        coupling: Which noise goes with which latents: `exact` is OT-CFM, `gibbs` W-CFM.
        epsilon: Temperature of `sinkhorn` and `gibbs`; `headrace.flow.coupling.choose_epsilon` finds one.
        condition_mode: What a coupling does with the task's condition: `block` (labels), `c2ot`, or `biased`.
        residual_steps: Updates of the feature residual, with the rest frozen; 0 for none.
        autoencoder_steps, steps, batch_size, lr: Training. The paper: 32 per GPU, 2e-4 (CelebA, FFHQ) or 1e-4.
        label_dropout: Share of labels replaced by none, for guidance.
        guidance: Scale for label samples; 1.5 in the paper for ImageNet.
        sample_latents: Draw latents from the autoencoder's moments in training; else their mean.
        sampling_steps: Euler steps of the samples; a blockwise network rounds them up to a multiple of its segments.
        seed: Of everything.
        resume: Go on from the newest checkpoint.

    Raises:
        ValueError: A count out of range, an option of blockwise networks for a plain one, or a coupling that does not
            fit together.
        BiasedCoupling: A coupling for a conditional task without `condition_mode`.
    """

    out: Path
    task: Literal["free", "label", "inpaint", "semantic"] = "free"
    data: Path | None = None
    maniskill: tuple[str, ...] = ()
    autoencoder: str | None = None
    image_size: int = 32
    pictures: int = 2000
    size: Literal["tiny", "small", "b2", "l2"] = "tiny"
    blockwise: bool = False
    align: bool = False
    residual_steps: int = 0
    coupling: Kind = "independent"
    epsilon: float | None = None
    condition_mode: ConditionMode | None = None
    autoencoder_steps: int = 600
    steps: int = 2000
    batch_size: int = 32
    lr: float = 2e-4
    label_dropout: float = 0.1
    guidance: float = 1.5
    sample_latents: bool = True
    sampling_steps: int = 25
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.sampling_steps < 1:
            raise ValueError(f"--sampling-steps must be at least 1, got {self.sampling_steps}")
        if self.residual_steps < 0:
            raise ValueError(f"--residual-steps must be at least 0, got {self.residual_steps}")
        if not self.blockwise and (self.align or self.residual_steps):
            raise ValueError(
                "--align and --residual-steps are for the features of a blockwise network: add --blockwise"
            )
        if self.blockwise and self.batch_size < SEGMENTS:
            raise ValueError(f"--blockwise splits a batch over {SEGMENTS} segments, got --batch-size {self.batch_size}")
        if self.task != "free":
            self.pairing.require_mode()
            if self.condition_mode == "block" and self.task != "label":
                raise ValueError(f"--condition-mode block pairs within labels, and --task {self.task} has none")
        elif self.pairing.condition_mode is not None:
            raise ValueError("--condition-mode is for a task with a condition, not for --task free")

    @property
    def pairing(self) -> Coupling:
        """How noise is paired with latents."""
        return Coupling(kind=self.coupling, epsilon=self.epsilon, condition_mode=self.condition_mode)


class Pictures(NamedTuple):
    """Everything to train on, in memory: images (N, 3, S, S) in [-1, 1], labels (N,), maps (N, S, S), all indices."""

    images: Tensor
    labels: Tensor
    maps: Tensor


def brightness_map(images: Tensor) -> Tensor:
    """A stand-in for a semantic map where there is none: brightness of the blurred picture in CLASSES levels."""
    grey = F.avg_pool2d(images.mean(1, keepdim=True), 5, stride=1, padding=2)[:, 0]
    return ((grey + 1) / 2 * CLASSES).long().clamp(0, CLASSES - 1)


def shipped_pictures(recipe: Recipe) -> Pictures:
    """Random crops of the photographs in scikit-image, labelled by photograph."""
    import skimage.data

    folder = Path(str(skimage.data.__file__)).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png")
    photographs = [Image.open(folder / name).convert("RGB") for name in names]
    rng, crops, labels = np.random.default_rng(recipe.seed), [], []
    for _ in range(recipe.pictures):
        label = int(rng.integers(len(photographs)))
        picture = photographs[label]
        side = int(min(picture.size) * rng.uniform(0.3, 0.6))
        left, top = (int(rng.integers(span - side + 1)) for span in picture.size)
        crop = picture.resize((recipe.image_size, recipe.image_size), box=(left, top, left + side, top + side))
        crops.append(np.asarray(crop))
        labels.append(label)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pictures(images, torch.tensor(labels), brightness_map(images))


def folder_pictures(recipe: Recipe, folder: Path) -> Pictures:
    """Pictures of a folder, squeezed to a square; sub-folders are labels."""
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg") and ".map" not in p.name
    )
    if not files:
        raise ValueError(f"no .png or .jpg pictures below {folder}")
    groups = sorted({p.parent for p in files})
    size = (recipe.image_size, recipe.image_size)
    arrays = [np.asarray(Image.open(p).convert("RGB").resize(size)) for p in files[: recipe.pictures]]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    maps = brightness_map(images)
    for i, path in enumerate(files[: recipe.pictures]):
        drawn = path.with_suffix(".map.png")
        if drawn.is_file():
            values = np.asarray(Image.open(drawn).convert("L").resize(size, Image.Resampling.NEAREST))
            maps[i] = torch.from_numpy(values.astype(np.int64)).clamp(0, CLASSES - 1)
    return Pictures(images, torch.tensor([groups.index(p.parent) for p in files[: recipe.pictures]]), maps)


def maniskill_pictures(recipe: Recipe) -> Pictures:
    """Frames of ManiSkill environments after a few random actions, with the simulator's own segmentation."""
    import gymnasium as gym
    import mani_skill.envs  # noqa: F401 - registers the environments

    images, labels, maps = [], [], []
    for label, name in enumerate(recipe.maniskill):
        camera = {"width": recipe.image_size, "height": recipe.image_size}
        env = gym.make(name, obs_mode="rgb+segmentation", sensor_configs=camera, render_backend="cpu")
        env.action_space.seed(recipe.seed)
        observation, _ = env.reset(seed=recipe.seed)
        for frame in range(recipe.pictures // len(recipe.maniskill)):
            if frame % 10 == 9:
                observation, _ = env.reset(seed=recipe.seed + frame)
            observation, *_ = env.step(env.action_space.sample())
            view = next(iter(observation["sensor_data"].values()))
            images.append(view["rgb"][0].permute(2, 0, 1).float().cpu() / 127.5 - 1)
            maps.append(view["segmentation"][0, ..., 0].long().cpu() % CLASSES)
            labels.append(label)
        env.close()
    return Pictures(torch.stack(images), torch.tensor(labels), torch.stack(maps))


class Autoencoder:
    """Pictures to token moments and back, whichever autoencoder is behind it.

    Attributes:
        grid: Rows and columns of the latent tokens.
        channels: Numbers per token.
    """

    def __init__(self, source: str | nn.Module, image_size: int) -> None:
        self.headrace = isinstance(source, str) and source.startswith("headrace:")
        if self.headrace:
            from headrace.tokenizers.auto import load_tokenizer

            self.model = load_tokenizer(str(source).removeprefix("headrace:"))
            if self.model.kind != "continuous":
                raise ValueError(f"{source} has discrete tokens: latent flow matching needs a continuous tokenizer")
            convention = self.model.preprocessing  # of pictures in [0, 1]
            self.shift, self.spread = (torch.tensor(c).view(1, 3, 1, 1) for c in (convention.mean, convention.std))
        elif isinstance(source, str):
            from diffusers import AutoencoderKL

            self.model = AutoencoderKL.from_pretrained(source).eval()
        else:
            self.model = source.eval()
        mean, _ = self.moments(torch.zeros(1, 3, image_size, image_size))
        self.channels = mean.shape[-1]
        side = round(mean.shape[1] ** 0.5)
        self.grid = (side, side) if side * side == mean.shape[1] else (1, mean.shape[1])

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, each (B, N, C), of pictures (B, 3, S, S) in [-1, 1]."""
        if self.headrace:
            mean = self.model.encode(((images + 1) / 2 - self.shift) / self.spread)
            return mean, torch.full_like(mean, -30.0)
        latent = self.model.encode(images).latent_dist
        return latent.mean.flatten(2).transpose(1, 2), latent.logvar.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Latents (B, N, C) to pictures (B, 3, S, S), about in [-1, 1]."""
        if self.headrace:
            return (self.model.decode(tokens) * self.spread + self.shift) * 2 - 1
        return self.model.decode(tokens.transpose(1, 2).unflatten(2, self.grid)).sample


def small_autoencoder(recipe: Recipe, images: Tensor) -> nn.Module:
    """diffusers' KL autoencoder with a factor of 4, trained on the pictures with L1 and a light KL term."""
    from diffusers import AutoencoderKL

    folder = recipe.out / "autoencoder"
    if (folder / "config.json").is_file():
        return AutoencoderKL.from_pretrained(folder)
    torch.manual_seed(recipe.seed)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = AutoencoderKL(block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
                          mid_block_add_attention=False, **kinds)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    draw = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.autoencoder_steps):
        batch = images[torch.randint(len(images), (recipe.batch_size,), generator=draw)]
        latent = model.encode(batch).latent_dist
        loss = (model.decode(latent.sample(draw)).sample - batch).abs().mean() + 1e-5 * latent.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"autoencoder {step}: {loss.item():.4f}", flush=True)
    model.save_pretrained(folder)
    return model


def semantic_features(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """EfficientNet-Lite0's features of pictures (N, 3, S, S) on the latent grid, (N, tokens, 112).

    Raises:
        ValueError: The latents do not lie on a square.
        ModuleNotFoundError: The weights' package is missing; names the extra.
    """
    from headrace.nn.perceptual import EfficientNetLite0
    from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher

    if grid[0] != grid[1]:
        raise ValueError(f"--align needs latents on a square grid, this autoencoder has {grid[0]} x {grid[1]}")
    side = 32 * math.ceil(grid[0] / 2)  # its map is 1/16 of that
    teacher = EfficientNetTeacher(EfficientNetLite0.from_package(side=side), grid=grid[0])
    return torch.cat([teacher(part) for part in images.split(64)])


class Latents:
    """Cached moments with the condition of each picture; a dataset for `batches`.

    Attributes:
        mean, log_variance: Scaled moments, (N, tokens, C).
        condition: (N, tokens or 1, D), zero where the condition is left out.
        width: D.
        aligned: What the shared features are aligned to, (N, tokens, A), or None.
    """

    def __init__(self, recipe: Recipe, pictures: Pictures, autoencoder: Autoencoder) -> None:
        moments = [autoencoder.moments(part) for part in pictures.images.split(64)]
        mean, log_variance = (torch.cat(parts) for parts in zip(*moments, strict=True))
        draw = torch.Generator().manual_seed(recipe.seed)
        self.scaler = LatentScaler.fit(draw_latent(mean, log_variance, generator=draw), axis=-1)
        self.mean = self.scaler.scale(mean)
        self.log_variance = log_variance - 2 * torch.tensor(self.scaler.std).log()
        self.condition = self._condition(recipe, pictures, autoencoder)
        self.width = self.condition.shape[-1]
        self.aligned = semantic_features(pictures.images, autoencoder.grid) if recipe.align else None

    def _condition(self, recipe: Recipe, pictures: Pictures, autoencoder: Autoencoder) -> Tensor:
        count, grid = len(pictures.images), autoencoder.grid
        if recipe.task == "free":
            return torch.zeros(count, 1, 1)
        if recipe.task == "label":
            return F.one_hot(pictures.labels)[:, None].float()
        if recipe.task == "semantic":
            shares = F.adaptive_avg_pool2d(F.one_hot(pictures.maps, CLASSES).permute(0, 3, 1, 2).float(), grid)
            return shares.flatten(2).transpose(1, 2)
        size, draw = pictures.images.shape[-1], torch.Generator().manual_seed(recipe.seed)
        hole = torch.zeros(count, 1, size, size)
        for i, (top, left) in enumerate(torch.randint(0, size // 2 + 1, (count, 2), generator=draw).tolist()):
            hole[i, :, top : top + size // 2, left : left + size // 2] = 1
        masked = [autoencoder.moments(part)[0] for part in (pictures.images * (1 - hole)).split(64)]
        mask = F.adaptive_avg_pool2d(hole, grid).flatten(2).transpose(1, 2)
        return torch.cat([self.scaler.scale(torch.cat(masked)), mask], -1)

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Moments and conditions of these pictures, and what their features are aligned to."""
        kept = ("mean", "log_variance", "condition", *(() if self.aligned is None else ("aligned",)))
        return {k: getattr(self, k)[indices] for k in kept}


def network(recipe: Recipe, autoencoder: Autoencoder, latents: Latents) -> BlockwiseVelocity:
    """A plain diffusion transformer over the latent tokens, or a blockwise one of the same depth a step."""
    width, heads, depth = SIZES[recipe.size]
    torch.manual_seed(recipe.seed)
    velocity = max(1, depth // 5) if recipe.blockwise else depth
    return BlockwiseVelocity(
        BlockwiseConfig(
            channels=autoencoder.channels,
            width=width,
            heads=heads,
            grid=autoencoder.grid,
            trunk_depth=depth - velocity,
            velocity_depth=velocity,
            residual_depth=max(1, depth // 6) if recipe.residual_steps else 0,
            borders=tuple(k / SEGMENTS for k in range(SEGMENTS + 1)) if recipe.blockwise else (0.0, 1.0),
            condition_dim=latents.width,
            modulation_rank=width // 4,
            align_dim=0 if latents.aligned is None else latents.aligned.shape[-1],
        )
    )


class LatentLoss:
    """The flow-matching loss on drawn latents, with coupling, label dropout and alignment, as `fit` calls it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.coupling = recipe, recipe.pairing

    def condition(self, batch: dict[str, Tensor]) -> Tensor | None:
        """What the coupling has to know of the task's condition: labels (B,), vectors (B, D), or nothing."""
        if self.recipe.task == "free":
            return None
        whole = batch["condition"].flatten(1)
        by_label = self.recipe.task == "label" and self.coupling.condition_mode == "block"
        return whole.argmax(1) if by_label else whole

    def ends(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Coupled, Tensor]:
        """Pairs of noise and data (B, N, C), and the condition with some labels left out."""
        data = draw_latent(batch["mean"], batch["log_variance"], sample=self.recipe.sample_latents, generator=generator)
        condition = batch["condition"]
        if self.recipe.task == "label":
            kept = torch.rand(len(data), 1, 1, generator=generator, device=data.device) >= self.recipe.label_dropout
            condition = condition * kept
        noise = torch.empty_like(data).normal_(generator=generator)
        return self.coupling.pair(noise, data, condition=self.condition(batch), generator=generator), condition

    def __call__(
        self, model: BlockwiseVelocity, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        (noise, data, weight), condition = self.ends(batch, generator)
        if model.config.segments > 1:
            t = segment_time(len(data), model.config.borders, generator=generator, device=data.device).t
        else:
            t = uniform_time(len(data), generator=generator, device=data.device)
        path = straight_path(noise, data, t)
        moment = model.embed(t, condition)
        features = model.features(path.x_t, moment)
        flow = flow_matching_loss(model.velocity_from(features, path.x_t, t, moment), path.target, pair_weight=weight)
        terms = {"total": flow}
        if weight is not None:
            terms["effective_share"] = torch.tensor(self.coupling.effective.mean)
        if "aligned" in batch:
            align = model.alignment_loss(features, batch["aligned"])
            terms |= {"total": flow + ALIGN_WEIGHT * align, "flow": flow, "align": align}
        return terms


class ResidualLoss(LatentLoss):
    """The second stage of a blockwise network: how far the approximated features are from the true ones."""

    def __call__(
        self, model: BlockwiseVelocity, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        (noise, data, _), condition = self.ends(batch, generator)
        parts, borders = model.bind(condition), model.config.borders
        return {"total": feature_residual_loss(parts, noise, data, borders=borders, generator=generator)}


def fit_residual(recipe: Recipe, model: BlockwiseVelocity, latents: Latents) -> None:
    """Train the feature residual of a trained network; everything else stays as it is."""
    model.requires_grad_(False)
    for parameter in model.residual_parameters():
        parameter.requires_grad_(True)
    fit(
        model,
        ResidualLoss(recipe),
        torch.optim.AdamW(model.residual_parameters(), recipe.lr, weight_decay=0.0),
        batches(latents, recipe.batch_size, seed=recipe.seed + 1),
        steps=recipe.residual_steps,
        out=recipe.out / "residual",
        resume=recipe.resume,
        seed=recipe.seed + 1,
        schedule=Schedule(warmup=min(100, recipe.residual_steps)),
    )


@torch.no_grad()
def sample(recipe: Recipe, model: BlockwiseVelocity, condition: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents for these conditions, guided where they are labels."""
    config, scale = model.config, recipe.guidance if recipe.task == "label" else 1.0
    noise = torch.randn(len(condition), config.tokens, config.channels, generator=generator)
    bound, empty = model.bind(condition), model.bind(torch.zeros_like(condition))
    if config.segments > 1:
        parts: BlockwiseParts = bound if scale == 1.0 else GuidedParts(bound, empty, scale)
        return integrate_blockwise(
            parts,
            noise,
            borders=config.borders,
            steps_per_segment=math.ceil(recipe.sampling_steps / config.segments),
            mode="residual" if config.residual_depth else "full",
        )
    if scale == 1.0:
        return integrate(bound, noise, steps=recipe.sampling_steps)
    return integrate_guided(bound, empty, noise, scale=scale, steps=recipe.sampling_steps)


def save_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    """Pictures in [-1, 1] as one PNG."""
    rows = [torch.cat(list(row), -1) for row in images[: columns * 4].split(columns) if len(row) == columns]
    if not rows:
        rows = [torch.cat(list(images), -1)]
    sheet = ((torch.cat(rows, -2).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(path)


def main(recipe: Recipe) -> dict[str, float]:
    """Autoencoder, cached latents, flow, samples; returns and writes the figures."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    if recipe.maniskill:
        pictures = maniskill_pictures(recipe)
    else:
        pictures = folder_pictures(recipe, recipe.data) if recipe.data else shipped_pictures(recipe)
    autoencoder = Autoencoder(recipe.autoencoder or small_autoencoder(recipe, pictures.images), recipe.image_size)
    latents = Latents(recipe, pictures, autoencoder)
    model = network(recipe, autoencoder, latents)
    if recipe.residual_steps:
        for parameter in model.residual_parameters():
            parameter.requires_grad_(False)  # until stage 2
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=0.0)
    fitted = fit(
        model,
        LatentLoss(recipe),
        optimizer,
        batches(latents, recipe.batch_size, seed=recipe.seed),
        steps=recipe.steps,
        out=recipe.out / "flow",
        resume=recipe.resume,
        seed=recipe.seed,
        schedule=Schedule(warmup=min(100, recipe.steps)),
        ema_decay=0.999 if recipe.steps > 1000 else None,
    )
    with fitted.ema.applied_to(model) if fitted.ema is not None else nullcontext():
        if recipe.residual_steps:
            fit_residual(recipe, model, latents)
        model.eval().save_pretrained(recipe.out / "model")
        return report(recipe, model, autoencoder, latents, pictures, fitted.losses)


def report(
    recipe: Recipe,
    model: BlockwiseVelocity,
    autoencoder: Autoencoder,
    latents: Latents,
    pictures: Pictures,
    losses: list[float],
) -> dict[str, float]:
    """Samples as a PNG, figures as JSON."""
    (recipe.out / "model" / "latent_scaler.json").write_text(latents.scaler.to_json() + "\n")
    draw = torch.Generator().manual_seed(recipe.seed + 1)
    count = min(256, len(latents) // 2)
    made = sample(recipe, model, latents.condition[:count], draw)
    save_sheet(autoencoder.decode(latents.scaler.unscale(made[:32])), recipe.out / "samples.png")
    save_sheet(pictures.images[:32], recipe.out / "pictures.png")
    rebuilt = autoencoder.decode(latents.scaler.unscale(latents.mean[:32]))
    figures = {
        "reconstruction_l1": (rebuilt - pictures.images[:32]).abs().mean().item(),
        **({"loss_first": losses[0], "loss_last": float(np.mean(losses[-50:]))} if losses else {}),  # none when resumed
        "w2_squared_samples": wasserstein2_squared(made, latents.mean[-count:]),
        "w2_squared_data_halves": wasserstein2_squared(latents.mean[:count], latents.mean[-count:]),
        # How closely the condition is followed: mean squares to its own picture's latents and to another's.
        "distance_to_own": (made - latents.mean[:count]).square().mean().item(),
        "distance_to_other": (made - latents.mean[:count].roll(1, 0)).square().mean().item(),
        "w2_squared_noise": wasserstein2_squared(torch.randn(made.shape, generator=draw), latents.mean[-count:]),
    }
    (recipe.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main(tyro.cli(Recipe))
