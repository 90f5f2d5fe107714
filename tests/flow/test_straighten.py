import copy

import pytest
import torch

from headrace.flow.bellman import bellman_grid
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate, trajectory
from headrace.flow.straighten import chord_samples, straightening_loss, teacher_states
from headrace.flow.straightness import root_mean_square

GRID = (0.0, 0.25, 0.6, 1.0)


def test_teacher_states_lie_on_the_fine_run(mixtures, draw):
    noise = torch.randn(16, 2, generator=draw)
    fine = trajectory(mixtures["ring_wide"], noise, steps=20)
    torch.testing.assert_close(
        teacher_states(mixtures["ring_wide"], noise, GRID, fine_steps=20), fine.states[[0, 5, 12, 20]]
    )
    odd = teacher_states(mixtures["ring_wide"], noise, (0.0, 0.333, 1.0), fine_steps=20)
    torch.testing.assert_close(odd[-1], fine.states[-1], atol=0.2, rtol=0.2)


def test_following_the_chords_reaches_the_teachers_end(mixtures, draw):
    noise = torch.randn(6, 2, generator=draw)
    states = teacher_states(mixtures["ring_wide"], noise, GRID)
    chords = {}
    while len(chords) < 3:
        sample = chord_samples(states[:, :1], GRID, generator=draw)
        chords[round(sample.t.item(), 3)] = sample.target
    end = integrate(lambda x, t: chords[round(t[0].item(), 3)].expand_as(x), noise[:1], grid=GRID)
    torch.testing.assert_close(end, states[-1, :1], atol=1e-5, rtol=1e-5)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SELU(), torch.nn.Linear(64, 64), torch.nn.SELU(), torch.nn.Linear(64, 2)
        )

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


def fit(network, loss, steps, rate):
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_straightening_cuts_the_error_five_times_on_its_grid_and_ruins_another(mixtures, draw):
    torch.manual_seed(0)
    target, teacher = mixtures["ring_wide"], Network()

    def matching():
        data = target.sample(256)
        x_t, velocity, t = straight_path(torch.randn_like(data), data, torch.rand(256))
        return (teacher(x_t, t) - velocity).square().mean()

    fit(teacher, matching, 600, 3e-3)
    test_noise = torch.randn(512, 2, generator=draw)
    with torch.no_grad():
        end = integrate(teacher, test_noise, steps=100)
        grid = bellman_grid(teacher, test_noise[:100], steps=4)
        states = teacher_states(teacher, torch.randn(2000, 2, generator=draw), grid.times)
    student = copy.deepcopy(teacher)

    def straighten():
        rows = torch.randint(2000, (256,), generator=draw)
        return straightening_loss(student, states[:, rows], grid.times, generator=draw)

    fit(student, straighten, 700, 1e-3)
    with torch.no_grad():
        before, after, elsewhere = (
            root_mean_square(integrate(network, test_noise, grid=times) - end)
            for network, times in (
                (teacher, grid.times),
                (student, grid.times),
                (student, torch.linspace(0, 1, 11).tolist()),
            )
        )
    assert after * 5 < before
    assert elsewhere > 3 * after


def test_states_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="as many states"):
        chord_samples(torch.zeros(3, 2, 2), GRID)
