"""What a latent action model is trained for: pixels, appearance, and the motion between predicted frames."""
# Shape letters: B batch, T predicted frames, H rows, W columns, M valid frames or pairs.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.optical_flow import FlowEstimator
from headrace.nn.shapes import expect_shape
from headrace.robot.latent_action import Prediction

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossSchedule:
    """A weight that is 0 before `start`, rises linearly over `ramp` steps, and stays at `weight`.

    Attributes:
        start: First step at which it may be above 0.
        ramp: Steps of the rise; 0 jumps.
        weight: Final weight.
    """

    start: int = 60_000
    ramp: int = 10_000
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.start < 0 or self.ramp < 0 or self.weight < 0:
            raise ValueError(f"start, ramp and weight must be at least 0, got {self}")

    def at(self, step: int) -> float:
        """Weight at a step, counted from 0."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start) / self.ramp) if self.ramp else self.weight


@dataclass(frozen=True, kw_only=True)
class LatentActionLossConfig:
    """Terms and weights; the defaults are ViPRA's.

    Attributes:
        distance: Per pixel or feature: `l1` (ViPRA) or `mse` (LAPA, UniVLA, Moto).
        perceptual: Weight of the perceptual distance.
        flow: Weight of the optical-flow consistency over the run.
        from_given_frame: Whether the motion from the first, given frame to the first predicted one counts too; the
            official code leaves it out.
        flow_clips: How many clips of a batch the optical-flow term looks at, the first ones; None for all. The term's
            cost falls with it, and as batches are random its mean stays.
    """

    distance: Literal["l1", "mse"] = "l1"
    perceptual: float = 0.5
    flow: LossSchedule = field(default_factory=LossSchedule)
    from_given_frame: bool = False
    flow_clips: int | None = None

    def __post_init__(self) -> None:
        if self.distance not in ("l1", "mse"):
            raise ValueError(f"unknown distance {self.distance!r} (known: l1, mse)")
        if self.perceptual < 0:
            raise ValueError(f"perceptual must be at least 0, got {self.perceptual}")
        if self.flow_clips is not None and self.flow_clips < 1:
            raise ValueError(f"flow_clips must be at least 1 or None, got {self.flow_clips}")


def pixel_loss(
    predicted: Tensor, true: Tensor, valid: Tensor | None = None, *, distance: Literal["l1", "mse"] = "l1"
) -> Tensor:
    """Mean distance over the numbers of valid frames, in float32.

    Args:
        predicted: Shape (B, T, ...).
        true: Same shape.
        valid: Shape (B, T), False where a frame or the one before it is padding; all count if not given.
        distance: `l1` or `mse`.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and true {tuple(true.shape)} must have one shape")
    gap = predicted.float() - true.float()
    each = (gap.abs() if distance == "l1" else gap.square()).flatten(2).mean(2)
    if valid is None:
        return each.mean()
    expect_shape("valid", valid, each.shape)
    return (each * valid).sum() / valid.sum().clamp_min(1)


def flow_consistency(
    estimate: FlowEstimator,
    predicted: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    truth: FlowEstimator | None = None,
) -> Tensor:
    r"""How far the motion between consecutive predicted frames is from that between the true ones [px].

    :math:`\frac12\,\mathrm{mean}(|F(r_k,r_{k+1})-F(g_k,g_{k+1})| + |F(r_{k+1},r_k)-F(g_{k+1},g_k)|)`. Gradients
    flow through both inputs of the estimator; the true motion has none.

    Args:
        estimate: Optical flow of pairs of frames in [0, 1].
        predicted: Frames, shape (B, T, 3, H, W), T at least 2.
        true: Same shape.
        valid: Shape (B, T); a pair counts if both its frames do.
        truth: Optical flow of the true frames, where another one is to give it, such as one without a gradient.

    Returns:
        A scalar; 0 with a gradient of 0 where no pair is valid.

    Raises:
        ValueError: Shapes differ, there are fewer than 2 frames, or `estimate` gives flow without a gradient.

    Source: ViPRA, laq/model/latent_action_quantization.py, compute_flow_loss.
    """
    expect_shape("true", true, predicted.shape)
    if predicted.shape[1] < 2:
        raise ValueError(f"motion needs at least 2 predicted frames, got {predicted.shape[1]}")
    if valid is None:
        valid = torch.ones(predicted.shape[:2], dtype=torch.bool, device=predicted.device)
    expect_shape("valid", valid, predicted.shape[:2])
    pairs = valid[:, 1:] & valid[:, :-1]
    if not bool(pairs.any()):
        return predicted.sum() * 0.0
    r0, r1, g0, g1 = (frames[pairs].float() for clip in (predicted, true) for frames in (clip[:, :-1], clip[:, 1:]))
    # Motion is a small difference of large numbers: half precision would round it away.
    with torch.autocast(predicted.device.type, enabled=False):
        with torch.no_grad():
            forth, back = (truth or estimate)(g0, g1), (truth or estimate)(g1, g0)
        return 0.5 * (
            F.l1_loss(_with_gradient(estimate, r0, r1), forth) + F.l1_loss(_with_gradient(estimate, r1, r0), back)
        )


def _with_gradient(estimate: FlowEstimator, a: Tensor, b: Tensor) -> Tensor:
    """Flow from `a` to `b`; refused where the pictures have a gradient and the flow has none."""
    flow = estimate(a, b)
    if torch.is_grad_enabled() and a.requires_grad and not flow.requires_grad:
        raise ValueError(
            f"{type(estimate).__name__} gives flow without a gradient, so the flow term would teach nothing; estimate "
            "the motion of predicted frames by another one, such as LucasKanade, and give this one as `truth`"
        )
    return flow


class LatentActionLoss(nn.Module):
    """The weighted sum of all terms.

    Args:
        config: Weights.
        perceptual: Distance of pictures in [-1, 1], (M, 3, H, W) twice to (M,), such as `LpipsVGG`. Frozen.
        estimate: Optical flow, such as `LucasKanade` or `Raft`. Frozen; a gradient must come through it.
        truth: Another one for the true frames, which needs no gradient, such as `KlTracing`; `estimate` if not given.

    Raises:
        ValueError: A weight is above 0 without what it weighs, or the reverse; at the first batch, an `estimate`
            without a gradient.
    """

    def __init__(
        self,
        config: LatentActionLossConfig,
        *,
        perceptual: PerceptualDistance | None = None,
        estimate: FlowEstimator | None = None,
        truth: FlowEstimator | None = None,
    ) -> None:
        super().__init__()
        for name, weight, part in (
            ("perceptual", config.perceptual, perceptual),
            ("flow", config.flow.weight, estimate),
        ):
            if (weight > 0) != (part is not None):
                wanted = "has no network" if weight > 0 else "has a network it does not use"
                raise ValueError(f"the {name} term has weight {weight} and {wanted}; give both or neither")
        if truth is not None and estimate is None:
            raise ValueError("`truth` is for the true frames; give `estimate` for the predicted ones as well")
        self.config = config
        self.perceptual, self.estimate, self.truth = perceptual, estimate, truth
        self._tried = False

    def forward(
        self, prediction: Prediction, clip: Tensor, *, step: int, frame_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of one batch.

        Args:
            prediction: Of a model whose target is pixels.
            clip: True frames in [0, 1], shape (B, T+1, 3, H, W).
            step: Training step, for the schedule; the flow network is not run where its weight is 0.
            frame_mask: Shape (B, T+1), False for padding.

        Returns:
            `total`, and `pixels`, `perceptual`, `flow`, `quantizer` before weighting, as far as they were computed.
        """
        config, frames, true = self.config, prediction.frames, clip[:, 1:]
        expect_shape("prediction.frames", frames, true.shape)
        if frame_mask is None:
            frame_mask = torch.ones(clip.shape[:2], dtype=torch.bool, device=clip.device)
        valid = frame_mask[:, 1:] & frame_mask[:, :-1]
        terms = {
            "pixels": pixel_loss(frames, true, valid, distance=config.distance),
            "quantizer": prediction.actions.loss,
        }
        total = terms["pixels"] + terms["quantizer"]
        if self.perceptual is not None and bool(valid.any()):
            terms["perceptual"] = self.perceptual(2 * frames[valid] - 1, 2 * true[valid] - 1).mean()
            total = total + config.perceptual * terms["perceptual"]
        if self.estimate is not None and not self._tried and frames.requires_grad:
            self._tried = True  # now, not when the term starts, which may be hours from here
            still = frames[:1, 0].detach().float().requires_grad_()
            with torch.autocast(frames.device.type, enabled=False):
                _with_gradient(self.estimate, still, still)
        weight = config.flow.at(step)
        if self.estimate is not None and weight > 0:
            some = slice(config.flow_clips)
            terms["flow"] = self._flow(frames[some], clip[some], valid[some], frame_mask[some])
            total = total + weight * terms["flow"]
        return {"total": total, **terms}

    def _flow(self, frames: Tensor, clip: Tensor, valid: Tensor, frame_mask: Tensor) -> Tensor:
        assert self.estimate is not None
        if not self.config.from_given_frame:
            return flow_consistency(self.estimate, frames, clip[:, 1:], valid, truth=self.truth)
        frames = torch.cat((clip[:, :1].to(frames), frames), 1)
        valid = torch.cat((frame_mask[:, :1], valid), 1)
        return flow_consistency(self.estimate, frames, clip, valid, truth=self.truth)


def feature_loss(
    prediction: Prediction,
    features: Tensor,
    *,
    distance: Literal["l1", "mse"] = "mse",
    frame_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Terms for a model whose target is the features of the next frame, as in UniVLA.

    Args:
        prediction: Of the model, `frames` of shape (B, T, P, D).
        features: True features of frames 1 .. T, same shape; no gradient goes into them.
        distance: `mse` (UniVLA) or `l1`.
        frame_mask: Shape (B, T+1), False for padding, which is not scored.

    Returns:
        `total`, `features` and `quantizer`.
    """
    valid = None if frame_mask is None else frame_mask[:, 1:] & frame_mask[:, :-1]
    term = pixel_loss(prediction.frames, features.detach(), valid, distance=distance)
    return {"total": term + prediction.actions.loss, "features": term, "quantizer": prediction.actions.loss}
