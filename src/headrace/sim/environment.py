"""What the runner needs of an environment, whoever simulates it."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from headrace.contracts import ActionSpec, Observation


class Step(NamedTuple):
    """What one control step brought.

    Attributes:
        observation: What the policy may see now.
        success: The environment's own success flag at this step.
        readings: Further flags and numbers worth logging, such as `grasped`.
    """

    observation: Observation
    success: bool
    readings: dict[str, float]


class Environment(Protocol):
    """One running task. The runner counts the steps and ends the episode.

    An environment may have a settable `drawing`: while False, its observations have no pictures. It may name its
    `robot`, as a LeRobotDataset's `robot_type` does, and tell in `about`, JSON-ready, what a result must say about it.
    """

    spec: ActionSpec
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names; the same seed gives the same start."""

    def step(self, action: np.ndarray) -> Step:
        """Apply one action, shape (A,), in the units of `spec`."""

    def close(self) -> None:
        """Free the simulator."""


class InvalidAction(ValueError):
    """An action that must not reach the controller; the message says which number and why."""


def check_action(action: Any, spec: ActionSpec) -> np.ndarray:
    """The action as float32 if the controller may have it.

    Raises:
        InvalidAction: Wrong size, not a number, or outside the spec's bounds by more than 1e-3 of their range.
    """
    values = np.asarray(action, dtype=np.float32)
    if values.shape != (spec.dim,):
        raise InvalidAction(f"an action needs {spec.dim} numbers ({', '.join(spec.names)}), got shape {values.shape}")
    for name, value in zip(spec.names, values, strict=True):
        if not np.isfinite(value):
            raise InvalidAction(f"action {name} is {value}: the policy returned a value that is not a finite number")
    if spec.low and spec.high:
        low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
        slack = 1e-3 * (high - low)
        for index in np.flatnonzero((values < low - slack) | (values > high + slack)):
            raise InvalidAction(
                f"action {spec.names[index]} is {values[index]:.4g}, outside its bounds "
                f"[{low[index]:.4g}, {high[index]:.4g}]"
            )
        values = np.clip(values, low, high)
    return values
