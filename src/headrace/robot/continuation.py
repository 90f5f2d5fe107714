"""Real-time chunking: sample a chunk that continues one which is being executed.

The flow is guided so that its estimate of the end agrees with the rows that are already fixed or nearly so:
v + min(beta, (1-t) / (t r^2)) J^T diag(W) (Y - x1), with x1 = x + (1-t) v(x, t), J = d x1 / d x and
r^2 = (1-t)^2 / (t^2 + (1-t)^2). Source: Black, Galliker and Levine 2025, arXiv 2506.07339, eq. 2 to 5.
"""
# Shape letters: B batch, H horizon, A action dimension, P rows of the chunk being executed.

import numpy as np
import torch
from torch import Tensor

from headrace.flow.solver import SolverSettings, Velocity
from headrace.robot.action_queue import soft_mask
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput

GUIDANCE_LIMIT = 5.0  # beta; the paper's value


def prefix_weights(delay: int, overlap: int, horizon: int) -> Tensor:
    """How strongly each row of the new chunk is held to the old one, float32 (H,): 1, then falling, then 0.

    Args:
        delay: Rows that will be executed before the new chunk arrives.
        overlap: Rows of the old chunk that are left; what exceeds the horizon is not used.
        horizon: H.
    """
    overlap = min(overlap, horizon)
    weights = torch.zeros(horizon)
    weights[:overlap] = torch.from_numpy(soft_mask(min(delay, overlap), overlap).astype(np.float32))
    return weights


def continuing(velocity: Velocity, prefix: Tensor, weights: Tensor, *, limit: float = GUIDANCE_LIMIT) -> Velocity:
    """The velocity guided towards `prefix`, differentiating through the network.

    Args:
        velocity: Called as `velocity(x, t)`, x (B, H, A), t (B,); must be differentiable in x.
        prefix: Normalised rows of the old chunk from now on, (B, P, A); rows behind the last are not guided.
        weights: From `prefix_weights`, (H,); 0 where there is no old row.
        limit: Largest factor of the correction, beta.

    Raises:
        ValueError: A row beyond the prefix has a weight, or the prefix's shape does not fit.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        rows = min(prefix.shape[1], x.shape[1])
        if prefix.shape[0] != x.shape[0] or prefix.shape[2] != x.shape[2] or weights.shape != (x.shape[1],):
            raise ValueError(f"prefix {tuple(prefix.shape)} and weights {tuple(weights.shape)} for {tuple(x.shape)}")
        if bool((weights[rows:] != 0).any()):
            raise ValueError(f"weights reach beyond the {rows} rows of the prefix")
        wanted = torch.zeros_like(x)
        wanted[:, :rows] = prefix[:, :rows]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            slope = velocity(leaf, t)
            left = (1 - t)[:, None, None]
            end = leaf + left * slope
            error = (wanted - end).detach() * weights.to(x)[None, :, None]
            (correction,) = torch.autograd.grad(end, leaf, error)
        return slope.detach() + guidance_factor(t, limit)[:, None, None] * correction

    return guided


def guidance_factor(t: Tensor, limit: float) -> Tensor:
    """min(limit, (1-t) / (t r^2)), which is (t^2 + (1-t)^2) / (t (1-t)); shape of `t`."""
    left = 1 - t
    return ((t**2 + left**2) / (t * left).clamp_min(torch.finfo(t.dtype).tiny)).clamp(max=limit)


def sample_after(
    model: VipraPolicy,
    inputs: PolicyInput,
    noise: Tensor,
    solver: SolverSettings,
    *,
    prefix: Tensor,
    delay: int,
    limit: float = GUIDANCE_LIMIT,
) -> Tensor:
    """`VipraPolicy.sample` guided to continue a chunk; raw units, (B, H, A).

    Args:
        model: The network.
        inputs: What the policy sees now.
        noise: (B, H, A).
        solver: How the flow is followed.
        prefix: Raw rows of the chunk being executed, from now on, (B, P, A); P may be 0.
        delay: Rows that will be executed before this chunk arrives.
        limit: Largest factor of the correction.

    Raises:
        ValueError: The solver leaves out a time segment of the decoder, or the decoder holds its features, which the
            correction's gradient would have to go around.
    """
    model.decoder.require(solver)
    if model.decoder.config.features == "hold":
        raise ValueError(
            "a chunk cannot be continued with held features: ask for one without a prefix, or set `features` of "
            "`decoder` from 'hold' to 'full' in the policy's config.json"
        )
    with torch.no_grad():
        seen = model.compute_prefix(inputs)
        wanted = model.normalize_action(prefix.to(noise))

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # A fork per call: the network's graph must not stay in the cache for the next step.
            return model.velocity(seen._replace(cache=seen.cache.fork()), x, t)

        weights = prefix_weights(delay, wanted.shape[1], noise.shape[1]).to(noise)
        guided = continuing(velocity, wanted, weights, limit=limit)
        return model.normalize_action.inverse(solver.sample(guided, noise))
