"""Pruning on the way from pictures to answers: the encoder's part, the decoder's part, and what to record."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import GreedyConfig, greedy, greedy_each
from headrace.vlm.prompt import Prompt
from headrace.vlm.pruning.auto import PruningConfig, encoder_policy
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.decoder_cut import cut_decoder, fastv_prompt_scores, flowcut_prompt_scores
from headrace.vlm.pruning.encoder_cut import EncoderCut, cut_encoder
from headrace.vlm.pruning.flowcut import FlowCutConfig
from headrace.vlm.pruning.peer_policies import FastVConfig
from headrace.vlm.pruning.towers import Tower, find_tower


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """What one call of `answer` encoded.

    Attributes:
        visual_before, visual_after: Visual tokens of the prompt without and with the encoder's pruning.
        pictures: Pictures (crops, frames) that the encoder saw.
        kept: One list per picture (crop, frame) that the encoder saw: units that stayed, in raster order; empty without
            pruning in the encoder.
        units: Units per picture before.
        grids: Columns and rows of each picture's units, None where they are not known.
        encode_seconds: Time of the encoder and projector [s].
    """

    visual_before: int = 0
    visual_after: int = 0
    pictures: int = 0
    kept: list[list[int]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    encode_seconds: float = 0.0


def prunes_encoder(pruning: PruningConfig | None) -> bool:
    """Whether a method acts inside the vision encoder; FastV acts in the language model alone."""
    return pruning is not None and not isinstance(pruning, FastVConfig)


@contextmanager
def marked_pruning(
    model: Any, pruning: PruningConfig | None, *, tower: Tower | None = None, video: bool = False
) -> Iterator[EncoderCut | None]:
    """Run the encoder under `pruning`, with NaN rows where tokens were dropped; None where it is left alone."""
    if pruning is None or not prunes_encoder(pruning):
        yield None
        return
    found = tower or find_tower(model, video=video)
    policy = encoder_policy(pruning, found)
    assert policy is not None
    with cut_encoder(found, policy, mark=True) as cut:
        yield cut


def decoder_keep(pruning: PruningConfig | None, record: AnswerRecord) -> int | None:
    """Visual tokens of the prompt that the language model keeps; None where the method does not cut there.

    FlowCut's budget counts over the whole prompt there, FastV's per picture (crop, frame), as with all methods that
    cut once.
    """
    if isinstance(pruning, FlowCutConfig) and pruning.decoder:
        return pruning.budget.of(record.visual_before)
    if isinstance(pruning, FastVConfig):
        tokens = pruning.budget.tokens
        budget = pruning.budget if tokens is None else Budget(tokens=tokens * max(1, record.pictures))
        return budget.of(record.visual_before)
    return None


def tokens_kept(pruning: PruningConfig | None, record: AnswerRecord) -> int:
    """Visual tokens of the prompt that are left when all of `pruning` is done."""
    keep = decoder_keep(pruning, record)
    return record.visual_after if keep is None else min(record.visual_after, keep)


def decoder_reading(
    model: Any, pruning: PruningConfig | None, record: AnswerRecord
) -> Callable[[Prompt, KVCache], AbstractContextManager] | None:
    """The decoder's part of `pruning`: a context in which a prompt is read; None where it has none.

    Args:
        model: Language or vision-language model.
        record: Of the prompt's encoding; budgets refer to what was there before any pruning.
    """
    keep = decoder_keep(pruning, record)
    if keep is None:
        return None
    assert isinstance(pruning, FlowCutConfig | FastVConfig)
    layer = pruning.decoder_layer
    scorer = fastv_prompt_scores if isinstance(pruning, FastVConfig) else flowcut_prompt_scores
    return lambda prompt, cache: cut_decoder(model, cache, prompt.visual, layer=layer, keep=keep, scorer=scorer)


def pruned_greedy(
    model: nn.Module,
    embed: nn.Module,
    prompts: Sequence[Prompt],
    config: GreedyConfig,
    pruning: PruningConfig | None,
    record: AnswerRecord,
) -> list[list[int]]:
    """Greedy answers, with the decoder's part of `pruning` where it has one; `record` is the prompts' own."""
    reading = decoder_reading(model, pruning, record)
    if reading is None:
        return greedy(model, embed, prompts, config)
    return greedy_each(model, embed, prompts, config, reading)
