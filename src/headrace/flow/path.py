r"""Gaussian probability paths between noise at t=0 and data at t=1.

Every path here has the form :math:`x_t = \alpha_t\,a + \sigma_t\,\epsilon` with data `a` and noise `epsilon`;
a schedule gives the two coefficients and their derivatives, and everything else follows from them.

Source: Lipman et al. 2022, arXiv 2210.02747, sec. 4; Lipman et al. 2024, arXiv 2412.06264, sec. 4.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
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


class Coefficients(NamedTuple):
    """Coefficients of a Gaussian path at some times, each of the shape of `t`.

    Attributes:
        alpha: Factor of the data, 0 at t=0 and 1 at t=1.
        sigma: Factor of the noise, 1 at t=0 and (about) 0 at t=1.
        d_alpha, d_sigma: Their derivatives by t.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


Schedule = Callable[[Tensor], Coefficients]


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """View `t` of shape (B,) as (B, 1, ..., 1) so that it multiplies `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def _check(noise: Tensor, data: Tensor, t: Tensor) -> None:
    if noise.shape != data.shape:
        raise ValueError(f"noise and data must have one shape, got {tuple(noise.shape)} and {tuple(data.shape)}")
    if noise.device != data.device:
        raise ValueError(f"noise and data must lie on one device, got {noise.device} and {data.device}")
    if t.shape != data.shape[:1]:
        raise ValueError(f"t must have shape ({data.shape[0]},), got {tuple(t.shape)}")
    if t.device != data.device:
        raise ValueError(f"t must lie on the data's device {data.device}, got {t.device}")


def straight_path(noise: Tensor, data: Tensor, t: Tensor, *, sigma_min: float = 0.0) -> PathSample:
    r"""Straight line from noise to data.

    :math:`x_t = (1-(1-\sigma)t)\,\epsilon + t\,a`, velocity :math:`a-(1-\sigma)\epsilon`.

    Args:
        noise: Start points, shape (B, ...).
        data: End points, same shape.
        t: Times in [0, 1], shape (B,).
        sigma_min: Width left around the data at t=1; ViPRA uses 0.001, rectified flow 0.

    Raises:
        ValueError: Shapes or devices differ, or `t` is not (B,).
    """
    _check(noise, data, t)
    time = expand_time(t, data)
    keep = 1.0 - sigma_min
    return PathSample((1.0 - keep * time) * noise + time * data, data - keep * noise, t)


def straight_schedule(t: Tensor) -> Coefficients:
    """Straight lines: alpha = t, sigma = 1 - t."""
    one = torch.ones_like(t)
    return Coefficients(t, 1.0 - t, one, -one)


def cosine_schedule(t: Tensor) -> Coefficients:
    """Variance-preserving quarter circle: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    Source: Albergo and Vanden-Eijnden 2023, arXiv 2209.15571, sec. 2 (trigonometric interpolant).
    """
    angle, rate = t * (math.pi / 2), math.pi / 2
    return Coefficients(angle.sin(), angle.cos(), rate * angle.cos(), -rate * angle.sin())


def diffusion_schedule(t: Tensor, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Coefficients:
    """The variance-preserving diffusion with a linear beta, running from noise at t=0 to data at t=1.

    At t=0 alpha is exp(-(beta_min + beta_max) / 4), not 0: the published process leaves a trace of the data there.

    Source: Song et al. 2021, arXiv 2011.13456, appendix C; Lipman et al. 2022, sec. 4.1.
    """
    back = 1.0 - t
    log_alpha = -0.25 * back.square() * (beta_max - beta_min) - 0.5 * back * beta_min
    alpha = log_alpha.exp()
    d_alpha = alpha * 0.5 * (back * (beta_max - beta_min) + beta_min)
    sigma = (-torch.expm1(2.0 * log_alpha)).clamp_min(1e-10).sqrt()
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def gaussian_path(noise: Tensor, data: Tensor, t: Tensor, schedule: Schedule) -> PathSample:
    """A point on the path of any schedule; with `straight_schedule` the same as `straight_path`.

    Args:
        noise: Shape (B, ...).
        data: Same shape.
        t: Times in [0, 1], shape (B,); a diffusion path's velocity is singular at exactly 1.
        schedule: Such as `cosine_schedule`.

    Raises:
        ValueError: Shapes or devices differ, or `t` is not (B,).
    """
    _check(noise, data, t)
    c = Coefficients(*(expand_time(part, data) for part in schedule(t)))
    return PathSample(c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise, t)


def bridge_path(
    noise: Tensor, data: Tensor, t: Tensor, *, sigma: float, generator: torch.Generator | None = None
) -> PathSample:
    r"""A Brownian bridge: the straight line widened to standard deviation :math:`\sigma\sqrt{t(1-t)}`.

    With pairs from `sinkhorn_plan` at `epsilon = 2 * sigma**2` on squared distances this is Schroedinger-bridge CFM.

    Args:
        noise: Start points, shape (B, ...).
        data: End points, same shape.
        t: Times strictly inside (0, 1), shape (B,); the velocity grows without bound towards the ends.
        sigma: Width, at least 0.
        generator: Randomness of the widening.

    Raises:
        ValueError: Shapes or devices differ, `t` is not (B,), or `sigma` is negative.

    Source: Tong et al. 2024, arXiv 2302.00482, sec. 3.2.3; torchcfm@cacd4dc.
    """
    _check(noise, data, t)
    if sigma < 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    time = expand_time(t, data)
    spread = (time * (1.0 - time)).clamp_min(1e-12)
    draw = torch.empty_like(data).normal_(generator=generator)
    shift = sigma * spread.sqrt() * draw
    target = data - noise + (1.0 - 2.0 * time) / (2.0 * spread) * shift
    return PathSample((1.0 - time) * noise + time * data + shift, target, t)


def data_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor, schedule: Schedule = straight_schedule) -> Tensor:
    """The data that a state and its velocity point at; at t=1 of the straight path simply the state.

    Args:
        x_t: State, shape (B, ...).
        velocity: Velocity there, same shape.
        t: Shape (B,).
        schedule: The path's schedule.
    """
    c = Coefficients(*(expand_time(part, x_t) for part in schedule(t)))
    return (c.d_sigma * x_t - c.sigma * velocity) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)


def noise_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor, schedule: Schedule = straight_schedule) -> Tensor:
    """The noise that a state and its velocity come from; divided by `-sigma` it is the score of the path."""
    c = Coefficients(*(expand_time(part, x_t) for part in schedule(t)))
    return (c.alpha * velocity - c.d_alpha * x_t) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)
