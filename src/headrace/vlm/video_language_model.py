"""A language model that sees: any Hugging Face causal language model with any timm encoder or headrace tokenizer.

Text, visual and latent-action ids keep vocabularies, embedding tables and heads of their own; a sequence layout says
what stands where and what it weighs in the loss. Source of the arrangement: ViPRA (arXiv 2511.07732) sec. 3.
"""
# Shape letters in this file: B rows, L positions, D width, M pictures' rows in all, V vocabulary, S selected positions.

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.vlm.answering import AnswersPictures
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.pruning.reading import AnswerRecord
from headrace.vlm.sequence import (
    Delimiter,
    Field,
    SequenceBatch,
    SequenceLayout,
    Special,
    TokenSequence,
    Vocabulary,
)
from headrace.vlm.text_tokenizer import WithTextTokenizer
from headrace.vlm.visual_encoder import VisualEncoder, VisualEncoderConfig


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Text around pictures and question. The answer follows `after`, with a space before its first word."""

    before: str = "User: "
    picture_before: str = ""
    picture_after: str = "\n"
    after: str = "\nAssistant:"


@dataclass(frozen=True, kw_only=True)
class VideoLanguageConfig:
    """Everything that rebuilds the model.

    Attributes:
        language: Config of the Hugging Face language model, `model_type` included.
        encoder: Where visual rows come from.
        vocabularies: Id spaces beside text and `picture`, each with a table and a head, such as `visual` or `latent`.
            Codes of a discrete tokenizer get one called `visual` by themselves.
        text_specials: `bos` and `eos` of the text tokenizer, as far as it has them.
        template: Text of a question about pictures.
        train_encoder: Whether the encoder learns; else it runs without gradients, in eval mode.
    """

    language: dict[str, Any]
    encoder: VisualEncoderConfig
    vocabularies: tuple[Vocabulary, ...] = ()
    text_specials: dict[str, int] = field(default_factory=dict)
    template: PromptTemplate = field(default_factory=PromptTemplate)
    train_encoder: bool = False

    def __post_init__(self) -> None:
        if "model_type" not in self.language:
            raise ValueError("language must be a Hugging Face config with its model_type")
        taken = {v.name for v in self.vocabularies} & {"text", "picture"}
        if taken:
            raise ValueError(f"vocabularies {sorted(taken)} are built in; give the others other names")

    @classmethod
    def tiny(cls) -> Self:
        """A model of a second: 2 blocks of width 32 on 16 patches."""
        language = {
            "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
        vit = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
        encoder = VisualEncoderConfig(source="timm", name="vit_tiny_patch16_224", arguments=vit, size=32)
        return cls(language=language, encoder=encoder, text_specials={"bos": 1, "eos": 2})


class LanguageOutput(NamedTuple):
    """Result of a training pass.

    Attributes:
        loss: Weighted sum per sequence, averaged over the batch, ().
        by_modality: Unweighted mean cross-entropy of each scored modality.
        hidden: Final hidden states, (B, L, D).
    """

    loss: Tensor
    by_modality: dict[str, Tensor]
    hidden: Tensor


class VideoLanguageModel(AnswersPictures, WithTextTokenizer):
    """Language model, visual encoder, projector, and a table and a head per further vocabulary.

    Attributes:
        tokenizer: Text tokenizer of transformers; None until one is set or loaded.
        pruning: Method and budget for visual tokens in `answer`, None keeps all.
        record: What the last `answer` encoded and kept.
    """

    Config = VideoLanguageConfig

    def __init__(self, config: VideoLanguageConfig) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__(config)
        more = {k: v for k, v in config.language.items() if k != "model_type"}
        self.language = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.language["model_type"], **more))
        width = self.language.get_input_embeddings().embedding_dim
        self.encoder = VisualEncoder(config.encoder)
        if self.encoder.codes is None:
            self.projector = nn.Sequential(
                nn.LayerNorm(self.encoder.width),
                nn.Linear(self.encoder.width, width),
                nn.GELU(),
                nn.Linear(width, width),
            )
        self.vocabularies = self._vocabularies()
        extra = [v for v in self.vocabularies if v.name != "text" and not v.continuous]
        self.tables = nn.ModuleDict({v.name: nn.Embedding(v.size, width) for v in extra})
        self.heads = nn.ModuleDict({v.name: nn.Linear(width, v.size, bias=False) for v in extra})
        for module in (*self.tables.values(), *self.heads.values()):
            nn.init.normal_(module.get_parameter("weight"), std=0.02)
        self.encoder.requires_grad_(config.train_encoder)
        self.pruning = None
        self.record = AnswerRecord()

    def _vocabularies(self) -> tuple[Vocabulary, ...]:
        size = self.language.get_input_embeddings().num_embeddings
        text = Vocabulary(name="text", size=size, specials=self.config.text_specials)
        given = self.config.vocabularies
        codes = self.encoder.codes
        if codes is not None and "visual" not in [v.name for v in given]:
            given = (*given, Vocabulary(name="visual", size=codes + 2, specials={"eof": codes, "eov": codes + 1}))
        return (text, Vocabulary(name="picture", size=0), *given)

    @classmethod
    def from_language_model(
        cls,
        source: str | os.PathLike[str],
        encoder: VisualEncoder,
        *,
        template: PromptTemplate | None = None,
        vocabularies: tuple[Vocabulary, ...] = (),
        train_encoder: bool = False,
        gguf_file: str | None = None,
    ) -> Self:
        """Put a trained language model behind a trained encoder; the projector and further tables start random.

        Args:
            source: Folder or Hub id of the language model with its tokenizer.
            encoder: Its weights are copied.
            template, vocabularies, train_encoder: See `VideoLanguageConfig`.
            gguf_file: Name of a GGUF file in `source` to read model and tokenizer from.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        language = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, gguf_file=gguf_file)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        specials = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        config = VideoLanguageConfig(
            language={**language.config.to_diff_dict(), "model_type": language.config.model_type},
            encoder=encoder.config,
            vocabularies=vocabularies,
            text_specials={name: i for name, i in specials.items() if i is not None},
            template=template or PromptTemplate(),
            train_encoder=train_encoder,
        )
        model = cls(config)
        model.language.load_state_dict(language.state_dict())
        model.encoder.load_state_dict(encoder.state_dict())
        model.tokenizer = tokenizer
        return model

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if not self.config.train_encoder:
            self.encoder.eval()
        return self

    # Sequences

    def conversation(self, *, pictures: int = 1, worked: bool = False) -> SequenceLayout:
        """Layout of one question about pictures: fields `picture_0`, ..., `question`, `answer`; the answer is scored.

        With a discrete tokenizer the pictures are ids of `visual`, each closed by `eof`; else slots of `picture`. With
        `worked` every picture but the last is a worked example, a turn with `question_0`, `answer_0`, ... of its own.
        """
        template, codes = self.config.template, self.encoder.codes is not None
        parts: list[Any] = [Special(special="bos")] if "bos" in self.config.text_specials else []
        ending = [Special(special="eos", special_scored=True)] if "eos" in self.config.text_specials else []
        parts.append(Delimiter(text=template.before))
        for index in range(pictures):
            kind: dict[str, Any] = {"modality": "visual", "group_end": "eof"} if codes else {"modality": "picture"}
            parts.append(Delimiter(text=template.picture_before))
            parts.append(Field(name=f"picture_{index}", scored=False, **kind))
            parts.append(Delimiter(text=template.picture_after))
            if worked and index < pictures - 1:
                parts.append(Field(name=f"question_{index}", modality="text", scored=False))
                parts.append(Delimiter(text=template.after))
                parts += [Field(name=f"answer_{index}", modality="text"), *ending, Delimiter(text=template.before)]
        parts.append(Field(name="question", modality="text", scored=False))
        parts.append(Delimiter(text=template.after))
        parts += [Field(name="answer", modality="text"), *ending]
        return SequenceLayout(
            vocabularies=self.vocabularies,
            parts=tuple(part for part in parts if not (isinstance(part, Delimiter) and not part.text)),
            loss_weights={"text": 1.0},
            loss_mean="token",
        )

    def encode_text(self, text: str) -> list[int]:
        """Text to ids, without BOS or EOS.

        Raises:
            ValueError: No tokenizer is set.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no text tokenizer; set `tokenizer`, or load a folder that holds one")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def example(self, question: str, answer: str, *, codes: Sequence[Tensor] = (), pictures: int = 1) -> TokenSequence:
        """A training sequence of `conversation`; `codes` are the pictures' where the tokenizer is discrete."""
        found = codes if self.encoder.codes is not None else [self.encoder.tokens_per_picture] * pictures
        sample = {f"picture_{i}": one for i, one in enumerate(found)}
        sample |= {"question": question, "answer": f" {answer}"}
        return self.conversation(pictures=len(found)).build(sample, encode_text=self.encode_text)

    # Passes

    def picture_rows(self, pixels: Tensor) -> Tensor:
        """Projected rows of pictures (B, 3, s, s), in order, (M, D); fewer where a pruning context dropped some.

        Raises:
            ValueError: The encoder gives codes, which are laid out as ids instead.
        """
        if self.encoder.codes is not None:
            raise ValueError("this encoder gives codes; lay them out as ids of `visual` (encoder(pixels))")
        return self.projector(_real_rows(self.encode(pixels)))

    def encode(self, pixels: Tensor) -> Tensor:
        """The encoder's rows or codes; without gradients unless the encoder learns."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_encoder):
            return self.encoder(pixels)

    def embed(self, ids: Tensor, modality: Tensor, vectors: dict[str, Tensor] | None = None) -> Tensor:
        """Inputs of the decoder.

        Args:
            ids, modality: int64, any shape (...).
            vectors: Per continuous modality the rows of all its positions, in order, (M, D).

        Returns:
            (..., D).

        Raises:
            ValueError: A continuous modality without rows, or with another number of them.
        """
        table = self.language.get_input_embeddings()
        out = table(torch.where(modality == 0, ids, 0))
        for index, vocabulary in enumerate(self.vocabularies[1:], start=1):
            here = modality == index
            if not bool(here.any()):
                continue
            if vocabulary.continuous:
                rows = (vectors or {}).get(vocabulary.name)
                if rows is None or len(rows) != int(here.sum()):
                    got = "none" if rows is None else len(rows)
                    raise ValueError(f"{int(here.sum())} positions of {vocabulary.name!r} need as many rows, got {got}")
            else:
                rows = self.tables[vocabulary.name](ids[here])
            out = out.masked_scatter(here[..., None], rows.to(out.dtype))
        return out

    def head(self, hidden: Tensor, modality: str) -> Tensor:
        """Logits (..., V) of the next id, within one vocabulary."""
        return self.language.get_output_embeddings()(hidden) if modality == "text" else self.heads[modality](hidden)

    def forward(self, batch: SequenceBatch, vectors: dict[str, Tensor] | None = None) -> LanguageOutput:
        """Teacher forcing over laid-out sequences.

        Args:
            batch: Right-padded sequences of a layout over `vocabularies`.
            vectors: As `embed`; `{"picture": picture_rows(pixels)}` for pictures in the batch's order.
        """
        hidden = self.language.base_model(
            inputs_embeds=self.embed(batch.ids, batch.modality, vectors),
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position,
            use_cache=False,
        ).last_hidden_state
        loss, found = hidden.new_zeros((), dtype=torch.float32), {}
        for index, vocabulary in enumerate(self.vocabularies):
            scored = (batch.modality[:, 1:] == index) & (batch.loss_weight[:, 1:] > 0)
            if vocabulary.continuous or not bool(scored.any()):
                continue
            logits = self.head(hidden[:, :-1][scored], vocabulary.name).float()
            entropy = F.cross_entropy(logits, batch.ids[:, 1:][scored], reduction="none")
            loss = loss + (entropy * batch.loss_weight[:, 1:][scored]).sum() / len(batch.ids)
            found[vocabulary.name] = entropy.mean().detach()
        return LanguageOutput(loss, found, hidden)

    @torch.no_grad()
    def continue_field(
        self, layout: SequenceLayout, name: str, prompt: TokenSequence, vectors: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Write one field of known length greedily, such as a future frame's codes or latent actions.

        Ids come from the field's own vocabulary; its special ids are never chosen, and group ends are put where the
        layout puts them.

        Args:
            layout: The layout. `name`: the field, with `group` and `groups`.
            prompt: `layout.build(..., until=name)`.
            vectors: As `embed`.

        Returns:
            int64 (groups * group,), without group ends.

        Raises:
            ValueError: The field has no fixed length or is continuous.
        """
        part = next(p for p in layout.parts if isinstance(p, Field) and p.name == name)
        vocabulary = layout.vocabulary(part.modality)
        if part.group is None or part.groups is None or vocabulary.continuous:
            raise ValueError(f"field {name!r} needs `group`, `groups` and ids to be written")
        banned = torch.tensor(sorted(vocabulary.specials.values()), dtype=torch.int64, device=self.device)
        cache, written = KVCache(), []
        ids, modality = prompt.ids[None].to(self.device), prompt.modality[None].to(self.device)
        for group in range(part.groups):
            for _ in range(part.group):
                logits = self._next(ids, modality, vectors, cache, part.modality)
                ids = logits.index_fill(-1, banned, -torch.inf).argmax(-1, keepdim=True)
                modality, vectors = torch.full_like(ids, layout.index(part.modality)), None
                written.append(int(ids))
            end = part.last_end if group == part.groups - 1 and part.last_end else part.group_end
            if end is not None and group < part.groups - 1:
                self._next(ids, modality, None, cache, part.modality)
                ids = torch.full_like(ids, vocabulary.specials[end])
        return torch.tensor(written, dtype=torch.int64)

    def _next(self, ids: Tensor, modality: Tensor, vectors: dict | None, cache: KVCache, kind: str) -> Tensor:
        position = torch.arange(cache.length, cache.length + ids.shape[1], device=ids.device)[None]
        hidden = self.language.base_model(
            inputs_embeds=self.embed(ids, modality, vectors),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[:, -1], kind)


def _real_rows(rows: Tensor) -> Tensor:
    """(B, N, D) to the rows (M, D) that no pruning dropped."""
    flat = rows.flatten(0, 1)
    dropped = flat[:, 0].isnan()
    return flat[~dropped] if bool(dropped.any()) else flat
