"""BOSS phase 2: teach a network to jump along its own chords, on exactly one step grid.

Source: Nguyen et al. 2024, arXiv 2312.16414, sec. 4.2; nguyenngocbaocmt02/BOSS@0c170f9 (facts only).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import PathSample, expand_time
from headrace.flow.solver import Velocity, check_grid, integrate, uniform_grid


@torch.no_grad()
def teacher_states(velocity: Velocity, noise: Tensor, times: Sequence[float], *, fine_steps: int = 100) -> Tensor:
    """States of a fine Euler run at the times of a coarse grid, shape (K+1, B, ...).

    Args:
        velocity: The teacher: the network before straightening.
        noise: Starts, shape (B, ...).
        times: The coarse grid, rising; times that the fine grid lacks are added to it.
        fine_steps: Equal steps of the fine grid over [0, 1].

    Raises:
        ValueError: A bad grid, or a velocity that is not finite.
    """
    coarse = check_grid(times)
    states = [noise]
    for start, end in pairwise(coarse):
        inner = [t for t in uniform_grid(fine_steps) if start + 1e-9 < t < end - 1e-9]
        states.append(integrate(velocity, states[-1], grid=(start, *inner, end)))
    return torch.stack(states)


def chord_samples(states: Tensor, times: Sequence[float], *, generator: torch.Generator | None = None) -> PathSample:
    """For each row one random step of the grid: its start, its chord's slope and its time.

    Args:
        states: From `teacher_states`, shape (K+1, B, ...).
        times: The same grid.
        generator: Randomness of the choice.

    Raises:
        ValueError: The grid and the states do not belong together.
    """
    grid = torch.tensor(check_grid(times), dtype=torch.float32, device=states.device)
    if len(grid) != len(states):
        raise ValueError(f"a grid of {len(grid)} times needs as many states, got {len(states)}")
    rows = torch.arange(states.shape[1], device=states.device)
    step = torch.randint(len(grid) - 1, rows.shape, generator=generator, device=states.device)
    start, end = states[step, rows], states[step + 1, rows]
    return PathSample(start, (end - start) / expand_time(grid[step + 1] - grid[step], start), grid[step])


def straightening_loss(
    velocity: Velocity, states: Tensor, times: Sequence[float], *, generator: torch.Generator | None = None
) -> Tensor:
    """Mean squared distance between the velocity at a step's start and the teacher's chord over the step.

    Only the start times of the grid are ever trained, which is why the network then fits no other grid: save it with
    `StepGrid(..., tuned=True)`.

    Args:
        velocity: The student, called once with one (state, time) per row; may close over one condition per row.
        states: From `teacher_states`, shape (K+1, B, ...).
        times: The same grid.
        generator: Randomness of the choice of steps.
    """
    chords = chord_samples(states, times, generator=generator)
    return flow_matching_loss(velocity(chords.x_t, chords.t), chords.target)
