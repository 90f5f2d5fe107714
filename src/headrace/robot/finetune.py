"""Training a policy on demonstrations; `headrace.robot.policy_start` says where it begins."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.contracts import ActionSpec
from headrace.datasets.lerobot_demos import DemoBatch, LeRobotDemos
from headrace.datasets.mixture import Mixture
from headrace.datasets.normalize import NormalizerConfig
from headrace.datasets.random_crop import random_crop
from headrace.nn.precision import Precision
from headrace.robot.frame_beside import FrameInput, PolicyWithFrame
from headrace.robot.lora import without_adapters
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_bins import VipraBins
from headrace.robot.vipra_config import ActorConfig
from headrace.robot.vipra_trunk import encode_text, words_of
from headrace.training.batches import ShuffledBatches, batches
from headrace.training.loop import Fitted, fit
from headrace.training.schedule import Schedule

EncodeText = Callable[[Sequence[str]], Tensor]
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a policy is trained.

    Attributes:
        steps: Updates.
        batch_size: Samples per update, over all processes.
        lr: Peak learning rate, after `warmup` updates; falls along a cosine to a tenth.
        weight_decay: AdamW's, on matrices only.
        move: Pictures are moved by up to so many pixels [px].
        state_noise: Standard deviation of noise on the normalised state; keeps a policy from trusting it blindly.
        ema: Decay of the averaged weights that are saved.
        precision: `auto` is bf16 where the device multiplies it natively, else fp32.
    """

    steps: int = 10_000
    batch_size: int = 64
    lr: float = 3e-4
    warmup: int = 200
    weight_decay: float = 1e-4
    move: int = 4
    state_noise: float = 0.02
    ema: float = 0.999
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 20


class TrainingInput(NamedTuple):
    """One training batch, all on one device: what the policy sees, raw actions (B, H, A), which count (B, H)."""

    inputs: PolicyInput
    actions: Tensor
    valid: Tensor


def read_demonstrations(
    sources: Sequence[str | Path],
    config: ActorConfig | None = None,
    *,
    horizon: int = 14,
    history: Sequence[int] = (0,),
    image_size: tuple[int, int] | None = None,
    demonstrations: int | None = None,
) -> Mixture | LeRobotDemos:
    """Datasets, one or several, read for a policy.

    Args:
        sources: Folders or hub ids.
        config: The checkpoint that is trained further; cameras, sizes and windows are its own.
        horizon, history: Windows where there is no checkpoint yet.
        image_size: (height, width) to which pictures are stretched there [px]; None keeps the stored size.
        demonstrations: So many episodes of each dataset, from its first; None for all.

    Raises:
        ValueError: A dataset lacks the checkpoint's cameras, has another action or state size, or fewer episodes than
            asked for; names both.
    """
    if not sources:
        raise ValueError("name at least one dataset")
    options: dict[str, Any] = {"horizon": horizon, "history": tuple(history), "image_size": image_size}
    if config is not None:
        options = {
            "horizon": horizon_of(config),
            "history": config.history,
            "cameras": config.cameras,
            "action_dim": config.action_spec.dim,
            "state": ("observation.state",) if config.state_names else (),
            "state_dim": len(config.state_names),
            "image_size": (config.camera_size, config.camera_size),
        }
    if demonstrations is not None:
        options["episodes"] = range(demonstrations)
    datasets = [LeRobotDemos(source, **options) for source in sources]
    return datasets[0] if len(datasets) == 1 else Mixture(datasets)


def usual_lr(config: ActorConfig) -> float:
    """A peak learning rate for a batch of 64: 5e-4, and 4e-5 for wide backbones such as the published one.

    Source: 4e-5 is ViPRA's in pretraining; its 4e-4 in fine-tuning goes with batches of 512.
    """
    return 4e-5 if config.backbone.width >= 1024 else 5e-4


def horizon_of(config: ActorConfig) -> int:
    """Actions per chunk."""
    return config.decoder.horizon if isinstance(config, VipraConfig) else config.horizon  # type: ignore[attr-defined]


def fit_to_data(config: VipraConfig, data: Mixture | LeRobotDemos, spec: ActionSpec) -> VipraConfig:
    """The config with this data's action convention and statistics; the gripper stays as it is.

    Raises:
        ValueError: A pixel size, camera or number does not fit together.
    """
    first = data.datasets[0] if isinstance(data, Mixture) else data
    mask = [name != "gripper" for name in spec.names]
    has_state = first.state_dim > 0
    words = () if config.text_vocabulary else words_of([*config.words, *instructions_of(data)])
    return replace(
        config,
        spec=spec.to_dict(),
        cameras=first.cameras,
        state_names=first.state_names if has_state else (),
        words=words,
        action_normalizer=NormalizerConfig.from_statistics(data.action_statistics, mask=mask),
        state_normalizer=NormalizerConfig.from_statistics(data.state_statistics) if has_state else None,
    )


def spec_of(folder: Path, data: LeRobotDemos) -> ActionSpec:
    """A dataset's action convention: recorded by `headrace collect`, else joint targets under the dataset's names."""
    recorded = recorded_spec(folder)
    if recorded is not None:
        return recorded
    return ActionSpec(names=data.action_names, frame="joint", rotation="none", gripper="none", rate=data.fps)


def recorded_spec(folder: Path) -> ActionSpec | None:
    """The action convention that `headrace collect` wrote into a dataset; None for other datasets."""
    origin = folder / "meta" / "headrace.json"
    return ActionSpec.from_dict(json.loads(origin.read_text())["spec"]) if origin.is_file() else None


def instructions_of(data: Mixture | LeRobotDemos) -> list[str]:
    """Every different instruction of the datasets."""
    datasets = data.datasets if isinstance(data, Mixture) else [data]
    return sorted({task for dataset in datasets for task in dataset.tasks})


class _Augment:
    """Turns demonstrations into training batches, in the loading thread."""

    def __init__(
        self, config: ActorConfig, settings: FinetuneSettings, encode: EncodeText | None = None, *, ahead: bool = False
    ) -> None:
        self.config, self.settings, self.ahead = config, settings, ahead
        self.encode: EncodeText = encode or partial(encode_text, words=config.words)
        scale = config.state_normalizer.scale if config.state_normalizer else ()
        self.scale = torch.tensor(scale)

    def __call__(self, batch: DemoBatch, generator: torch.Generator) -> TrainingInput | FrameInput:
        config, settings = self.config, self.settings
        images = random_crop(
            batch.images, corner=config.crop, size=config.image.size, pixels=settings.move, generator=generator
        )
        state = batch.state
        if settings.state_noise and len(self.scale):
            state = state + settings.state_noise * self.scale * torch.randn(state.shape, generator=generator)
        text = self.encode(batch.instructions)
        actions = still(batch.actions, batch.action_is_pad, config.action_spec)
        valid = torch.ones_like(batch.action_is_pad)
        if self.ahead:  # the future is cut where the frames are that it is predicted from
            seen = PolicyInput(images[:, :, :-1], state, text)
            return FrameInput(seen, actions, valid, images[:, 0, -1])
        return TrainingInput(PolicyInput(images, state, text), actions, valid)


def still(actions: Tensor, is_pad: Tensor, spec: ActionSpec) -> Tensor:
    """Actions past the end of an episode: no motion where actions are deltas, the last gripper command kept.

    Source: sroutray/vipra, finetuning data (delta end-effector: zeros with the last gripper value).
    """
    if not spec.frame.endswith("delta"):
        return actions
    moving = torch.tensor([name != "gripper" for name in spec.names])
    return torch.where(is_pad[..., None] & moving, torch.zeros((), dtype=actions.dtype), actions)


def training_batches(
    data: Mixture | LeRobotDemos,
    config: ActorConfig,
    settings: FinetuneSettings,
    encode: EncodeText | None = None,
    *,
    ahead: bool = False,
) -> ShuffledBatches:
    """Augmented training batches; batch k depends on (seed, k) only.

    `encode` takes the place of the config's words. With `ahead` the data look ahead and the batches are `FrameInput`.
    """
    transform = _Augment(config, settings, encode, ahead=ahead)
    return batches(data, settings.batch_size, seed=settings.seed, transform=transform)


def policy_loss(model: VipraPolicy | VipraBins, batch: TrainingInput, generator: torch.Generator) -> dict[str, Tensor]:
    """Loss as `fit` calls it."""
    return model.loss(batch.inputs, batch.actions, batch.valid, generator)


def policy_and_frame_loss(model: PolicyWithFrame, batch: FrameInput, generator: torch.Generator) -> dict[str, Tensor]:
    """`policy_loss` with the future frame beside it."""
    return model.loss(batch, generator)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train_policy(
    model: VipraPolicy | VipraBins | PolicyWithFrame,
    data: Mixture | LeRobotDemos,
    settings: FinetuneSettings,
    out: Path,
    *,
    resume: bool = False,
    trackers: tuple[Any, ...] = (),
    facts: dict[str, Any] | None = None,
) -> Fitted:
    """Train a policy and save it, averaged weights with adapters merged in, to `out/model`.

    Of a `PolicyWithFrame` (from `predict_frame`, which also makes its data) the policy alone is saved.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        ValueError: Resumed with other settings.
    """
    framed = isinstance(model, PolicyWithFrame)
    policy = model.policy if isinstance(model, PolicyWithFrame) else model
    given = dict(facts or {})
    if isinstance(model, PolicyWithFrame):
        given["frame"] = model.facts()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95), fused=False
    )
    schedule = Schedule(
        kind="cosine", warmup=min(settings.warmup, settings.steps // 4), steps=settings.steps, floor=0.1
    )
    fitted = fit(
        model,
        policy_and_frame_loss if framed else policy_loss,
        optimizer,
        training_batches(data, policy.config, settings, policy.encode_text, ahead=framed),
        steps=settings.steps,
        out=out,
        resume=resume,
        seed=settings.seed,
        schedule=schedule,
        ema_decay=settings.ema,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        trackers=trackers,
        settings={"finetune": vars(settings), **given},
    )
    with fitted.ema.applied_to(model) if fitted.ema is not None else nullcontext():
        without_adapters(policy).save_pretrained(out / MODEL_FOLDER)
    return fitted


def held_out_loss(
    model: VipraPolicy | VipraBins, data: Mixture | LeRobotDemos, *, samples: int = 256, seed: int = 0
) -> float:
    """The model's loss on `samples` random samples, with fixed noise; lower is better, not a success rate."""
    generator = torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(data))[:samples]
    settings = FinetuneSettings(move=0, state_noise=0.0)
    batch = _Augment(model.config, settings, model.encode_text)(data.batch(order), generator)
    with torch.inference_mode():
        return float(model.eval().loss(batch.inputs, batch.actions, batch.valid, generator)["total"])
