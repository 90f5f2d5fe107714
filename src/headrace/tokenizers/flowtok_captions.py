"""Captions as ids and as the frozen tokens of a CLIP text tower."""

# Shape letters in this file: B batch, K context length, C width, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLIP_SOURCE = "openai/clip-vit-large-patch14-336"
CLIP_VOCABULARY = 49_408
PAD, START, END = "<pad>", "<start>", "<end>"


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The text tower and the words it knows.

    Attributes:
        words: A closed vocabulary, one id per word; empty means CLIP's byte-pair vocabulary of `CLIP_SOURCE`.
        context: K, tokens per caption after padding; 77 for CLIP.
        width: C.
        depth: Blocks.
        heads: Attention heads.
        hidden: Feed-forward width.
    """

    words: tuple[str, ...] = ()
    context: int = 77
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072

    def __post_init__(self) -> None:
        if self.context < 3 or self.depth < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"captions need context >= 3, depth >= 1 and a width divisible by heads, got {self}")
        bad = [w for w in self.words if w != w.lower() or not w or any(c.isspace() for c in w)]
        if bad or len(set(self.words)) != len(self.words):
            raise ValueError(
                f"words must be distinct, lower case and without spaces; wrong: {bad or 'a repeated word'}"
            )

    @property
    def vocabulary(self) -> int:
        """V, with the three marks of a closed vocabulary."""
        return len(self.words) + 3 if self.words else CLIP_VOCABULARY


class CaptionIds:
    """Captions to ids (B, K) and back. The end mark closes a caption; pad follows it.

    CLIP ids are padded with 0, as open_clip does in the released model (Hugging Face would repeat the end mark).
    """

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self._clip: CLIPTokenizer | None = None
        if config.words:
            self._names = (PAD, START, END, *config.words)
            self._ids = {name: index for index, name in enumerate(self._names)}
            self.pad, self.start, self.end = 0, 1, 2
        else:
            self.pad, self.start, self.end = 0, CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids of captions, int64, (B, K).

        Raises:
            ValueError: No captions, a word outside a closed vocabulary, or a caption that is too long.
            OSError: CLIP's vocabulary is neither cached nor reachable.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError("captions must be a list with at least one text")
        rows = [self._row(text) for text in captions]
        return torch.tensor(rows, dtype=torch.int64)

    def text(self, ids: Tensor) -> list[str]:
        """Captions of ids (B, K): cut at the first end mark, marks and pads dropped."""
        return [self._text(row) for row in ids.tolist()]

    def _row(self, text: str) -> list[int]:
        inner = self._words(text) if self.config.words else self._pieces(text)
        room = self.config.context - 2
        if len(inner) > room:
            raise ValueError(f"a caption may have {room} tokens, this one has {len(inner)}: {text!r}")
        row = [self.start, *inner, self.end]
        return row + [self.pad] * (self.config.context - len(row))

    def _words(self, text: str) -> list[int]:
        words = text.lower().split()
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(
                f"the caption {text!r} has words outside the vocabulary: {', '.join(unknown)} "
                f"(known: {', '.join(self.config.words[:20])}{', ...' if len(self.config.words) > 20 else ''})"
            )
        return [self._ids[word] for word in words]

    def _pieces(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, add_special_tokens=False)

    def _tokenizer(self) -> CLIPTokenizer:
        if self._clip is None:
            self._clip = CLIPTokenizer.from_pretrained(CLIP_SOURCE)
        return self._clip

    def _text(self, row: list[int]) -> str:
        stop = row.index(self.end) if self.end in row else len(row)
        kept = [i for i in row[:stop] if i not in (self.pad, self.start)]
        if self.config.words:
            return " ".join(self._names[i] for i in kept)
        return str(self._tokenizer().decode(kept)).strip()


class CaptionEncoder(nn.Module):
    """A frozen CLIP text tower: ids (B, K) to tokens after the last norm (B, K, C), not pooled."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config
        self.ids = CaptionIds(config)
        shape: dict[str, Any] = {  # transformers makes this constructor at run time; its declared one has no such names
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "intermediate_size": config.hidden,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.context,
            "bos_token_id": self.ids.start,
            "eos_token_id": self.ids.end,
            "pad_token_id": self.ids.pad,
        }
        self.tower = CLIPTextModel(CLIPTextConfig(**shape))
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The tower stays in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Tokens of ids."""
        return self.tower(input_ids=ids).last_hidden_state

    def load_clip(self) -> None:
        """Put OpenAI's weights of `CLIP_SOURCE` into the tower; raises OSError when neither cached nor reachable."""
        source = CLIPTextModel.from_pretrained(CLIP_SOURCE)
        self.tower.load_state_dict(source.state_dict())
