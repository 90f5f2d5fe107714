"""The network's config from what LeRobot knows of a dataset or an environment."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import NormalizerConfig, Statistics
from headrace.robot.finetune import recorded_spec
from headrace.robot.vipra import VipraConfig
from headrace.robot.vipra_trunk import words_of

if TYPE_CHECKING:
    from lerobot_policy_vipra.configuration_vipra import LeRobotVipraConfig

RATE_WITHOUT_DATASET = 30.0  # [Hz]; an environment alone does not say


def camera_name(key: str) -> str:
    """`observation.images.front` is `front`; `observation.image` is `image`."""
    return key.rsplit(".", 1)[-1]


def from_features(config: "LeRobotVipraConfig", stats: dict[str, Any] | None, meta: Any | None) -> VipraConfig:
    """A config for these features, with the dataset's statistics, words and action convention.

    Args:
        config: With input and output features.
        stats: LeRobot's statistics by feature; None leaves numbers as they are (an environment without a dataset).
        meta: LeRobot's metadata of the dataset, or None.

    Raises:
        ValueError: The dataset's statistics of state or action are missing or have another width.
    """
    assert config.action_feature is not None
    spec = _spec(config, meta)
    cameras = tuple(camera_name(key) for key in config.image_features)
    names = _state_names(config, meta)
    tasks = list(meta.tasks.index) if meta is not None else []
    mask = [name != "gripper" for name in spec.names]
    state = _normalizer(stats, "observation.state", len(names), None) if names else None
    template = config.template(spec, cameras)
    return replace(
        template,
        state_names=names,
        words=() if template.text_vocabulary else words_of([*template.words, *tasks]),
        action_normalizer=_normalizer(stats, "action", spec.dim, mask),
        state_normalizer=state,
    )


def _spec(config: "LeRobotVipraConfig", meta: Any | None) -> ActionSpec:
    dim = config.action_feature.shape[0]
    if meta is None:
        names = tuple(f"action_{index}" for index in range(dim))
        return ActionSpec(names=names, frame="joint", rotation="none", gripper="none", rate=RATE_WITHOUT_DATASET)
    recorded = recorded_spec(meta.root)
    if recorded is not None:
        return recorded
    names = _flat(meta.features["action"].get("names"), dim, "action")
    return ActionSpec(names=names, frame="joint", rotation="none", gripper="none", rate=float(meta.fps))


def _state_names(config: "LeRobotVipraConfig", meta: Any | None) -> tuple[str, ...]:
    feature = config.robot_state_feature
    if feature is None:
        return ()
    told = meta.features["observation.state"].get("names") if meta is not None else None
    return _flat(told, feature.shape[0], "state")


def _flat(names: Any, dim: int, what: str) -> tuple[str, ...]:
    """LeRobot's names, a list or a dictionary of lists, or numbered ones where there are none that fit."""
    if isinstance(names, dict):
        names = [name for group in names.values() for name in group]
    if not names or len(names) != dim:
        names = [f"{what}_{index}" for index in range(dim)]
    return tuple(map(str, names))


def _normalizer(stats: dict[str, Any] | None, key: str, dim: int, mask: list[bool] | None) -> NormalizerConfig:
    if stats is None:
        return NormalizerConfig.identity(dim)
    of_key = stats.get(key) or {}
    if not {"mean", "std"} <= set(of_key) or np.size(of_key["mean"]) != dim:
        raise ValueError(f"the dataset has no statistics of {key} with {dim} numbers; run lerobot-edit-dataset on it")
    numbers = {name: tuple(map(float, np.ravel(of_key[name]))) for name in ("mean", "std")}
    rest = dict.fromkeys(("min", "max", "q01", "q99"), numbers["mean"])
    return NormalizerConfig.from_statistics(Statistics(count=1, **numbers, **rest), mask=mask)
