"""Networks and grids between diffusers' flow matching and ours: there sigma 1 is noise and velocities point to it.

Source: diffusers 0.39, FlowMatchEulerDiscreteScheduler and the pipelines that call it.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from headrace.flow.reverse import reverse_time
from headrace.flow.solver import Velocity, check_grid

TRAIN_TIMESTEPS = 1000  # diffusers' networks are asked at sigma times this


def from_diffusers(network: Callable[[Tensor, Tensor], Tensor], *, timesteps: int = TRAIN_TIMESTEPS) -> Velocity:
    """A diffusers velocity network as one of ours, for `integrate`, step grids and straightening.

    Args:
        network: Called as `network(x, timestep)` with timesteps from `timesteps` (noise) to 0 (data), shape (B,);
            target noise minus data. Bind conditions, and take `.sample` of what a model returns, in it.
        timesteps: The scheduler's `num_train_timesteps`.
    """
    return reverse_time(lambda x, sigma: network(x, timesteps * sigma))


def to_diffusers(velocity: Velocity, *, timesteps: int = TRAIN_TIMESTEPS) -> Callable[[Tensor, Tensor], Tensor]:
    """The other way: one of our velocities as the `network(x, timestep)` whose output goes into `scheduler.step`."""
    theirs = reverse_time(velocity)
    return lambda x, timestep: theirs(x, timestep / timesteps)


def sigmas_of(grid: Sequence[float]) -> list[float]:
    """A rising grid from 0 to 1 as `scheduler.set_timesteps(sigmas=...)` takes it: 1 - tau, falling.

    The final 0 is left out, because the scheduler appends it. The scheduler must not move them again: build it with
    `shift=1.0, use_dynamic_shifting=False`.

    Raises:
        ValueError: The grid does not rise from 0 to 1.
    """
    times = check_grid(grid)
    if times[0] != 0.0 or times[-1] != 1.0:
        raise ValueError(f"a sampling grid must run from 0 (noise) to 1 (data), got {times[0]} to {times[-1]}")
    return [1.0 - t for t in times[:-1]]
