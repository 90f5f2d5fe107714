"""Pruning on the way from pictures to answers: the encoder's part, the decoder's part, and what to record."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import GreedyConfig, greedy, greedy_each
from headrace.vlm.prompt import Prompt
from headrace.vlm.pruning.auto import PruningConfig, encoder_policy
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
        kept: One list per picture (crop, frame) that the encoder saw: units that stayed, in raster order; empty without
            pruning in the encoder.
        units: Units per picture before.
        encode_seconds: Time of the encoder and projector [s].
    """

    visual_before: int = 0
    visual_after: int = 0
    kept: list[list[int]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
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


def pruned_greedy(
    model: nn.Module,
    embed: nn.Module,
    prompts: Sequence[Prompt],
    config: GreedyConfig,
    pruning: PruningConfig | None,
    *,
    visual_before: int,
) -> list[list[int]]:
    """Greedy answers, with the decoder's part of `pruning` where it has one.

    Args:
        visual_before: Visual tokens of a prompt before any pruning, which a budget given as a share refers to.
    """
    scorer = {FlowCutConfig: flowcut_prompt_scores, FastVConfig: fastv_prompt_scores}.get(type(pruning))
    if pruning is None or scorer is None or (isinstance(pruning, FlowCutConfig) and not pruning.decoder):
        return greedy(model, embed, prompts, config)
    assert isinstance(pruning, FlowCutConfig | FastVConfig)
    keep = pruning.budget.of(visual_before)

    def reading(prompt: Prompt, cache: KVCache):
        return cut_decoder(model, cache, prompt.visual, layer=pruning.decoder_layer, keep=keep, scorer=scorer)

    return greedy_each(model, embed, prompts, config, reading)
