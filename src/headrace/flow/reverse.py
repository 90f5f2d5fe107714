"""The one adapter for velocities trained with noise at t=1; meant for importers of other projects' weights."""

from torch import Tensor

from headrace.flow.solver import Velocity


def reverse_time(velocity: Velocity) -> Velocity:
    """A velocity of the opposite time direction in ours: `w(x, t) = -velocity(x, 1 - t)`.

    openpi, SmolVLA, LFM, BFM and diffusers run from data at 0 to noise at 1. Its own inverse.

    Args:
        velocity: Called as `velocity(x, s)`, s=0 data, s=1 noise, target noise minus data.

    Source: openpi@15a9616 and diffusers 0.39 for the other convention.
    """

    def reversed_velocity(x: Tensor, t: Tensor) -> Tensor:
        return -velocity(x, 1.0 - t)

    return reversed_velocity
