"""What all of ViPRA's networks share: frames, words and marks as rows of a sequence, and the transformer that reads it.

What stands where is a `SequenceLayout` of `headrace.vlm.vipra_sequences`; this module walks it for a whole batch.
"""
# Shape letters: B batch, V cameras, T frames of history, N positions, L words, D width, n positions of a part.

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from headrace.nn.image_tokens import ImageTokens, ImageTokensConfig
from headrace.nn.lean_imports import without
from headrace.nn.shapes import expect_shape
from headrace.robot.frame_codes import FrameCodes
from headrace.robot.vipra_config import Attention, TrunkConfig
from headrace.vlm.sequence import Delimiter, Field, SequenceLayout, Special
from headrace.vlm.text_tokenizer import WithTextTokenizer
from headrace.vlm.vipra_sequences import MARKS, VipraSizes

with without("sklearn"):
    from transformers import LlamaModel

PADDING = -1


class Embedded(NamedTuple):
    """A batch of laid-out sequences as rows.

    Attributes:
        rows: Shape (B, N, D).
        valid: False where the instruction is padded, shape (B, N).
        ids: Id of each position within its vocabulary, -1 at rows that are no ids, int64, shape (B, N).
        kinds: Index of each position's vocabulary in the layout, int64, shape (N,).
        scored: Whether a position is to be predicted, shape (N,).
        spans: Field to (start, end), ends included.
    """

    rows: Tensor
    valid: Tensor
    ids: Tensor
    kinds: Tensor
    scored: Tensor
    spans: dict[str, tuple[int, int]]


def words_of(instructions: Iterable[str]) -> tuple[str, ...]:
    """The different words of instructions, lower case, sorted."""
    return tuple(sorted({word for text in instructions for word in text.lower().split()}))


def pad_left(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Rows of ids, int64 (B, L), padded on the left to the longest, at least one column."""
    longest = max([1, *(len(row) for row in rows)])
    return torch.tensor([[padding] * (longest - len(row)) + [*row] for row in rows], dtype=torch.int64)


def encode_text(instructions: Sequence[str], words: tuple[str, ...]) -> Tensor:
    """Instructions as word ids from 2, padded with 0 on the left to the longest; unknown words are 1. int64 (B, L).

    Source: ours. A network from scratch knows no language; a pretrained one brings its own tokenizer.
    """
    ids = {word: index for index, word in enumerate(words, start=2)}
    return pad_left([[ids.get(word, 1) for word in text.lower().split()] for text in instructions], 0)


class VipraTrunk(WithTextTokenizer):
    """Frames, text and marks as rows, and the transformer. `tokenizer` is needed where there is a `text_vocabulary`."""

    Config: ClassVar[type] = TrunkConfig
    MARKS = tuple(MARKS)[:7]

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        image = config.image
        self.image_tokens = ImageTokens(image) if isinstance(image, ImageTokensConfig) else FrameCodes(image)
        self.backbone = LlamaModel(config.backbone.llama())
        self.backbone.set_input_embeddings(nn.Identity())  # embeddings are ours; an unused table would stop strict DDP
        if config.text_vocabulary:
            self.text = nn.Embedding(config.text_vocabulary, width)
        else:
            self.text = nn.Embedding(2 + len(config.words), width, padding_idx=0)
            self.delimiters = nn.Embedding(len(self.MARKS), width)
            nn.init.normal_(self.delimiters.weight, std=0.02)
        nn.init.normal_(self.text.weight, std=0.02)
        if isinstance(image, ImageTokensConfig):
            self.view = nn.Embedding(config.views, width)
            nn.init.normal_(self.view.weight, std=0.02)

    # Text

    def encode_text(self, instructions: Sequence[str]) -> Tensor:
        """Instructions as ids, int64 (B, L), padded on the left: with 0 for words, with -1 for a tokenizer's ids.

        Raises:
            ValueError: The network reads a tokenizer's ids and has none.
        """
        if not self.config.text_vocabulary:
            return encode_text(instructions, self.config.words)
        return pad_left([self._spell(text) for text in instructions], PADDING)

    def _spell(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this network has no text tokenizer; set `tokenizer`, or load a folder that holds one")
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    # Sequences

    def sizes(self, **more: Any) -> VipraSizes:
        """The numbers of this network's sequences; `more` sets those that the trunk does not know."""
        config, image = self.config, self.image_tokens
        given: dict[str, Any] = {
            "text_vocabulary": self.text.num_embeddings,
            "bos": config.bos,
            "eos": config.eos,
            "frames": config.views,
            "delimiters": "text" if config.text_vocabulary else "marks",
        }
        if isinstance(image, FrameCodes):
            reserved = image.config.reserved
            given |= {"frame_tokens": image.tokens, "frame_codes": image.codes, "reserved": reserved}
        else:
            given |= {"context": "pictures", "picture_tokens": image.tokens}
        return VipraSizes(**(given | more))

    def table(self, modality: str) -> nn.Embedding:
        """Vectors of a vocabulary's ids.

        Raises:
            ValueError: This network does not read that vocabulary.
        """
        if modality == "text":
            return self.text
        if modality == "mark":
            return self.delimiters
        if modality == "visual" and isinstance(self.image_tokens, FrameCodes):
            return self.image_tokens.table
        raise ValueError(f"{type(self).__name__} reads no ids of {modality!r}")

    def frame_contents(self, images: Tensor) -> dict[str, Tensor]:
        """Contents of the layout's frame fields: rows `frame_0`, ... of an encoder, or `frames`, a tokenizer's ids.

        Args:
            images: uint8 RGB in 0..255, shape (B, V, T, camera_size, camera_size, 3), or cut to `image.size` already.

        Raises:
            ValueError: Another shape.
        """
        config = self.config
        side, views = config.image.size, config.views
        if images.shape[3:5] != (side, side):
            size = config.camera_size
            expect_shape("images", images, (None, len(config.cameras), len(config.history), size, size, 3))
            left, top = config.crop
            images = images[..., top : top + side, left : left + side, :]
        batch = images.shape[0]
        pictures = images.flatten(0, 2).permute(0, 3, 1, 2)
        if isinstance(self.image_tokens, FrameCodes):
            return {"frames": self.image_tokens.encode(pictures).unflatten(0, (batch, views)).flatten(1)}
        frames = self.image_tokens(pictures).unflatten(0, (batch, views)) + self.view.weight[:, None]
        return {f"frame_{view}": frames[:, view] for view in range(views)}

    def embed(self, layout: SequenceLayout, contents: Mapping[str, Tensor], *, until: str | None = None) -> Embedded:
        """Lay out a batch.

        Args:
            layout: What stands where.
            contents: Field to ids, int64 (B, n) without group ends, or to rows (B, n, D). `instruction` is needed.
            until: Stop before this field.

        Raises:
            ValueError: A field is missing or has the wrong length.
        """
        text = contents["instruction"]
        batch, device = text.shape[0], text.device
        dtype = next((c.dtype for c in contents.values() if c.is_floating_point()), self.text.weight.dtype)
        rows, valid, ids, kinds, scored = [], [], [], [], []
        spans: dict[str, tuple[int, int]] = {}
        length = 0
        for part in layout.parts:
            if isinstance(part, Field) and part.name == until:
                break
            modality, part_scored, part_ids, part_rows = self._part(layout, part, contents)
            count = part_rows.shape[1]
            rows.append(part_rows.to(dtype).expand(batch, -1, -1))
            ids.append(part_ids.to(device).expand(batch, count))
            padded = modality == "text" and isinstance(part, Field)
            valid.append(self._is_text(text) if padded else ids[-1].new_ones((batch, count), dtype=torch.bool))
            kinds += [layout.index(modality)] * count
            scored += [part_scored] * count
            if isinstance(part, Field):
                spans[part.name] = (length, length + count)
            length += count
        where = torch.tensor(kinds, device=device)
        return Embedded(
            torch.cat(rows, 1), torch.cat(valid, 1), torch.cat(ids, 1), where, where.new_tensor(scored).bool(), spans
        )

    def _part(
        self, layout: SequenceLayout, part: Field | Delimiter | Special, contents: Mapping[str, Tensor]
    ) -> tuple[str, bool, Tensor, Tensor]:
        """Modality, whether scored, ids (B or 1, n) and rows (B or 1, n, D) of one part."""
        device = self.text.weight.device
        if isinstance(part, Special):
            ids = torch.tensor([[layout.vocabulary(part.modality).specials[part.special]]], device=device)
            return part.modality, part.special_scored, ids, self.table(part.modality)(ids)
        if isinstance(part, Delimiter):
            ids = torch.tensor([self._spell(part.text)], device=device)
            return "text", part.delimiter_scored, ids, self.text(ids)
        if part.name not in contents:
            raise ValueError(f"the batch has no {part.name!r} (it has: {', '.join(contents)})")
        content = contents[part.name]
        if part.group is not None and content.shape[1] != part.group * (part.groups or 1):
            raise ValueError(f"{part.name!r} needs {part.groups} x {part.group} positions, got {content.shape[1]}")
        if content.is_floating_point():
            return part.modality, part.scored, content.new_full(content.shape[:2], PADDING, dtype=torch.int64), content
        ids = with_ends(layout, part, content)
        return part.modality, part.scored, ids, self.table(part.modality)(ids.clamp_min(0))

    def _is_text(self, ids: Tensor) -> Tensor:
        return ids >= 0 if self.config.text_vocabulary else ids > 0

    def read_after(self, given: int, rows: Tensor, valid: Tensor) -> Tensor:
        """Hidden states of whole sequences, shape (B, N, D): causal, what is given as `prefix_attention` says.

        Args:
            given: So many positions at the beginning are given, not predicted.
            rows: Shape (B, N, D).
            valid: False where the instruction is padded, shape (B, N).
        """
        mask = self._mask(valid, valid.shape[1], "causal", start=0)
        if self.config.prefix_attention == "bidirectional":
            inside = self._mask(valid[:, :given], given, "bidirectional", start=0)
            mask = mask.clone()
            mask[:, :, :given, :given] = inside
        return self.backbone(
            inputs_embeds=rows,
            attention_mask=additive(mask, rows.dtype),
            position_ids=positions(valid),
            use_cache=False,
        ).last_hidden_state

    @staticmethod
    def _mask(valid: Tensor, queries: int, attention: Attention, *, start: int) -> Tensor:
        """Which of all keys the last `queries` positions may see, bool, shape (B, 1, queries, keys).

        Padding sees itself, for a row without any key would give NaN.
        """
        keys = valid.shape[1]
        rows = torch.arange(start, start + queries, device=valid.device)[:, None]
        columns = torch.arange(keys, device=valid.device)
        seen = (columns <= rows) if attention == "causal" else torch.ones_like(columns <= rows)
        return ((seen & valid[:, None, :]) | (columns == rows))[:, None]


def with_ends(layout: SequenceLayout, part: Field, ids: Tensor) -> Tensor:
    """Ids of a field, (B, groups * group), with the end id after each group as the layout puts it."""
    specials = layout.vocabulary(part.modality).specials
    if part.group_end is None and part.last_end is None:
        return ids
    groups = part.groups or 1
    cut = ids.unflatten(1, (groups, part.group or ids.shape[1] // groups))
    ends = [part.group_end] * groups
    ends[-1] = part.last_end or part.group_end
    if None in ends:
        raise ValueError(f"field {part.name!r} closes some groups and not others")
    column = ids.new_tensor([specials[str(end)] for end in ends]).view(1, groups, 1).expand(len(ids), -1, -1)
    return torch.cat((cut, column), -1).flatten(1)


def positions(valid: Tensor) -> Tensor:
    """Position of each token, counting only those that are not padding; int64, shape (B, N)."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what attention adds to its logits: 0 where seen, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
