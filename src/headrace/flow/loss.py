"""The conditional flow-matching loss."""

from torch import Tensor


def flow_matching_loss(prediction: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error between predicted and true velocity, in float32.

    Args:
        prediction: Velocity of the network, shape (B, ...).
        target: True velocity, same shape.
        weight: Zero where nothing is scored (padding), broadcastable to the shape; the mean is over its sum.

    Raises:
        ValueError: Shapes differ.

    Source: Lipman et al. 2022, arXiv 2210.02747, eq. 9.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    squared = (prediction.float() - target.float()).square()
    if weight is None:
        return squared.mean()
    weight = weight.to(squared).expand_as(squared)
    return (squared * weight).sum() / weight.sum().clamp_min(1e-8)
