import pytest
import torch

from headrace.nn.optical_flow import LucasKanade
from headrace.robot.latent_action import LatentActions, Prediction
from headrace.robot.latent_action_loss import (
    LatentActionLoss,
    LatentActionLossConfig,
    LossSchedule,
    feature_loss,
    flow_consistency,
    pixel_loss,
)

SMOOTH = torch.nn.functional.interpolate(
    torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(0)), size=(40, 40), mode="bicubic"
).clamp(0, 1)[0]


def moving(step, frames=4):
    """A texture that moves `step` px to the left per frame, shape (1, T, 3, 32, 32)."""
    return torch.stack([SMOOTH[:, 4:36, k * step : k * step + 32] for k in range(frames)])[None]


def predicted(frames):
    none = torch.zeros(())
    return Prediction(frames, LatentActions(none, none, none))


def test_the_published_schedule():
    schedule = LossSchedule()
    assert [schedule.at(step) for step in (0, 59_999, 60_000, 70_000, 300_000)] == [0, 0, 0, 0.1, 0.1]
    assert schedule.at(65_000) == pytest.approx(0.05)
    assert LossSchedule(start=5, ramp=0, weight=1.0).at(5) == 1.0


def test_flow_consistency_is_0_on_equal_clips_and_the_speed_on_a_still_one():
    estimate = LucasKanade(levels=2)
    clip = moving(1)
    assert flow_consistency(estimate, clip, clip) == 0
    still = clip[:, :1].expand_as(clip)
    # one px to the left and none downwards: half of the mean over two channels
    assert flow_consistency(estimate, still, clip) == pytest.approx(0.5, abs=0.1)


def test_flow_consistency_sends_gradients_and_skips_padding():
    estimate = LucasKanade(levels=2, steps=2)
    clip = moving(1)
    other = moving(2).requires_grad_()
    valid = torch.tensor([[True, True, True, False]])
    flow_consistency(estimate, other, clip, valid).backward()
    assert other.grad[:, 0].abs().sum() > 0 and other.grad[:, 3].abs().sum() == 0
    assert flow_consistency(estimate, other, clip, torch.zeros(1, 4, dtype=torch.bool)) == 0


def test_padding_is_not_scored():
    a, b = torch.zeros(1, 3, 3, 2, 2), torch.ones(1, 3, 3, 2, 2)
    b[:, 2] = 100
    assert pixel_loss(a, b, torch.tensor([[True, True, False]])) == 1
    assert pixel_loss(a, b, torch.tensor([[True, False, False]]), distance="mse") == 1


def test_every_enabled_term_changes_the_gradient():
    config = LatentActionLossConfig(perceptual=0.5, flow=LossSchedule(start=2, ramp=2, weight=1.0))
    loss = LatentActionLoss(
        config, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3)), estimate=LucasKanade(levels=2, steps=2)
    )
    clip = torch.cat((moving(1)[:, :1], moving(1)), 1)
    gradients = []
    for step in (0, 3, 4):
        frames = moving(2).requires_grad_()
        terms = loss(predicted(frames), clip, step=step)
        assert ("flow" in terms) == (step > 2)
        parts = terms["pixels"] + 0.5 * terms["perceptual"] + config.flow.at(step) * terms.get("flow", 0)
        torch.testing.assert_close(terms["total"], parts)
        terms["total"].backward()
        gradients.append(frames.grad)
    plain = moving(2).requires_grad_()
    pixel_loss(plain, clip[:, 1:]).backward()
    assert not torch.allclose(plain.grad, gradients[0])
    assert not torch.allclose(gradients[0], gradients[1]) and not torch.allclose(gradients[1], gradients[2])


class Gradientless:
    """Flow of two pictures as KL-tracing gives it: true, and of no use for predicted ones."""

    def __init__(self):
        self.inner = LucasKanade(levels=2)

    @torch.no_grad()
    def __call__(self, a, b):
        return self.inner(a, b)


def test_flow_without_a_gradient_is_refused_at_the_first_batch_and_serves_as_the_truth():
    config = LatentActionLossConfig(perceptual=0.0, flow=LossSchedule(start=1000, weight=1.0))
    clip, frames = torch.cat((moving(1)[:, :1], moving(1)), 1), moving(2).requires_grad_()
    with pytest.raises(ValueError, match=r"Gradientless gives flow without a gradient.* as `truth`"):
        LatentActionLoss(config, estimate=Gradientless())(predicted(frames), clip, step=0)
    loss = LatentActionLoss(config, estimate=LucasKanade(levels=2), truth=Gradientless())
    terms = loss(predicted(frames), clip, step=2000)
    assert (
        terms["flow"]
        == LatentActionLoss(config, estimate=LucasKanade(levels=2))(predicted(frames), clip, step=2000)["flow"]
    )
    terms["flow"].backward()
    assert frames.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="without a gradient"):
        flow_consistency(Gradientless(), frames, clip[:, 1:])
    with torch.no_grad():  # nothing is to be learned
        flow_consistency(Gradientless(), frames, clip[:, 1:])


def test_padded_frames_do_not_count_for_features():
    features, other = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    other[:, 1] = 5
    mask = torch.tensor([[True, True, False]])
    assert feature_loss(predicted(other), features, frame_mask=mask)["features"] == 0
    assert feature_loss(predicted(other), features)["features"] > 0


def test_a_weight_without_its_network_is_refused():
    with pytest.raises(ValueError, match=r"perceptual term has weight .* and has no network"):
        LatentActionLoss(LatentActionLossConfig(), estimate=LucasKanade())
    with pytest.raises(ValueError, match=r"flow term has weight 0"):
        LatentActionLoss(LatentActionLossConfig(perceptual=0, flow=LossSchedule(weight=0.0)), estimate=LucasKanade())


def test_the_flow_term_of_some_clips_is_that_of_a_smaller_batch():
    clips, other = torch.cat((moving(1), moving(2))), torch.cat((moving(2), moving(1)))
    config = LatentActionLossConfig(perceptual=0.0, flow=LossSchedule(start=0, ramp=0, weight=1.0), flow_clips=1)
    loss = LatentActionLoss(config, estimate=LucasKanade(levels=2))
    some = loss(predicted(other[:, 1:]), clips, step=0)["flow"]
    assert some == loss(predicted(other[:1, 1:]), clips[:1], step=0)["flow"] > 0
