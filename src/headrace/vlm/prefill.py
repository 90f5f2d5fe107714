"""Reading prompts into the cache, and writing greedy continuations from it.

Works with any Hugging Face decoder or vision-language model that takes `inputs_embeds`, `position_ids`,
`attention_mask`, `past_key_values` and `logits_to_keep`. Several questions about one picture share the prefix up to
where they differ: it is read once, and its cache is forked.
"""
# Shape letters in this file: B rows, L length, V vocabulary, A position axes.

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prompt import Prompt, PromptBatch, common_prefix, left_pad


@dataclass(frozen=True, kw_only=True)
class GreedyConfig:
    """How to write.

    Attributes:
        max_new_tokens: Most tokens to write: one number for all prompts, or one per prompt.
        stop_ids: Any of these ends an answer and is not part of it.
        repetition_penalty: Divides positive and multiplies negative logits of ids seen so far; 1 is off.
        chunk: Prompt positions read per pass, None for all at once; bounds memory on long prompts.
        rows: Most prompts written together.
    """

    max_new_tokens: int | Sequence[int]
    stop_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    chunk: int | None = None
    rows: int = 16

    def __post_init__(self) -> None:
        given = self.max_new_tokens
        if any(limit < 1 for limit in ([given] if isinstance(given, int) else given)):
            raise ValueError(f"max_new_tokens must be at least 1, got {given}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def limits(self, count: int) -> list[int]:
        """Most tokens to write for each of `count` prompts.

        Raises:
            ValueError: There are limits for another number of prompts.
        """
        if isinstance(self.max_new_tokens, int):
            return [self.max_new_tokens] * count
        if len(self.max_new_tokens) != count:
            raise ValueError(f"{count} prompts need as many max_new_tokens, got {len(self.max_new_tokens)}")
        return list(self.max_new_tokens)


def read(model: nn.Module, batch: PromptBatch, cache: KVCache, *, past: Tensor, chunk: int | None = None) -> Tensor:
    """Run prompts through the decoder, filling `cache`.

    Args:
        model: Decoder or vision-language model.
        batch: What to read; its rows match the cache's.
        cache: Grows by L entries.
        past: bool (B, N), real entries already in the cache.
        chunk: Positions per pass.

    Returns:
        Logits after the last position, (B, V).
    """
    length = batch.embeds.shape[1]
    step = chunk or length
    for start in range(0, length, step):
        end = min(start + step, length)
        mask = torch.cat([past, batch.mask[:, :end]], dim=1)
        output = model(
            inputs_embeds=batch.embeds[:, start:end],
            position_ids=batch.positions[..., start:end],
            attention_mask=None if bool(mask.all()) else mask.long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return output.logits[:, -1]


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Push down ids that occurred: `logits` (B, V), `seen` int64 (B, N). Source: CTRL, arXiv 1909.05858, sec. 4.1."""
    if penalty == 1.0:
        return logits
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score < 0, score * penalty, score / penalty))


@torch.no_grad()
def write(
    model: nn.Module, embed: nn.Module, logits: Tensor, batch: PromptBatch, cache: KVCache, past: Tensor, *,
    config: GreedyConfig, seen: Tensor, limit: int,
) -> list[list[int]]:  # fmt: skip
    """Continue every row greedily until it stops.

    Args:
        model: Decoder. `embed` turns ids into its inputs.
        logits: After the prompts, (B, V).
        batch: The prompts' last part; its last positions fix where the text goes on.
        cache: Holds the prompts. `past`, bool (B, N), marks its real entries.
        seen: int64 (B, M), ids so far, for the repetition penalty.
        limit: Most tokens per row.

    Returns:
        New ids per row, without the stop id.
    """
    stops = torch.tensor(config.stop_ids, dtype=torch.int64, device=logits.device)
    position = batch.positions[..., -1:].amax(0) if batch.positions.ndim == 3 else batch.positions[..., -1:]
    written: list[Tensor] = []
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        chosen = penalised(logits.float(), seen, config.repetition_penalty).argmax(-1, keepdim=True)
        written.append(chosen)
        done |= torch.isin(chosen[:, 0], stops)
        if len(written) == limit or bool(done.all()):
            break
        seen = torch.cat([seen, chosen], dim=1)
        position = position + 1
        positions = position.expand(batch.positions.shape[0], -1, -1) if batch.positions.ndim == 3 else position
        mask = torch.ones_like(chosen, dtype=torch.bool)
        logits = read(model, PromptBatch(chosen, embed(chosen), positions, mask), cache, past=past)
        past = torch.cat([past, mask], dim=1)
    return [_until_stop(row, set(config.stop_ids)) for row in torch.cat(written, dim=1).tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)


@torch.no_grad()
def greedy(model: nn.Module, embed: nn.Module, prompts: Sequence[Prompt], config: GreedyConfig) -> list[list[int]]:
    """Greedy continuations of prompts that share a prefix, such as questions about one picture.

    The shared prefix is read once. The answers are those of reading each prompt alone. Prompts with one limit are
    written together, so that short answers do not wait for long ones.

    Returns:
        New ids per prompt, without the stop id.
    """
    limits = config.limits(len(prompts))
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    trunk = KVCache()
    if shared:
        head = left_pad([prompts[0].part(0, shared)])
        read(model, head, trunk, past=head.mask[:, :0], chunk=config.chunk)
    answers: dict[int, list[int]] = {}
    for chosen in _together(limits, config.rows):
        group = [prompts[i] for i in chosen]
        tail = left_pad([p.part(shared) for p in group])
        cache = trunk.fork(len(group))
        past = torch.ones(len(group), shared, dtype=torch.bool, device=tail.mask.device)
        logits = read(model, tail, cache, past=past, chunk=config.chunk)
        seen = torch.cat([prompts[0].ids[:shared].expand(len(group), -1), _filled(tail)], dim=1)
        past = torch.cat([past, tail.mask], dim=1)
        ids = write(model, embed, logits, tail, cache, past, config=config, seen=seen, limit=limits[chosen[0]])
        answers |= zip(chosen, ids, strict=True)
    return [answers[i] for i in range(len(prompts))]


def _together(limits: Sequence[int], rows: int) -> list[list[int]]:
    """Numbers of the prompts that are written together: one limit, at most `rows`."""
    found = []
    for limit in dict.fromkeys(limits):
        alike = [i for i, other in enumerate(limits) if other == limit]
        found += [alike[start : start + rows] for start in range(0, len(alike), rows)]
    return found


@torch.no_grad()
def greedy_each(
    model: nn.Module,
    embed: nn.Module,
    prompts: Sequence[Prompt],
    config: GreedyConfig,
    reading: Callable[[Prompt, KVCache], AbstractContextManager],
) -> list[list[int]]:
    """Greedy continuations, each prompt read whole under `reading(prompt, cache)`, which may shorten the cache.

    For methods that drop tokens inside the decoder by what the question asks, so that no prefix can be shared.

    Returns:
        New ids per prompt, without the stop id.
    """
    answers = []
    for prompt, limit in zip(prompts, config.limits(len(prompts)), strict=True):
        cache, batch = KVCache(), left_pad([prompt])
        with reading(prompt, cache):
            logits = read(model, batch, cache, past=batch.mask[:, :0])
        past = torch.ones(1, cache.length, dtype=torch.bool, device=logits.device)
        answers += write(model, embed, logits, batch, cache, past, config=config, seen=batch.ids, limit=limit)
    return answers


def _filled(batch: PromptBatch) -> Tensor:
    """Ids with each row's padding replaced by its own last id, so that padding names nothing new."""
    return torch.where(batch.mask, batch.ids, batch.ids[:, -1:])
