"""Sampling of a next-scale generator: guidance that grows with the scale, and passes that refine a scale.

How the passes are computed, with or without a cache, is `headrace.vlm.next_scale_passes`.
"""
# Shape letters: B prompts, K codes of the codebook, N codes of all scales, n codes of a scale.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.nn.quantizers.multi_scale import MultiScaleQuantizer
from headrace.vlm.next_scale import NextScaleGenerator, Prompt
from headrace.vlm.next_scale_passes import CachedPasses, Passes


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn.

    Attributes:
        guidance: Classifier-free guidance at the last scale; it grows linearly from 0 at the first. 0 turns it off.
        top_k: Codes kept in each pass over a scale; its length is the number of passes (the first scale has one).
        top_p: Probability mass kept after `top_k`, per pass; 0 keeps all.
    """

    guidance: float = 7.5
    top_k: tuple[int, ...] = (1200, 100, 1)
    top_p: tuple[float, ...] = (0.8, 0.8, 0.0)

    def __post_init__(self) -> None:
        if not self.top_k or len(self.top_k) != len(self.top_p):
            raise ValueError(f"top_k and top_p need one number per pass each, got {self.top_k} and {self.top_p}")
        if min(self.top_k) < 1 or not all(0 <= p <= 1 for p in self.top_p) or self.guidance < 0:
            raise ValueError("top_k must be at least 1, top_p in 0..1 and guidance at least 0")

    @classmethod
    def greedy(cls, passes: int = 1, guidance: float = 0.0) -> Self:
        """Always the likeliest code."""
        return cls(guidance=guidance, top_k=(1,) * passes, top_p=(0.0,) * passes)


@torch.no_grad()
def generate_codes(
    model: NextScaleGenerator,
    quantizer: MultiScaleQuantizer,
    prompt: Prompt,
    *,
    unconditional: Prompt | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    passes: Callable[[NextScaleGenerator, MultiScaleQuantizer, Prompt], Passes] = CachedPasses,
) -> Tensor:
    """Draw the codes of pictures.

    Args:
        model: The generator, in eval mode.
        quantizer: Of the tokenizer that decodes the codes; its scales and codes must be the model's.
        prompt: B prompts, from `model.pad`; by the release's habit each ends with the ids of "<img>".
        unconditional: What guidance leads away from: B prompts of nothing (as in training) or of unwanted things.
        sampling: Guidance, passes and filters.
        generator: Source of randomness.
        passes: How passes are computed; `RecomputedPasses` does without a cache, for comparison.

    Returns:
        int64, shape (B, N); `tokenizer.decode` makes pictures of it.

    Raises:
        ValueError: Guidance without unconditional prompts, or another tokenizer's quantiser.
    """
    config = model.config
    own = (quantizer.config.scales, quantizer.config.codes, quantizer.config.dim)
    if own != (config.scales, config.codes, config.feature_dim):
        raise ValueError(
            f"the model was made for scales {config.scales} and {config.codes} codes of {config.feature_dim} channels, "
            f"the quantizer has {own[0]} and {own[1]} of {own[2]}"
        )
    if sampling.guidance > 0 and unconditional is None:
        raise ValueError("guidance needs unconditional prompts; give them or set guidance to 0")
    both = prompt if sampling.guidance == 0 or unconditional is None else stack(model, prompt, unconditional)
    run = passes(model, quantizer, both)
    codes = torch.zeros(len(prompt.ids), 0, dtype=torch.int64, device=model.device)
    last = max(len(config.scales) - 1, 1)
    for scale in range(len(config.scales)):
        strength = sampling.guidance * scale / last
        fresh = codes
        for number in range(1 if scale == 0 else len(sampling.top_k)):
            states = run.states(fresh.repeat(len(both.ids) // len(fresh), 1), refine=number > 0)
            states = _guided(states, len(codes), strength)
            if sampling.top_k[number] == 1:
                drawn = model.likeliest_codes(states)
            else:
                k, p = sampling.top_k[number], sampling.top_p[number]
                drawn = draw(model.code_logits(states), top_k=k, top_p=p, generator=generator)
            fresh = torch.cat([codes, drawn], dim=1)
        codes = fresh
    return codes


def draw(logits: Tensor, *, top_k: int, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one code per place: (B, n, K) to int64 (B, n).

    The `top_k` likeliest are kept, then of these the fewest that hold a mass of `top_p` (0 keeps all).
    """
    values, places = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    shares = values.softmax(-1)
    if top_p > 0:
        before = shares.cumsum(-1) - shares
        shares = shares.masked_fill(before >= top_p, 0)
    picked = torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(*shares.shape[:2], 1)
    return places.gather(-1, picked)[..., 0]


def _guided(states: Tensor, count: int, strength: float) -> Tensor:
    """Guidance on the states: logits are linear in them, so this is guidance on the logits at half the products."""
    if len(states) == count:
        return states
    wanted, unwanted = states.chunk(2)
    return (1 + strength) * wanted - strength * unwanted


def stack(model: NextScaleGenerator, prompt: Prompt, unconditional: Prompt) -> Prompt:
    """Wanted prompts and then what guidance leads away from, as one batch of one length."""
    if len(prompt.ids) != len(unconditional.ids):
        raise ValueError(f"{len(prompt.ids)} prompts need as many unconditional ones, got {len(unconditional.ids)}")
    longest = max(prompt.ids.shape[1], unconditional.ids.shape[1])
    pad = model.config.pad
    ids = torch.cat([F.pad(p.ids, (longest - p.ids.shape[1], 0), value=pad) for p in (prompt, unconditional)])
    return Prompt(ids, ids != pad)
