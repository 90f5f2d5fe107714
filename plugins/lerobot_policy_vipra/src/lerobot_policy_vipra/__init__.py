"""Registers `--policy.type=vipra`; the network is imported when a policy is made."""

from lerobot_policy_vipra.configuration_vipra import LeRobotVipraConfig

__all__ = ["LeRobotVipraConfig"]
