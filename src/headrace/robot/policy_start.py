"""Where a policy begins: from scratch, from a policy, or from a network that was pretrained on videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.mixture import Mixture
from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.pretrained import read_config, resolve_folder
from headrace.robot.action_bins import ActionBinsConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.carry_over import CarriedOver, carry_over, require_same_conditions
from headrace.robot.finetune import fit_to_data, read_demonstrations, spec_of
from headrace.robot.lerobot_checkpoint import load_network
from headrace.robot.sizes import policy_config
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_bins import VipraBins, VipraBinsConfig
from headrace.robot.vipra_config import ActorConfig, TrunkConfig, shared_fields
from headrace.robot.vipra_pretraining import VipraPretraining


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
        override: Differences from pretraining that are wanted: `history`, `rate`.
        lam_hash: The latent action model that pretraining must have had; None for any.
        carry: Whether the pretrained weights are taken over; without, the same network starts from scratch.
        draws: Draws of (time, noise) per sample, for a pretrained network with the flow head.
        seed: Of weights that are drawn.
    """

    init: str = "scratch"
    size: str = "small"
    head: Literal["flow", "bins"] = "flow"
    bins: int = 2047
    demonstrations: int | None = None
    history: tuple[int, ...] | None = None
    override: tuple[str, ...] = ()
    lam_hash: str | None = None
    carry: bool = True
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("flow", "bins"):
            raise ValueError(f"head is 'flow' or 'bins', got {self.head!r}")


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
        data = read_demonstrations(sources, policy.config, demonstrations=start.demonstrations)
        return Prepared(policy.train(), data, None)
    first = LeRobotDemos(sources[0])
    size = _square(first)
    config = policy_config(start.size, spec_of(first.folder, first), cameras=first.cameras, camera_size=size)
    return _with_data(config, sources, start)


def _from_pretraining(sources: Sequence[str | Path], source: VipraPretraining, start: Start) -> Prepared:
    seen, record = source.config, source.config.record
    first = LeRobotDemos(sources[0])
    history = start.history or seen.history
    require_same_conditions(record, history=history, rate=first.fps, lam_hash=start.lam_hash, override=start.override)
    size = _square(first)
    if size != seen.camera_size:
        raise ValueError(f"the network was pretrained on pictures of {seen.camera_size} px, the cameras give {size} px")
    spec = spec_of(first.folder, first)
    trunk = shared_fields(seen, TrunkConfig) | {"cameras": first.cameras, "history": history}
    config = VipraConfig(
        **trunk,
        spec=spec.to_dict(),
        action_normalizer=NormalizerConfig.identity(spec.dim),
        decoder=ActionDecoderConfig(width=seen.backbone.width, action_dim=spec.dim, horizon=record.horizon),
        action_attention=seen.prefix_attention,
        draws=start.draws,
        pretraining=record if start.carry else None,
    )
    prepared = _with_data(config, sources, start)
    if not start.carry:
        return prepared
    return prepared._replace(report=carry_over(source, prepared.model))


def _with_data(config: VipraConfig, sources: Sequence[str | Path], start: Start) -> Prepared:
    data = read_demonstrations(
        sources, horizon=config.decoder.horizon, history=config.history, demonstrations=start.demonstrations
    )
    config = fit_to_data(config, data, config.action_spec)
    torch.manual_seed(start.seed)
    model = VipraPolicy(config) if start.head == "flow" else VipraBins(with_bins(config, data, bins=start.bins))
    return Prepared(model.train(), data, None)


def _square(data: LeRobotDemos) -> int:
    height, width = data.image_size or (0, 0)
    if height != width:
        raise ValueError(f"the cameras give {height} x {width} px; policies take square pictures, so crop them first")
    return height


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
