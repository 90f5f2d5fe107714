"""The conditional flow-matching loss."""

from torch import Tensor


def flow_matching_loss(
    prediction: Tensor, target: Tensor, *, weight: Tensor | None = None, pair_weight: Tensor | None = None
) -> Tensor:
    """Mean squared error between predicted and true velocity, in float32.

    Args:
        prediction: Velocity of the network, shape (B, ...).
        target: True velocity, same shape.
        weight: Zero where nothing is scored (padding), broadcastable to the shape; the mean is over its sum.
        pair_weight: Weight of each (noise, data) pair with mean 1, shape (B,), as weighted couplings give; multiplies
            the rows after `weight`'s mean has been taken care of, so that a learning rate keeps its meaning.

    Raises:
        ValueError: Shapes or devices differ, or `pair_weight` is not (B,).

    Source: Lipman et al. 2022, arXiv 2210.02747, eq. 9; weighted pairs: Weighted CFM, arXiv 2507.22270.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    if prediction.device != target.device:
        raise ValueError(f"prediction and target must lie on one device, got {prediction.device} and {target.device}")
    squared = (prediction.float() - target.float()).square()
    if pair_weight is not None:
        if pair_weight.shape != squared.shape[:1]:
            raise ValueError(f"pair_weight must have shape ({squared.shape[0]},), got {tuple(pair_weight.shape)}")
        squared = squared * pair_weight.to(squared).reshape(-1, *[1] * (squared.ndim - 1))
    if weight is None:
        return squared.mean()
    weight = weight.to(squared).expand_as(squared)
    return (squared * weight).sum() / weight.sum().clamp_min(1e-8)
