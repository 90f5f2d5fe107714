"""Sampling of a next-scale generator: guidance that grows with the scale, refinement passes, and a key/value cache.

The released code computes the whole sequence anew in every pass. Here each scale is computed once against a cache;
passes that refine a scale run on a fork of the cache from before that scale, so what later scales see stays the same.
"""
# Shape letters: B prompts, K codes of the codebook, N codes of all scales, n codes of a scale.

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from headrace.nn.quantizers.multi_scale import MultiScaleQuantizer
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.next_scale import NextScaleGenerator, Prompt, positions_of


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
    cached: bool = True,
) -> Tensor:
    """Draw the codes of pictures.

    Args:
        model: The generator, in eval mode.
        quantizer: Of the tokenizer that decodes the codes; its scales and codes must be the model's.
        prompt: B prompts, from `model.pad`; by the release's habit each ends with the ids of "<img>".
        unconditional: What guidance leads away from: B prompts of nothing (as in training) or of unwanted things.
        sampling: Guidance, passes and filters.
        generator: Source of randomness.
        cached: False computes everything anew in each pass, as the released code does; for comparison.

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
    both = prompt if sampling.guidance == 0 or unconditional is None else _stack(model, prompt, unconditional)
    passes = _Cached(model, both) if cached else _Anew(model, both)
    codes = torch.zeros(len(prompt.ids), 0, dtype=torch.int64, device=model.device)
    last = max(len(config.scales) - 1, 1)
    for scale in range(len(config.scales)):
        strength = sampling.guidance * scale / last
        fresh = codes
        for number in range(1 if scale == 0 else len(sampling.top_k)):
            rows = None
            if scale > 0:
                rows = quantizer.next_scale_inputs(fresh, refine=number > 0)
                rows = rows.repeat(len(both.ids) // len(rows), 1, 1)
            logits = _guided(passes.logits(scale, rows, refine=number > 0), len(codes), strength)
            drawn = draw(logits, top_k=sampling.top_k[number], top_p=sampling.top_p[number], generator=generator)
            fresh = torch.cat([codes, drawn], dim=1)
        codes = fresh
    return codes


def draw(logits: Tensor, *, top_k: int, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one code per place: (B, n, K) to int64 (B, n).

    The `top_k` likeliest are kept, then of these the fewest that hold a mass of `top_p` (0 keeps all).
    """
    if top_k == 1:
        return logits.argmax(-1)
    values, places = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    shares = values.softmax(-1)
    if top_p > 0:
        before = shares.cumsum(-1) - shares
        shares = shares.masked_fill(before >= top_p, 0)
    picked = torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(*shares.shape[:2], 1)
    return places.gather(-1, picked)[..., 0]


def _guided(logits: Tensor, count: int, strength: float) -> Tensor:
    if len(logits) == count:
        return logits
    wanted, unwanted = logits.chunk(2)
    return (1 + strength) * wanted - strength * unwanted


def _stack(model: NextScaleGenerator, prompt: Prompt, unconditional: Prompt) -> Prompt:
    if len(prompt.ids) != len(unconditional.ids):
        raise ValueError(f"{len(prompt.ids)} prompts need as many unconditional ones, got {len(unconditional.ids)}")
    rows = [row[keep].tolist() for p in (prompt, unconditional) for row, keep in zip(p.ids, p.real, strict=True)]
    return model.pad(rows)


class _Anew:
    """Every pass over the whole sequence."""

    def __init__(self, model: NextScaleGenerator, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt

    def logits(self, scale: int, rows: Tensor | None, *, refine: bool) -> Tensor:
        if rows is None:
            rows = torch.zeros(len(self.prompt.ids), 0, self.model.config.feature_dim, device=self.model.device)
        return self.model.image_logits(self.prompt, rows)[:, -self.model.config.counts[scale] :]


class _Cached:
    """Every pass over the places of one scale only."""

    def __init__(self, model: NextScaleGenerator, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt
        self.length = prompt.ids.shape[1]
        self.cache = KVCache()
        self.before = self.cache
        self.positions = positions_of(prompt.real, sum(model.config.counts))

    def logits(self, scale: int, rows: Tensor | None, *, refine: bool) -> Tensor:
        model = self.model
        if rows is None:
            embeds = model.embed_prompt(self.prompt)
            mask = model.mask(self.prompt.real, 0)
            hidden = model.hidden(embeds, mask, self.positions[:, : self.length], self.cache)
            return model.code_logits(hidden[:, -1:])
        count = model.config.counts[scale]
        start = sum(model.config.counts[:scale])
        if refine:
            cache = self.before.fork()
        else:
            self.before = self.cache.fork()
            cache = self.cache
        seen = torch.nn.functional.pad(self.prompt.real, (0, cache.length + count - self.length), value=True)
        first = self.length - 1 + start
        hidden = model.hidden(
            model.embed_rows(rows[:, -count:], start=start),
            seen[:, None].expand(-1, count, -1),
            self.positions[:, first : first + count],
            cache,
        )
        return model.code_logits(hidden)
