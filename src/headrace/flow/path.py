r"""Gaussian probability paths between noise at t=0 and data at t=1.

Source: Lipman et al. 2022, arXiv 2210.02747, sec. 4; Lipman et al. 2024, arXiv 2412.06264, sec. 4.
"""

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point on a path and what the velocity network should say there.

    Attributes:
        x_t: State at time t, shape of the data.
        target: Velocity dx_t/dt, shape of the data.
        t: Time of each row, shape (B,), 0 noise to 1 data.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """View `t` of shape (B,) as (B, 1, ..., 1) so that it multiplies `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def straight_path(noise: Tensor, data: Tensor, t: Tensor, *, sigma_min: float = 0.0) -> PathSample:
    r"""Straight line from noise to data.

    :math:`x_t = (1-(1-\sigma)t)\,\epsilon + t\,a`, velocity :math:`a-(1-\sigma)\epsilon`.

    Args:
        noise: Start points, shape (B, ...).
        data: End points, same shape.
        t: Times in [0, 1], shape (B,).
        sigma_min: Width left around the data at t=1; ViPRA uses 0.001, rectified flow 0.

    Raises:
        ValueError: Shapes differ, or `t` is not (B,).
    """
    if noise.shape != data.shape:
        raise ValueError(f"noise and data must have one shape, got {tuple(noise.shape)} and {tuple(data.shape)}")
    if t.shape != data.shape[:1]:
        raise ValueError(f"t must have shape ({data.shape[0]},), got {tuple(t.shape)}")
    time = expand_time(t, data)
    keep = 1.0 - sigma_min
    return PathSample((1.0 - keep * time) * noise + time * data, data - keep * noise, t)
