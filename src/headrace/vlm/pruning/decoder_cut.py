"""One cut of visual tokens inside a language model while it reads a prompt.

After the chosen block the hidden states continue without the dropped tokens. The cache of earlier blocks is cut alike,
so all blocks hold the same entries; rotary positions stay those of the whole prompt. FlowCut's released code
keeps the whole cache in the first two blocks and, for LLaVA-NeXT, renumbers positions after the cut.
"""
# Shape letters in this file: B rows (1), H heads, S prompt length, V visual tokens, D head dimension.

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headrace.vlm.kv_cache import KVCache
from headrace.vlm.pruning.observe import Qkv, observed_attention
from headrace.vlm.pruning.peers import fastv_scores
from headrace.vlm.pruning.scores import best, normalised, relay_row, token_density

Scorer = Callable[[Qkv, Tensor], Tensor]  # q, k, v with equal heads, places of visual tokens -> (B, V)


def flowcut_prompt_scores(seen: Qkv, visual: Tensor) -> Tensor:
    """FlowCut's score with the prompt's last token as relay, softmax over visual tokens only, (B, V).

    Source: FlowCut's language-model stage, TungChintao/FlowCut@a2ecd24.
    """
    key, value = seen.key[:, :, visual], seen.value[:, :, visual]
    attention = relay_row(seen.query[:, :, -1], key, scaling=seen.scaling)
    semantic = relay_row(seen.value[:, :, -1], value, scaling=value.shape[-1] ** -0.5)
    return (normalised(attention) + normalised(semantic)) * token_density(value)


def fastv_prompt_scores(seen: Qkv, visual: Tensor) -> Tensor:
    """FastV's score: attention of the prompt's last token, (B, V)."""
    return fastv_scores(seen.query[:, :, -1], seen.key, visual, scaling=seen.scaling)


def find_decoder(model: Any) -> Any:
    """The text decoder of a language or vision-language model.

    Raises:
        ValueError: None with a list of blocks.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder blocks that pruning could follow")
    return decoder


class DecoderCut:
    """State of one cut; `kept` are the prompt positions that stay, int64 (S',), None before the block ran."""

    def __init__(self, layer: int, visual: Tensor, keep: int, scorer: Scorer) -> None:
        self.layer, self.visual, self.keep, self.scorer = layer, visual, keep, scorer
        self.length = 0
        self.kept: Tensor | None = None

    def observe(self, seen: Qkv) -> None:
        """Score and choose, from the block's own q, k and v."""
        if seen.query.shape[0] != 1:
            raise ValueError("the cut inside the language model reads one prompt at a time")
        self.length = seen.query.shape[2]
        groups = seen.query.shape[1] // seen.key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (seen.key, seen.value))
        scores = self.scorer(Qkv(seen.query, key, value, seen.scaling), self.visual)
        stays = torch.ones(self.length, dtype=torch.bool, device=scores.device)
        stays[self.visual] = False
        stays[self.visual[best(scores, self.keep)[0]]] = True
        self.kept = stays.nonzero()[:, 0]

    def after(self, _: nn.Module, __: tuple, output: Any) -> Any:
        """Hook after the block: shorten its output."""
        hidden = output[0] if isinstance(output, tuple) else output
        assert self.kept is not None
        shorter = hidden[:, self.kept]
        return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

    def before(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook before later blocks: what comes per position is shortened alike."""
        return args, {name: self._shortened(value) for name, value in kwargs.items()}

    def _shortened(self, value: Any) -> Any:
        """Rotary tables (..., S, D), positions (..., S) and masks (B, 1, S, S) at the kept positions."""
        if isinstance(value, tuple):
            return tuple(self._shortened(item) for item in value)
        if not isinstance(value, Tensor) or self.kept is None:
            return value
        if value.ndim == 4 and value.shape[-2:] == (self.length, self.length):
            return value[..., self.kept, :][..., self.kept]
        if value.ndim >= 3 and value.shape[-2] == self.length:
            return value[..., self.kept, :]
        return value[..., self.kept] if value.shape[-1] == self.length else value


@contextmanager
def cut_decoder(
    model: Any, cache: KVCache, visual: Tensor, *, layer: int, keep: int, scorer: Scorer
) -> Iterator[DecoderCut | None]:
    """Let the decoder drop visual tokens while it reads one prompt into an empty cache.

    Args:
        model: Language or vision-language model.
        cache: Filled by the pass; holds the kept positions only when the context closes.
        visual: bool (S,), visual positions of the prompt.
        layer: Index of the block after which tokens go.
        keep: Visual tokens to keep; with as many as there are, nothing happens.
        scorer: Ranks them.

    Yields:
        The cut, None when nothing is to be cut.

    Raises:
        ValueError: No such block, or the model is being pruned already.
    """
    places = visual.nonzero()[:, 0]
    if len(places) <= keep:
        yield None
        return
    decoder = find_decoder(model)
    if not 0 <= layer < len(decoder.layers) - 1:
        raise ValueError(f"decoder_layer must lie in 0..{len(decoder.layers) - 2} for this model, got {layer}")
    cut = DecoderCut(layer, places, keep, scorer)
    with ExitStack() as stack:
        stack.enter_context(observed_attention(decoder, {decoder.layers[layer].self_attn: cut.observe}))
        stack.enter_context(decoder.layers[layer].register_forward_hook(cut.after, prepend=True))
        for block in decoder.layers[layer + 1 :]:
            stack.enter_context(block.register_forward_pre_hook(cut.before, with_kwargs=True))
        yield cut
    if cut.kept is not None:
        cache.keep(cut.kept, layers=range(layer + 1))
