import pytest
import torch

from headrace.flow.flowopt import optimise_noise
from headrace.flow.residual import inside, sums_to, together, toward
from headrace.flow.solver import integrate


def test_inside_is_zero_within_the_bounds_and_signed_outside():
    residual = inside(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), margin=0.5)
    data = torch.tensor([[0.0, 1.4], [0.9, -2.0]])
    torch.testing.assert_close(residual(data), torch.tensor([[0.0, 0.0], [0.4, -0.5]]))
    with pytest.raises(ValueError, match="no room"):
        inside(0.0, 1.0, margin=0.6)


def test_sums_are_shared_by_the_steps():
    actions = torch.ones(1, 4, 3)
    wrong = sums_to(torch.tensor([[2.0, 4.0]]), (0, 2))(actions)
    assert wrong[0, :, 0].tolist() == [0.5] * 4 and not wrong[0, :, 1:].any()
    torch.testing.assert_close(sums_to(torch.tensor([[2.0]]), (0,))(actions - wrong), torch.zeros(1, 4, 3))


def test_a_chunk_is_steered_to_a_pose_within_its_limits(mixtures, draw):
    """A flow over 8 x 2 chunks: the summed motion reaches the target, no action beyond the limit."""
    velocity = mixtures["modes_16d_smooth"]

    def sample(z):
        return integrate(velocity, z.flatten(1), steps=5).reshape(z.shape)

    noise = torch.randn(16, 8, 2, generator=draw)
    plain = sample(noise)
    goal = plain.sum(1) + torch.tensor([2.0, -1.0])
    limit = 1.5
    steered = optimise_noise(
        sample, noise, together(sums_to(goal, (0, 1)), inside(-limit, limit)), step_size=0.1, iterations=150
    )
    assert (steered.output.sum(1) - goal).abs().max() < 0.1 < 0.9 < (plain.sum(1) - goal).abs().max()
    assert plain.abs().max() > limit + 0.3 > steered.output.abs().max()
    assert toward(plain)(plain).abs().max() == 0
