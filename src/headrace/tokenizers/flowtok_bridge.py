"""The flow between text tokens and image tokens: guidance without an empty text, and the step grid.

Source: FlowTok (arXiv 2503.10772, sec. 3.3-3.4; TACJu/FlowTok). Time runs from the source (0) to the target (1); in
text-to-image the text takes the place of noise.
"""

# Shape letters in this file: B batch, K tokens, D channels.

import torch
from torch import Tensor, nn

from headrace.flow.guidance import check_interval
from headrace.flow.solver import SolverSettings, Velocity, integrate, integrate_each, uniform_grid
from headrace.nn.dit import SequenceDiT, SequenceDiTConfig
from headrace.tokenizers.flowtok_text import AlignHead, ProjectorConfig, TextDecoder, TextDecoderConfig, TextProjector

MATCHED, UNMATCHED = 0, 1
LEGACY_END = 1.0 - 1e-5
EVERYWHERE = (0.0, 1.0)


class TextToImage(nn.Module):
    """Projector, alignment head and velocity network of text-to-image."""

    def __init__(self, text_width: int, projector: ProjectorConfig, net: SequenceDiTConfig) -> None:
        super().__init__()
        self.projector = TextProjector(text_width, net.channels, projector)
        self.align = AlignHead(text_width, net.channels, projector.align_hidden)
        self.velocity = SequenceDiT(net)


class ImageToText(nn.Module):
    """Text tokenizer (projector and decoder to words) and velocity network of image-to-text."""

    def __init__(
        self,
        text_width: int,
        vocabulary: int,
        projector: ProjectorConfig,
        net: SequenceDiTConfig,
        decoder: TextDecoderConfig,
    ) -> None:
        super().__init__()
        self.projector = TextProjector(text_width, net.channels, projector)
        self.decoder = TextDecoder(net.tokens, net.channels, vocabulary, decoder)
        self.velocity = SequenceDiT(net)


def draw_flags(
    batch: int,
    probability: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which samples get somebody else's target, bool (B,); never exactly one, because one has nobody to swap with."""
    flags = torch.rand(batch, generator=generator, device=device) < probability
    return flags & (flags.sum() > 1)


def swap_flagged(targets: Tensor, flags: Tensor) -> Tensor:
    """A copy of the targets (B, ...) in which the flagged rows are shifted by one among themselves."""
    rows = flags.nonzero().flatten()
    swapped = targets.clone()
    swapped[rows] = targets[rows.roll(-1)]
    return swapped


def indicator_velocity(net: SequenceDiT, guidance: float) -> Velocity:
    """`v_unmatched + guidance * (v_matched - v_unmatched)`, both rows of the indicator in one call of the network.

    Guidance 1 is a single matched call and 0 a single unmatched one. No empty caption is involved.
    """

    def single(label: int) -> Velocity:
        return lambda x, t: net(x, t, torch.full_like(t, label, dtype=torch.int64))

    def both(x: Tensor, t: Tensor) -> Tensor:
        label = torch.tensor([MATCHED, UNMATCHED], device=x.device).repeat_interleave(len(x))
        matched, unmatched = net(x.repeat(2, 1, 1), t.repeat(2), label).chunk(2)
        return unmatched + guidance * (matched - unmatched)

    return single(MATCHED) if guidance == 1 else single(UNMATCHED) if guidance == 0 else both


def transport(
    net: SequenceDiT,
    source: Tensor,
    *,
    steps: int | None = None,
    solver: SolverSettings | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    legacy_grid: bool = False,
) -> Tensor:
    """Carry source tokens to the target.

    Args:
        net: Velocity network.
        source: Tokens at t=0, (B, K, D).
        steps: Equal Euler steps, 20 in the paper; give these or `solver`.
        solver: How the flow is followed.
        guidance: See `indicator_velocity`; 2 in the released 20-step runs.
        interval: Steps that start at `low <= t < high` are guided; the others ask the network once, matched.
        legacy_grid: The released sampler goes to 1 - 1e-5 in n equal steps but asks the network at i/(n-1) instead of
            i/n, up to 0.05 late at n=20. Weights trained and judged with it may want it; everything else does not. It
            is for `steps` without an interval: a solver's times are asked for as they are.

    Returns:
        Tokens at t=1, (B, K, D).

    Raises:
        ValueError: Both or neither of `steps` and `solver`, a bad interval, or one with `dopri5` or the legacy grid.
    """
    if (steps is None) == (solver is None):
        raise ValueError("give either steps or solver")
    velocity, everywhere = indicator_velocity(net, guidance), check_interval(interval) == EVERYWHERE
    if steps is not None and legacy_grid and steps > 1:
        if not everywhere:
            raise ValueError("the legacy grid knows no guidance interval; give a solver in place of steps")
        late, grid = steps / (steps - 1), uniform_grid(steps, t1=LEGACY_END)
        return integrate(lambda x, t: velocity(x, t * late), source, grid=grid)
    chosen = solver or SolverSettings(steps=steps)
    if everywhere:
        return chosen.sample(velocity, source)
    if chosen.method == "dopri5":
        raise ValueError("dopri5 steps across the ends of a guidance interval; take a method with fixed steps")
    plain, (low, high) = indicator_velocity(net, 1.0), interval
    velocities = [velocity if low <= start < high else plain for start in chosen.times[:-1]]
    return integrate_each(velocities, source, grid=chosen.times, method=chosen.method)
