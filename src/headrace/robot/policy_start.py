"""Where a policy begins: from scratch, from a policy, or from a network that was pretrained on videos."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from headrace.contracts import ActionSpec, SpecMismatch, require_same_spec
from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.lerobot_files import find_cameras, read_info, resolve_dataset
from headrace.datasets.mixture import Mixture
from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.pretrained import read_config, resolve_folder
from headrace.robot.action_bins import ActionBinsConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.carry_over import CarriedOver, carry_over, require_same_conditions
from headrace.robot.finetune import (
    fit_to_data,
    horizon_of,
    instructions_of,
    read_demonstrations,
    recorded_spec,
    spec_of,
)
from headrace.robot.lerobot_checkpoint import load_network
from headrace.robot.sizes import image_size, policy_config
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_bins import VipraBins, VipraBinsConfig
from headrace.robot.vipra_config import ActorConfig, TrunkConfig, shared_fields
from headrace.robot.vipra_pretraining import VipraPretraining, VipraPretrainingConfig
from headrace.robot.vipra_trunk import words_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a policy begins.

    Attributes:
        init: `scratch`, a policy's checkpoint, or a pretrained network (`headrace pretrain`).
        size: Network size from scratch.
        head: `flow` (ViPRA-FM) or `bins` (ViPRA-AR); a policy's checkpoint has its own.
        bins: Per dimension, for `bins`.
        demonstrations: Episodes of each dataset; None for all.
        history: Frames seen, where it is to differ from pretraining's.
        horizon: Actions of a chunk; None for the size's, or for as many as pretraining's horizon has steps. A policy's
            checkpoint has its own.
        camera_size: Side to which pictures are stretched from scratch [px]; None shrinks the whole picture to what the
            network sees and a margin for random shifts, or keeps square ones where `crop` is given.
        crop: (left, top) of the square that the network sees of that [px]; the middle by default.
        override: Differences from pretraining that are wanted: `history`, `rate`.
        lam_hash: The latent action model that pretraining must have had; None for any.
        carry: Whether the pretrained weights are taken over; without, the same network starts from scratch.
        draws: Draws of (time, noise) per sample, for a pretrained network with the flow head.
        segments: Time segments of a flow head that is made anew (BFM); a policy's checkpoint has its own.
        seed: Of weights that are drawn.
    """

    init: str = "scratch"
    size: str = "small"
    head: Literal["flow", "bins"] = "flow"
    bins: int = 2047
    demonstrations: int | None = None
    history: tuple[int, ...] | None = None
    horizon: int | None = None
    camera_size: int | None = None
    crop: tuple[int, int] | None = None
    override: tuple[str, ...] = ()
    lam_hash: str | None = None
    carry: bool = True
    draws: int = 4
    segments: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("flow", "bins"):
            raise ValueError(f"head is 'flow' or 'bins', got {self.head!r}")
        if self.segments != 1 and self.head == "bins":
            raise ValueError("time segments are for the flow head; leave segments at 1 with head 'bins'")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"a chunk has at least 1 action, got horizon {self.horizon}")


class Prepared(NamedTuple):
    """A network, its demonstrations, and which of its weights came from pretraining (None without)."""

    model: VipraPolicy | VipraBins
    data: Mixture | LeRobotDemos
    report: CarriedOver | None


def prepare(sources: Sequence[str | Path], start: Start) -> Prepared:
    """A network and the demonstrations to train it on.

    From a policy's checkpoint the statistics, words and action convention stay the checkpoint's own, so that what it
    learned keeps its meaning; a pretrained network gets those of the data.

    Raises:
        ValueError: The datasets do not fit the checkpoint, each other, or the size; history or frame rate differ from
            pretraining's and that is not overridden; another latent action model.
        FileNotFoundError: No such dataset or checkpoint.
    """
    if start.init != "scratch":
        folder = resolve_folder(start.init)
        written_by = read_config(folder).get("model")
        if written_by == VipraPretraining.__name__:
            return _from_pretraining(sources, VipraPretraining.from_pretrained(folder), start)
        policy = VipraBins.from_pretrained(folder) if written_by == VipraBins.__name__ else load_network(folder)
        _refuse_options(start)
        own = policy.config.decoder.segments if isinstance(policy, VipraPolicy) else 1
        if start.segments not in (1, own):
            raise ValueError(f"{start.init} has a decoder of {own} time segments; {start.segments} need a new decoder")
        if start.horizon not in (None, horizon_of(policy.config)):
            given = horizon_of(policy.config)
            raise ValueError(f"{start.init} has chunks of {given} actions, asked for {start.horizon}; leave it out")
        data = read_demonstrations(sources, policy.config, demonstrations=start.demonstrations)
        _require_meaning(policy.config, data)
        return Prepared(policy.train(), data, None)
    size = _camera_size(sources[0], start)
    first = LeRobotDemos(sources[0], image_size=(size, size))
    spec = spec_of(first.folder, first)
    config = policy_config(start.size, spec, cameras=first.cameras, camera_size=size, crop=start.crop)
    if start.horizon is not None:
        config = replace(config, decoder=replace(config.decoder, horizon=start.horizon))
    return _with_data(config, sources, start)


def _from_pretraining(sources: Sequence[str | Path], source: VipraPretraining, start: Start) -> Prepared:
    seen, record = source.config, source.config.record
    _refuse_options(start)
    first = LeRobotDemos(sources[0], image_size=(seen.camera_size, seen.camera_size))
    history = start.history or record.history_at(first.fps)
    require_same_conditions(record, history=history, rate=first.fps, lam_hash=start.lam_hash, override=start.override)
    config = policy_of(
        seen,
        spec_of(first.folder, first),
        cameras=first.cameras,
        history=history,
        horizon=start.horizon,
        draws=start.draws,
    )
    prepared = _with_data(config if start.carry else replace(config, pretraining=None), sources, start)
    if not start.carry:
        return prepared
    report = carry_over(source, prepared.model, frames_per_step=record.frames_per_step(first.fps))
    return prepared._replace(report=report)


def policy_of(
    seen: VipraPretrainingConfig,
    spec: ActionSpec,
    *,
    cameras: tuple[str, ...],
    history: tuple[int, ...],
    horizon: int | None = None,
    draws: int = 4,
) -> VipraConfig:
    """The config of a flow policy on a pretrained network's trunk, without statistics.

    Args:
        seen: Of the pretrained network; what it was trained on is kept as `pretraining`.
        spec: The action convention.
        cameras: Names of the policy's cameras.
        history: Frames seen, in frames of the demonstrations.
        horizon: Actions of a chunk; None for as many as pretraining's horizon has steps.
        draws: Draws of (time, noise) per sample.
    """
    trunk = shared_fields(seen, TrunkConfig) | {"cameras": cameras, "history": history}
    return VipraConfig(
        **trunk,
        spec=spec.to_dict(),
        action_normalizer=NormalizerConfig.identity(spec.dim),
        decoder=ActionDecoderConfig(
            width=seen.backbone.width, action_dim=spec.dim, horizon=horizon or seen.record.horizon
        ),
        action_attention=seen.prefix_attention,
        draws=draws,
        pretraining=seen.record,
    )


def _with_data(config: VipraConfig, sources: Sequence[str | Path], start: Start) -> Prepared:
    data = read_demonstrations(
        sources,
        horizon=config.decoder.horizon,
        history=config.history,
        image_size=(config.camera_size, config.camera_size),
        demonstrations=start.demonstrations,
    )
    _require_meaning(config, data)
    config = fit_to_data(config, data, config.action_spec)
    config = replace(config, decoder=replace(config.decoder, segments=start.segments))
    torch.manual_seed(start.seed)
    model = VipraPolicy(config) if start.head == "flow" else VipraBins(with_bins(config, data, bins=start.bins))
    return Prepared(model.train(), data, None)


def _camera_size(source: str | Path, start: Start) -> int:
    if start.camera_size is not None:
        return start.camera_size
    if start.crop is None:
        seen = image_size(start.size)
        return seen + seen // 8
    folder = resolve_dataset(source)
    features = read_info(folder)["features"]
    height, width = features[find_cameras(features, None, folder)[0]]["shape"][:2]
    if height != width:
        raise ValueError(
            f"the cameras give {width} x {height} px; with a crop say to which --camera-size they are stretched first"
        )
    return int(height)


def _refuse_options(start: Start) -> None:
    given = [name for name in ("camera_size", "crop") if getattr(start, name) is not None]
    if given:
        raise ValueError(f"{start.init} says itself what it sees; leave out {', '.join(given)}")


def _require_meaning(config: ActorConfig, data: Mixture | LeRobotDemos) -> None:
    """Refuse demonstrations that were recorded with other actions; name words that the policy will not understand."""
    for dataset in data.datasets if isinstance(data, Mixture) else [data]:
        recorded = recorded_spec(dataset.folder)
        if recorded is None:
            continue
        try:
            require_same_spec(config.action_spec, recorded)
        except SpecMismatch as error:
            raise ValueError(f"{dataset.folder} was recorded with other actions: {error}") from error
    unknown = [word for word in words_of(instructions_of(data)) if word not in config.words]
    if config.words and unknown:
        log.warning("the policy knows no %s; it reads them all as one unknown word", ", ".join(map(repr, unknown)))


def with_bins(config: VipraConfig, data: Mixture | LeRobotDemos, *, bins: int = 2047) -> VipraBinsConfig:
    """The same network with a discrete head, its bins cut at the data's quantiles, the gripper binary."""
    datasets = data.datasets if isinstance(data, Mixture) else [data]
    actions = np.concatenate([dataset.actions[dataset.rows] for dataset in datasets])
    binary = [name == "gripper" for name in config.action_spec.names]
    return VipraBinsConfig(
        **shared_fields(config, ActorConfig),
        bins=ActionBinsConfig.from_actions(actions, bins=bins, binary=binary),
        horizon=config.decoder.horizon,
    )
