"""How much each visual token matters, as functions of one layer's queries, keys and values. No model code.

All functions compute in float32 whatever comes in. `valid` marks real tokens in rows padded to one length; None means
that all are real. Sources are named per function; "FlowCut" is arXiv 2505.19536 with TungChintao/FlowCut@a2ecd24.
"""
# Shape letters in this file: B images, H heads, S keys, N patch tokens, D head dimension.

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Relay = Literal["cls", "mean"]
Criterion = Literal["attention", "semantic", "density"]
_PIECE = 1 << 17  # numbers converted at a time: 512 KiB of float32, which stay in a core's cache


class Evidence(NamedTuple):
    """What one layer says about its patch tokens, each float32 (B, N).

    Attributes:
        attention: Attention of the relay to each token, summing to 1 over tokens.
        semantic: Value similarity to the relay, summing to 1; zeros where it was not asked for.
        density: L1 norm of the head-mean value vector.
    """

    attention: Tensor
    semantic: Tensor
    density: Tensor


def relay_row(query: Tensor, key: Tensor, *, scaling: float, over: Tensor | None = None) -> Tensor:
    """Head-mean attention of one query over the keys: the only row of the attention matrix that is computed.

    Args:
        query: (B, H, D), the relay's query of each head.
        key: (B, H, S, D).
        scaling: Factor on the dot product, usually D^-0.5.
        over: bool (B, S), keys in the softmax; None takes all.

    Returns:
        (B, S), 0 outside `over`.
    """
    asked = query.float()
    logits = torch.cat([torch.einsum("bhd,bhsd->bhs", asked, piece) for piece in _in_float32(key)], dim=-1) * scaling
    if over is not None:
        logits = logits.masked_fill(~over[:, None], float("-inf"))
    return logits.softmax(-1).mean(1)


def mean_over(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over tokens of (B, H, S, D), real ones only: the relay of an encoder without a CLS token."""
    if valid is None:
        return tokens.mean(2, dtype=torch.float32)
    weight = valid[:, None, :, None].float()
    return (tokens.float() * weight).sum(2) / weight.sum(2)


def token_density(value: Tensor) -> Tensor:
    """L1 norm of the head-mean value vector, (B, H, S, D) -> (B, S). Mean over heads first; not divided by D."""
    return torch.cat([piece.mean(1).abs().sum(-1) for piece in _in_float32(value)], dim=-1)


def _in_float32(tokens: Tensor) -> Iterator[Tensor]:
    """(B, H, S, D) as float32 in pieces along S that stay in a core's cache; whole where nothing must be converted."""
    if tokens.dtype == torch.float32:
        yield tokens
        return
    batch, heads, _, width = tokens.shape
    yield from (piece.float() for piece in tokens.split(max(1, _PIECE // (batch * heads * width)), dim=2))


def evidence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    relay: Relay = "cls",
    softmax: Literal["with_cls", "patch_only"] = "with_cls",
    semantic_scale: Literal["none", "sqrt_d"] = "none",
    semantic: bool = True,
    prefix: int | None = None,
    valid: Tensor | None = None,
) -> Evidence:
    """Evidence of one encoder layer, from its own q, k and v.

    Args:
        query, key, value: (B, H, S, D), S = prefix + N.
        scaling: The layer's factor on q.k.
        relay: `cls` asks token 0, `mean` the mean query and mean value of all patch tokens.
        softmax: Whether CLS takes part in the softmax before it is cut off (the code) or not (the paper).
        semantic_scale: Factor of v.v: none (the code, for CLIP) or D^-0.5 (the paper's listing).
        semantic: False leaves the term out and costs nothing.
        prefix: Tokens before the patches (CLS, registers); None is 1 with `relay="cls"`, else 0.
        valid: bool (B, N), real patch tokens.

    Source: FlowCut eq. 1-4 and the released `compute_score`; the mean relay is the paper's rule without CLS.
    """
    own = (1 if relay == "cls" else 0) if prefix is None else prefix
    over = None if valid is None else torch.nn.functional.pad(valid, (own, 0), value=True)
    if softmax == "patch_only" and own:
        patches = torch.arange(key.shape[2], device=key.device) >= own
        over = patches.expand(key.shape[0], -1) if over is None else over & patches
    asker = query[:, :, 0] if relay == "cls" else mean_over(query[:, :, own:], valid)
    attention = relay_row(asker, key, scaling=scaling, over=over)[:, own:]
    density = token_density(value[:, :, own:])
    if semantic:
        asker = value[:, :, 0] if relay == "cls" else mean_over(value[:, :, own:], valid)
        factor = 1.0 if semantic_scale == "none" else value.shape[-1] ** -0.5
        similarity = normalised(relay_row(asker, value, scaling=factor, over=over)[:, own:])
    else:
        similarity = torch.zeros_like(attention)
    return Evidence(normalised(attention), similarity, density)


def normalised(row: Tensor) -> Tensor:
    """Scale (B, N) to sum 1 over N; a row of zeros, where CLS took all of the softmax, becomes uniform."""
    total = row.sum(-1, keepdim=True)
    return torch.where(total > 0, row / total, 1 / row.shape[-1])


def fused_score(found: Evidence, criteria: tuple[Criterion, ...] = ("attention", "semantic", "density")) -> Tensor:
    """`(attention + semantic) * density`, (B, N), with the criteria left out that are not named.

    Source: FlowCut eq. 5; leaving criteria out is its ablation.
    """
    terms = [getattr(found, name) for name in ("attention", "semantic") if name in criteria]
    strength = sum(terms[1:], terms[0]) if terms else torch.ones_like(found.density)
    return strength * found.density if "density" in criteria else strength


def entropy_ratio(p: Tensor, valid: Tensor | None = None) -> Tensor:
    """Entropy of each row of (B, N) over the largest possible: 1 for uniform, 0 for one-hot. Zeros are allowed.

    Source: FlowCut eq. 3; computed by `entr`, which is 0 at 0, where the released code takes the log of 0.
    """
    p = p.float() if valid is None else p.float().masked_fill(~valid, 0.0)
    count = torch.full_like(p[:, 0], p.shape[1]) if valid is None else valid.sum(1).to(p.dtype)
    return torch.special.entr(p).sum(-1) / count.log().clamp(min=torch.finfo(p.dtype).tiny)


def cut_size(count: Tensor, target: int, remaining: int, ratio: Tensor) -> Tensor:
    """How many tokens to drop now, int64 (B,): more when attention is concentrated and when little depth remains.

    `round((N - T) / sqrt(r) * (1 - ratio^2))`, half to even, or everything down to the target when `r` is 0.

    Args:
        count: Present tokens N of each image, int64 (B,).
        target: Tokens T wanted in the end.
        remaining: Layers r left until the last cut.
        ratio: Entropy ratio (B,).

    Source: FlowCut eq. 3. `r` counts layers, not cuts.
    """
    surplus = (count - target).clamp(min=0)
    if remaining == 0:
        return surplus
    wanted = torch.round(surplus.float() / remaining**0.5 * (1 - ratio.float() ** 2)).long()
    return wanted.clamp(min=0).minimum(surplus)


def smoothed(history: Tensor | None, current: Tensor, share: float) -> Tensor:
    """`(1 - share) * current + share * history`; the first layer has no history."""
    return current if history is None else (1 - share) * current + share * history


def best(scores: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Indices of the `count` largest scores per row, ascending, int64 (B, count).

    Ties go to the lower index, on every device alike, which a bare top-k does not promise.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
