"""Text to image with a language model that predicts all codes of a scale at once, scale after scale.

Source: TokenFlow (arXiv 2412.03069) and its repository.

The language model is transformers' Llama with two changes of the release: each sub-layer's output is normalised instead
of its input, and queries and keys are normalised per head before the rotation. Codes are extra rows of the vocabulary;
what the model reads at a scale's places are not codes but features of the scales before, interpolated to that scale.
How captions become prompts is `headrace.vlm.next_scale_prompts`.
"""
# Shape letters: B prompts, P positions of the prompt, N codes of all scales, M feature rows, D feature width, W width.

import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from headrace.nn.quantizers.joint_search import largest_products
from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from headrace.nn.shapes import expect_shape
from headrace.tokenizers.base import check_codes
from headrace.vlm.text_tokenizer import WithTextTokenizer

HEAD_NORM_EPS = 1e-6
# What a language model must agree on with the generator that takes its weights.
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
)


@dataclass(frozen=True, kw_only=True)
class NextScaleConfig:
    """Sizes of the generator.

    Attributes:
        scales, codes, feature_dim: Of the tokenizer, whose `quantizer` gives the features.
        text_vocab: Ids of the text tokenizer; code k is id `text_vocab + k` and the pad comes after all codes.
        end: Text ids after the image that training also predicts, such as those of "</img>" and the end of sequence.
        width, depth, heads, hidden: Of the transformer.
        kv_heads: Heads of keys and values, when several query heads share them; None for as many as `heads`.
        max_positions: Longest sequence that the rotation is meant for.
        theta, eps: Base of the rotation and epsilon of the norms.
    """

    scales: tuple[int, ...]
    codes: int = 32768
    feature_dim: int = 40
    text_vocab: int = 32000
    end: tuple[int, ...] = ()
    width: int = 4096
    depth: int = 32
    heads: int = 32
    hidden: int = 11008
    kv_heads: int | None = None
    max_positions: int = 4096
    theta: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not self.scales or self.scales[0] != 1:
            raise ValueError(f"scales must begin with 1, because text alone predicts it; got {self.scales}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if any(not 0 <= token < self.text_vocab for token in self.end):
            raise ValueError(f"end must be text ids below {self.text_vocab}, got {self.end}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Codes per scale."""
        return tuple(side * side for side in self.scales)

    @property
    def pad(self) -> int:
        """Id that fills shorter prompts on the left."""
        return self.text_vocab + self.codes

    @classmethod
    def llama2_7b(cls) -> Self:
        """The published generator: Llama-2 7B, TokenFlow-B at 256 px, 817 codes."""
        return cls(scales=(1, 2, 4, 6, 8, 10, 12, 14, 16))

    @classmethod
    def tiny(cls) -> Self:
        """For `TokenFlowConfig.tiny()`."""
        sizes = {"width": 128, "depth": 4, "heads": 4, "hidden": 256, "max_positions": 256}
        return cls(scales=(1, 2, 3, 4), codes=256, feature_dim=24, text_vocab=64, end=(1,), **sizes)

    @classmethod
    def around(cls, language: LlamaConfig, quantizer: MultiScaleConfig, *, end: tuple[int, ...]) -> Self:
        """The sizes for `NextScaleGenerator.from_language_model`.

        Args:
            language: Configuration of the language model.
            quantizer: Of the tokenizer.
            end: Text ids after the image, see `headrace.vlm.next_scale_prompts.end_ids`.
        """
        rope: dict[str, Any] = language.to_dict().get("rope_parameters") or {}
        return cls(
            scales=quantizer.scales,
            codes=quantizer.codes,
            feature_dim=quantizer.dim,
            text_vocab=language.vocab_size,
            end=end,
            width=language.hidden_size,
            depth=language.num_hidden_layers,
            heads=language.num_attention_heads,
            kv_heads=language.num_key_value_heads,
            hidden=language.intermediate_size,
            max_positions=language.max_position_embeddings,
            theta=rope.get("rope_theta", cls.theta),
            eps=language.rms_norm_eps,
        )

    def language_model(self) -> LlamaConfig:
        """The transformers configuration."""
        shape: dict[str, Any] = {  # transformers makes this constructor at run time; its declared one has no such names
            "vocab_size": self.pad + 1,
            "pad_token_id": self.pad,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "rms_norm_eps": self.eps,
            "attn_implementation": "sdpa",
        }
        return LlamaConfig(**shape)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head's part, with one weight for all heads."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=HEAD_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., heads * head_dim), same shape back."""
        return self.norm(x.unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


class PostNormLayer(LlamaDecoderLayer):
    """A Llama layer whose norms act on the outputs of attention and feed-forward, with normalised queries and keys."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        attention = self.self_attn
        for name in ("q_proj", "k_proj"):
            setattr(attention, name, nn.Sequential(getattr(attention, name), HeadNorm(attention.head_dim)))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `LlamaDecoderLayer.forward`; transformers passes its keywords on to the attention."""
        attended, _ = self.self_attn(hidden_states, *args, **kwargs)
        hidden_states = hidden_states + self.input_layernorm(attended)
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class NextScaleLoss(NamedTuple):
    """Cross entropies, means over their positions.

    Attributes:
        total: Over codes and end ids together.
        codes: Over codes alone.
    """

    total: Tensor
    codes: Tensor


class Prompt(NamedTuple):
    """Prompts of one length.

    Attributes:
        ids: int64, shape (B, P), filled with the pad id on the left.
        real: bool, shape (B, P), False at fillings.
    """

    ids: Tensor
    real: Tensor


class NextScaleGenerator(WithTextTokenizer):
    """Predicts the codes of a TokenFlow-like tokenizer from text."""

    Config = NextScaleConfig

    owner: Tensor

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__(config)
        inner = config.language_model()
        self.language = LlamaForCausalLM(inner)
        self.language.model.layers = nn.ModuleList(PostNormLayer(inner, i) for i in range(config.depth))
        self.projector = nn.Sequential(
            nn.Linear(config.feature_dim, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.level = nn.Embedding(len(config.scales) + 1, config.width)  # row 0 is text
        self.place = nn.Parameter(torch.empty(sum(config.counts), config.width))
        for table in (self.level.weight, self.place):
            nn.init.trunc_normal_(table, std=(1 / (3 * config.width)) ** 0.5)
        for layer in self.language.model.layers:
            layer.apply(self.language._init_weights)
        owner = [scale for scale, count in enumerate(config.counts) for _ in range(count)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)

    @classmethod
    def from_language_model(cls, source: str | os.PathLike[str] | PreTrainedModel, config: NextScaleConfig) -> Self:
        """Start from a trained Llama, as the release does: its weights, and drawn ones for all that it does not have.

        Rows of codes and pad, the norms of the heads, the projector and the tables of levels and places are as a new
        generator's. The norms before its sub-layers become the norms after them.

        Args:
            source: Folder or Hub id of the language model, or the model.
            config: Sizes, see `NextScaleConfig.around`.

        Raises:
            ValueError: No Llama, or one of other sizes than `config`; each is named.
        """
        language: Any = source if isinstance(source, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(source)
        if not isinstance(language, LlamaForCausalLM):
            raise ValueError(f"the generator is built on Llama, got a {type(language).__name__}")
        given, wanted = language.config.to_dict(), config.language_model().to_dict()
        other = [f"{name} {given[name]} for {wanted[name]}" for name in SHAPE if given[name] != wanted[name]]
        if given["vocab_size"] != config.text_vocab:
            other.append(f"vocab_size {given['vocab_size']} for text_vocab {config.text_vocab}")
        if other:
            raise ValueError(f"the language model does not fit the generator: {'; '.join(other)}")
        model = cls(config)
        own = model.language.state_dict()
        with torch.no_grad():
            for name, value in language.state_dict().items():
                name = name.replace("q_proj.", "q_proj.0.").replace("k_proj.", "k_proj.0.")
                own[name][: len(value)].copy_(value)  # tables have more rows here, all else is equally long
        return model

    def pad(self, prompts: list[list[int]]) -> Prompt:
        """Prompts of different lengths as one batch, filled on the left.

        Raises:
            ValueError: An empty prompt, or an id that is no text id.
        """
        longest = max((len(prompt) for prompt in prompts), default=0)
        for prompt in prompts:
            if not prompt or any(not 0 <= token < self.config.text_vocab for token in prompt):
                raise ValueError(f"a prompt must be one or more ids in 0..{self.config.text_vocab - 1}, got {prompt}")
        ids = torch.full((len(prompts), longest), self.config.pad)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt)
        ids = ids.to(self.device)
        return Prompt(ids, ids != self.config.pad)

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """Inputs of the prompt's positions, (B, P, W); the last also carries the place of the first code."""
        text = self.language.model.embed_tokens(prompt.ids) + self.level.weight[0]
        return torch.cat([text[:, :-1], text[:, -1:] + self.place[0]], dim=1)

    def embed_rows(self, rows: Tensor, *, start: int) -> Tensor:
        """Inputs of places `start`, start + 1, ... (counted in codes) from feature rows (B, M, D), (B, M, W)."""
        stop = start + rows.shape[1]
        return self._project(rows) + self.level(self.owner[start:stop] + 1) + self.place[start:stop]

    def _project(self, rows: Tensor) -> Tensor:
        return self.projector(rows.to(self.projector[0].get_parameter("weight").dtype))

    def hidden(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: object = None) -> Tensor:
        """Last states of the transformer.

        Args:
            embeds: Shape (B, Q, W).
            mask: bool, True where a query may look, shape (B, Q, keys).
            positions: int64, shape (B, Q).
            cache: A `KVCache` that holds the keys before these, and takes theirs.
        """
        out = self.language.model(
            inputs_embeds=embeds,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits over codes only, (..., W) to (..., codes); text ids are never sampled."""
        first = self.config.text_vocab
        return F.linear(hidden, self.language.lm_head.weight[first : first + self.config.codes])

    def likeliest_codes(self, hidden: Tensor) -> Tensor:
        """The code with the largest logit, (..., W) to int64 (...); the logits are never all in memory."""
        first = self.config.text_vocab
        rows = self.language.lm_head.weight[first : first + self.config.codes]
        return largest_products(hidden.flatten(0, -2), rows).view(hidden.shape[:-1])

    def image_logits(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """Logits of the first 1 + M codes in one pass over prompt and feature rows, without a cache.

        Args:
            prompt: From `pad`.
            rows: Features of the places after the first scale, shape (B, M, D), M up to N - 1.

        Returns:
            Shape (B, 1 + M, codes).
        """
        return self.code_logits(self.image_states(prompt, rows))

    def image_states(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """The last states that `image_logits` reads the logits from, shape (B, 1 + M, W)."""
        expect_shape("rows", rows, (len(prompt.ids), None, self.config.feature_dim))
        embeds = torch.cat([self.embed_prompt(prompt), self.embed_rows(rows, start=1)], dim=1)
        hidden = self.hidden(embeds, self.mask(prompt.real, rows.shape[1]), positions_of(prompt.real, rows.shape[1]))
        return hidden[:, prompt.ids.shape[1] - 1 :]

    def mask(self, real: Tensor, rows: int, tail: int = 0) -> Tensor:
        """Who may look at whom: causal, but in both directions inside a scale, and never at fillings.

        Args:
            real: bool, shape (B, P).
            rows: Number of feature rows after the prompt.
            tail: Number of causal positions after those.

        Returns:
            bool, shape (B, P + rows + tail, P + rows + tail).
        """
        scale = self.owner[1 : 1 + rows]
        length = real.shape[1]
        total = length + rows + tail
        seen = torch.ones(total, total, dtype=torch.bool, device=real.device).tril()
        seen[length : length + rows, length : length + rows] |= scale[:, None] == scale[None]
        shown = F.pad(real, (0, rows + tail), value=True)
        itself = torch.eye(total, dtype=torch.bool, device=real.device)  # a filling sees itself: no empty softmax
        return (seen & shown[:, None, :]) | itself

    def loss(self, prompt: Prompt, codes: Tensor, quantizer: MultiScaleQuantizer) -> NextScaleLoss:
        """Cross entropy of the codes and of the end ids, teacher-forced in one pass; text is not predicted.

        Args:
            prompt: From `pad`.
            codes: int64, shape (B, N), all scales.
            quantizer: Of the tokenizer that made the codes.

        Raises:
            ValueError: Not the codes of all scales for each prompt, or a code outside the codebook.
        """
        config, length = self.config, prompt.ids.shape[1]
        check_codes(codes, size=config.codes)
        expect_shape("codes", codes, (len(prompt.ids), sum(config.counts)))
        with torch.no_grad():
            rows = quantizer.next_scale_inputs(codes)
        end = codes.new_tensor(config.end).expand(len(codes), -1)
        parts = [self.embed_prompt(prompt), self.embed_rows(rows, start=1)]
        if config.end:
            # The last code's position reads a feature of zeros and predicts the first end id.
            stop = self._project(rows.new_zeros(len(codes), 1, config.feature_dim)) + self.level.weight[-1]
            tail = self.language.model.embed_tokens(end[:, :-1]) + self.level.weight[0]
            parts += [stop, tail]
        embeds = torch.cat(parts, dim=1)
        extra = embeds.shape[1] - length - rows.shape[1]
        mask = self.mask(prompt.real, rows.shape[1], extra)
        hidden = self.hidden(embeds, mask, positions_of(prompt.real, rows.shape[1] + extra))
        logits = self.language.lm_head(hidden[:, length - 1 :]).float().transpose(1, 2)
        each = F.cross_entropy(logits, torch.cat([codes + config.text_vocab, end], dim=1), reduction="none")
        return NextScaleLoss(each.mean(), each[:, : codes.shape[1]].mean())


def positions_of(real: Tensor, more: int) -> Tensor:
    """Positions for the rotation, counted from each prompt's first real id: bool (B, P) to int64 (B, P + more)."""
    return (F.pad(real, (0, more), value=True).long().cumsum(1) - 1).clamp(min=0)
