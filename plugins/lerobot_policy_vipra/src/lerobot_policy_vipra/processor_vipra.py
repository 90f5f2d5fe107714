"""LeRobot's processor pipelines around the policy: its four named steps and nothing of ours."""

from typing import Any

import torch
from lerobot.configs import NormalizationMode
from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_vipra.configuration_vipra import LeRobotVipraConfig


def make_vipra_pre_post_processors(
    config: LeRobotVipraConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Any, Any]:
    """Pre- and post-processor.

    Raises:
        ValueError: The processors are to normalise a feature whose statistics are missing; LeRobot would silently pass
            it through.
    """
    for key, kind, feature in (
        (OBS_STATE, "STATE", config.robot_state_feature),
        (ACTION, "ACTION", config.action_feature),
    ):
        wanted = config.normalization_mapping.get(kind) not in (None, NormalizationMode.IDENTITY)
        if wanted and feature is not None and dataset_stats is not None and not dataset_stats.get(key):
            raise ValueError(f"the processors are to normalise {key}, but the dataset has no statistics of it")
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
