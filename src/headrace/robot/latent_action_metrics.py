"""Whether latent actions are used, mean something, and steer the prediction.

A low reconstruction loss proves none of these: a decoder can redraw the next frame without the codes naming the motion.
"""
# Shape letters: B batch, T transitions, N tokens of a transition, R rows, F numbers of a row, A numbers of an action.

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.nn.quantizers.code_usage import Usage, usage_of
from headrace.nn.shapes import expect_shape
from headrace.robot.latent_action import LatentActionModel


def code_usage(codes: Tensor, size: int) -> Usage:
    """Use of a codebook of `size` codes, from codes of any shape.

    Raises:
        ValueError: A code lies outside the codebook.
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
    return usage_of(torch.bincount(codes.flatten().cpu(), minlength=size))


def one_hot_rows(codes: Tensor, size: int) -> Tensor:
    """Codes (R, N) as rows of zeros and ones, shape (R, N * size): what a linear probe reads without a codebook."""
    return torch.nn.functional.one_hot(codes, size).flatten(1).float()


class Probe(NamedTuple):
    """How well a linear map predicts actions on rows it was not fitted on.

    Attributes:
        r2: Share of variance explained, averaged over action dimensions by their variance; below 0 is worse than the
            mean.
        per_dimension: The same for each dimension, shape (A,); NaN where the held-out actions are constant.
    """

    r2: float
    per_dimension: Tensor


_PENALTIES = tuple(10 ** (step / 2) for step in range(-8, 5))  # 1e-4 to 100


def linear_probe(
    rows: Tensor, actions: Tensor, held_out_rows: Tensor, held_out_actions: Tensor, *, ridge: float | None = None
) -> Probe:
    """Fit actions by a ridge regression on latent rows and score it elsewhere; split by episode, not by frame.

    Args:
        rows: Shape (R, F).
        actions: True actions, shape (R, A).
        held_out_rows: Shape (S, F).
        held_out_actions: Shape (S, A).
        ridge: Penalty as a share of the rows' mean square, above 0. By default the one of 1e-4 to 100 with the least
            leave-one-out error on the fitted rows, so that many columns on few rows do not fit noise.

    Raises:
        ValueError: Shapes do not fit.
    """
    expect_shape("rows", rows, (None, None))
    expect_shape("actions", actions, (rows.shape[0], None))
    expect_shape("held_out_rows", held_out_rows, (None, rows.shape[1]))
    expect_shape("held_out_actions", held_out_actions, (held_out_rows.shape[0], actions.shape[1]))
    if ridge is not None and ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    x, y = rows.double(), actions.double()
    centre, level = x.mean(0), y.mean(0)
    x, y = x - centre, y - level
    left_side, values, right = torch.linalg.svd(x, full_matrices=False)
    unit, seen = values.square().sum() / x.shape[1] + 1e-12, left_side.T @ y

    def left_out(share: float) -> float:
        """Squared error on each row by the map fitted on all others, in closed form."""
        kept = values.square() / (values.square() + share * unit)
        leverage = left_side.square() @ kept + 1 / len(x)
        error = (y - left_side @ (kept[:, None] * seen)) / (1 - leverage)[:, None].clamp_min(1e-9)
        return float(error.square().sum())

    share = min(_PENALTIES, key=left_out) if ridge is None else ridge
    weights = right.T @ ((values / (values.square() + share * unit))[:, None] * seen)
    truth = held_out_actions.double()
    residual = truth - level - (held_out_rows.double() - centre) @ weights
    left, total = residual.square().sum(0), (truth - truth.mean(0)).square().sum(0)
    each = torch.where(total > 0, 1 - left / total.clamp_min(1e-300), torch.nan)
    return Probe(float(1 - left.sum() / total.sum().clamp_min(1e-300)), each)


class Steering(NamedTuple):
    """Whether the latent actions steer the prediction.

    Attributes:
        own: Mean squared error of the next frame with the clip's own latent actions.
        swapped: The same with the latent actions of another clip of the batch.
        copied: The same if the present frame is given as the next one.
        future_margin: PSNR of the prediction against the next frame less that against the present one [dB]; above 0
            if it looks more like the future.
    """

    own: float
    swapped: float
    copied: float
    future_margin: float


@torch.no_grad()
def steering(model: LatentActionModel, clip: Tensor) -> Steering:
    """Swap test and future margin on a batch of clips, in eval mode; the model's mode is put back.

    Args:
        model: Whose target is pixels.
        clip: Frames in [0, 1], shape (B, T+1, 3, S, S), at least 2 clips.

    Raises:
        ValueError: The model predicts features, or there is one clip only.
    """
    if model.config.target != "pixels":
        raise ValueError("the swap test needs a model whose target is pixels; this one predicts features")
    if clip.shape[0] < 2:
        raise ValueError(f"the swap test needs at least 2 clips, got {clip.shape[0]}")
    was_training = model.training
    model.eval()
    try:
        vectors = model.encode(clip).vectors
        now, then = clip[:, :-1], clip[:, 1:]
        own, swapped = model.decode(now, vectors), model.decode(now, vectors.roll(1, 0))
    finally:
        model.train(was_training)
    return Steering(
        own=_error(own, then),
        swapped=_error(swapped, then),
        copied=_error(now, then),
        future_margin=float((_psnr(own, then) - _psnr(own, now)).mean()),
    )


def label_agreement(first: Tensor, second: Tensor) -> float:
    """Share of equal codes of the same transitions seen in two windows; both of one shape.

    Raises:
        ValueError: Shapes differ or there are no codes.
    """
    if first.shape != second.shape or not first.numel():
        raise ValueError(f"codes must have one shape and not be empty, got {tuple(first.shape)}, {tuple(second.shape)}")
    return float((first == second).double().mean())


def end_point_error(flow: Tensor, true: Tensor, *, border: int = 0) -> float:
    """Mean length of the error of an optical flow [px], leaving out `border` px at each side.

    Args:
        flow: Shape (B, 2, H, W) [px].
        true: Same shape.
        border: Pixels left out at each side.
    """
    expect_shape("flow", flow, (None, 2, None, None))
    expect_shape("true", true, flow.shape)
    height, width = flow.shape[-2:]
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(f"border must leave some of {height} x {width} px, got {border}")
    gap = torch.linalg.vector_norm(flow.float() - true.float(), dim=1)
    return float(gap[:, border : height - border, border : width - border].mean())


def _error(predicted: Tensor, true: Tensor) -> float:
    return float((predicted.float() - true.float()).square().mean())


def _psnr(predicted: Tensor, true: Tensor) -> Tensor:
    """Of each frame [dB], prediction clipped to [0, 1]; shape (B, T)."""
    error = (predicted.float().clamp(0, 1) - true.float()).square().flatten(2).mean(2)
    return -10 * error.clamp_min(1e-10).log10()
