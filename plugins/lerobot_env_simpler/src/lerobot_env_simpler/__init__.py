"""Registers `--env.type=simpler`; the simulation is imported when an environment is made."""

from lerobot_env_simpler.configuration_simpler import SimplerEnvConfig

__all__ = ["SimplerEnvConfig"]
