"""Small targets and networks that the flow benchmarks share: everything a figure in docs/results is made on."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headrace.flow.coupling import Coupling
from headrace.flow.gaussian_mixture import GaussianMixture

Sampler = Callable[[int, torch.Generator], Tensor]


def ring(count: int, radius: float) -> Tensor:
    """Points on a circle, shape (count, 2)."""
    angle = torch.arange(count) * (2 * math.pi / count)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


EIGHT = GaussianMixture(means=ring(8, 5.0), std=math.sqrt(0.1))
FIVE = GaussianMixture(means=ring(5, 3.0), std=0.3)
MODES_16D = 1.5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
MIXTURES = {
    "1 Gaussian 2-D s=.2": GaussianMixture(means=torch.tensor([[3.0, 1.0]]), std=0.2),
    "1 Gaussian 16-D s=.1": GaussianMixture(means=MODES_16D[:1], std=0.1),
    "8 Gaussians s=1": GaussianMixture(means=ring(8, 5.0), std=1.0),
    "8 Gaussians s=.316": GaussianMixture(means=ring(8, 5.0), std=0.316),
    "4 modes 16-D s=.3": GaussianMixture(means=MODES_16D, std=0.3),
}


def normal(count: int, generator: torch.Generator) -> Tensor:
    """Standard noise in the plane."""
    return torch.randn(count, 2, generator=generator)


def eight(count: int, generator: torch.Generator) -> Tensor:
    """Eight narrow Gaussians on a circle of radius 5."""
    return EIGHT.sample(count, generator=generator)


def five(count: int, generator: torch.Generator) -> Tensor:
    """Five narrow Gaussians on a circle of radius 3."""
    return FIVE.sample(count, generator=generator)


def labelled_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two half moons and which of them each point is on."""
    angle = torch.rand(count, generator=generator) * math.pi
    upper = torch.rand(count, generator=generator) < 0.5
    first = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None], first, torch.tensor([1.0, 0.5]) - first)
    return 3.0 * (points + 0.1 * torch.randn(count, 2, generator=generator)) - 1.0, upper.long()


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half moons."""
    return labelled_moons(count, generator)[0]


class Ensemble(nn.Module):
    """Many small networks trained in one pass, (E, B, in) to (E, B, out): SELU, three hidden layers."""

    def __init__(self, members: int, inputs: int, outputs: int, *, width: int = 64) -> None:
        super().__init__()
        sizes = [inputs, width, width, width, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = a**-0.5
            one = torch.empty(1, a, b).uniform_(-bound, bound)  # every member starts alike: only the method differs
            self.weights.append(nn.Parameter(one.repeat(members, 1, 1)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, b)))

    def forward(self, x: Tensor) -> Tensor:
        """All members on their own inputs."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = nn.functional.selu(x) if layer < len(self.weights) - 1 else x
        return x

    def member(self, index: int, label: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Velocity of one member, under one label where it was trained with labels."""
        one = [(w[index].detach(), b[index].detach()) for w, b in zip(self.weights, self.biases, strict=True)]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            h = torch.cat([x, t[:, None], *([] if label is None else [torch.full_like(t, float(label))[:, None]])], 1)
            for layer, (weight, bias) in enumerate(one):
                h = h @ weight + bias
                h = nn.functional.selu(h) if layer < len(one) - 1 else h
            return h

        return velocity


def train_couplings(
    couplings: list[Coupling],
    source: Sampler,
    target: Callable[[int, torch.Generator], Tensor | tuple[Tensor, Tensor]],
    *,
    steps: int,
    seed: int,
    batch: int = 128,
) -> Ensemble:
    """One network per coupling on the same batches; targets with labels train conditional networks."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    labelled = isinstance(target(2, torch.Generator()), tuple)
    networks = Ensemble(len(couplings), 3 + labelled, 2)
    optimizer = torch.optim.Adam(networks.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        noise, drawn = source(batch, draw), target(batch, draw)
        data, label = drawn if isinstance(drawn, tuple) else (drawn, None)
        pairs = [c.pair(noise, data, condition=label, generator=draw) for c in couplings]
        start = torch.stack([p.noise for p in pairs])
        weight = torch.stack([torch.ones(batch) if p.weight is None else p.weight for p in pairs])
        t = torch.rand(batch, 1, generator=draw).expand(len(couplings), -1, -1)
        goal = data.expand_as(start)
        state = (1.0 - t) * start + t * goal
        parts = [state, t] if label is None else [state, t, label[:, None].float().expand_as(t)]
        error = (networks(torch.cat(parts, -1)) - (goal - start)).square().sum(-1)
        optimizer.zero_grad()
        (weight * error).mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    return networks


class Chunks(NamedTuple):
    """Demonstrated chunks and their goals.

    Attributes:
        actions: Eight steps of two numbers, shape (B, 1, 16), flattened into one token.
        goal: Shape (B, 2), in [-1, 1].
    """

    actions: Tensor
    goal: Tensor


def clean_chunks(goal: Tensor) -> Tensor:
    """Both detours to each goal without noise, shape (2, B, 1, 16)."""
    share = torch.linspace(0, 1, 8)[None, :, None]
    aside = torch.stack([-goal[:, 1], goal[:, 0]], 1)[:, None]
    bump = torch.sin(math.pi * share) * 0.8 * aside / (aside.norm(dim=-1, keepdim=True) + 0.3)
    line = goal[:, None] * share
    return torch.stack([2.0 * (line + side * bump).reshape(len(goal), 1, 16) for side in (1.0, -1.0)])


def bimodal_chunks(count: int, generator: torch.Generator) -> Chunks:
    """A goal in the plane and one of two detours to it, with noise of 0.06."""
    goal = 2.0 * torch.rand(count, 2, generator=generator) - 1.0
    side = torch.randint(0, 2, (count,), generator=generator)
    clean = clean_chunks(goal)[side, torch.arange(count)]
    return Chunks(clean + 0.06 * torch.randn(clean.shape, generator=generator), goal)


def chunk_error(actions: Tensor, goal: Tensor) -> float:
    """Root mean square distance of each chunk to the nearer clean detour; 0.06 is the data's own."""
    return (actions - clean_chunks(goal)).square().mean((-1, -2)).amin(0).mean().sqrt().item()
