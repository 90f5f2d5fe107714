"""What goes into a training or inference sequence, declared as data: fields to ids, modality, loss weight, position.

A layout names its vocabularies and lists its parts in order. Each vocabulary is an id space of its own: code
5 of one is another thing than id 5 of the next, and only the modality tells them apart.

Source: ViPRA (arXiv 2511.07732) sec. 3 and sroutray/vipra, where field strings play this part.
"""
# Shape letters in this file: B sequences in a batch, L positions.

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

EncodeText = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One id space with its own embedding table and head.

    Attributes:
        name: Modality name, such as `text`, `visual`, `latent`, `action`.
        size: Number of ids, specials included. 0 means continuous: positions hold vectors and ids number the slots.
        specials: Name to id, such as `{"eof": 8192}`. A field may not contain these ids itself.
    """

    name: str
    size: int
    specials: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"vocabulary {self.name!r}: size must be 0 (continuous) or more, got {self.size}")
        outside = {name: i for name, i in self.specials.items() if not 0 <= i < self.size}
        if outside:
            raise ValueError(f"vocabulary {self.name!r} has {self.size} ids, these specials lie outside: {outside}")

    @property
    def continuous(self) -> bool:
        """Whether positions hold vectors instead of ids."""
        return self.size == 0


@dataclass(frozen=True, kw_only=True)
class Field:
    """A part whose content comes from the sample under `name`.

    Attributes:
        name: Key of the sample.
        modality: Name of one of the layout's vocabularies.
        scored: Whether its positions count in the loss.
        group: Ids per group, such as the tokens of one frame; None takes the content as one group of any length.
        groups: Number of groups, None for any.
        group_end: Special id after each group, None for none.
        last_end: Special id after the last group in place of `group_end`; None means `group_end`.
    """

    name: str
    modality: str
    scored: bool = True
    group: int | None = None
    groups: int | None = None
    group_end: str | None = None
    last_end: str | None = None

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ValueError(f"field {self.name!r}: group must be at least 1, got {self.group}")
        if self.group is None and self.groups not in (None, 1):
            raise ValueError(f"field {self.name!r}: {self.groups} groups need a `group` length")


@dataclass(frozen=True, kw_only=True)
class Delimiter:
    """Constant text, encoded by the text tokenizer; nothing is added to the vocabulary.

    Attributes:
        text: Such as `<vision>`.
        delimiter_scored: Whether its ids count in the loss.
    """

    text: str
    delimiter_scored: bool = False


@dataclass(frozen=True, kw_only=True)
class Special:
    """One special id on its own, such as BOS.

    Attributes:
        special: Name of the id in the vocabulary.
        modality: Vocabulary that holds it.
        special_scored: Whether it counts in the loss.
    """

    special: str
    modality: str = "text"
    special_scored: bool = False


Part = Field | Delimiter | Special


class TokenSequence(NamedTuple):
    """One laid-out sequence.

    Attributes:
        ids: int64 (L,), ids within the vocabulary of each position; slot numbers for continuous modalities.
        modality: int64 (L,), index into the layout's vocabularies.
        loss_weight: float32 (L,), weight of predicting this position; summed per sequence, averaged over a batch.
        position: int64 (L,), 0, 1, 2, ...
        spans: Field name to (start, end) of its positions, group ends included.
    """

    ids: Tensor
    modality: Tensor
    loss_weight: Tensor
    position: Tensor
    spans: dict[str, tuple[int, int]]


class SequenceBatch(NamedTuple):
    """Padded sequences; all (B, L). `attention_mask` is bool, False at padding.

    Padding has id 0 of vocabulary 0, no loss weight, and position 0.
    """

    ids: Tensor
    modality: Tensor
    loss_weight: Tensor
    position: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Order and meaning of a sequence, as data that is saved with a model.

    Attributes:
        vocabularies: Id spaces; the index here is the modality number.
        parts: Fields, delimiters and specials in order.
        loss_weights: Modality name to its share of the loss; modalities left out have weight 0.
        loss_mean: `modality` averages each modality over its own scored positions in the sequence, so that 238 latent
            and 257 image ids weigh as their shares say; `token` averages over all scored positions.
    """

    vocabularies: tuple[Vocabulary, ...]
    parts: tuple[Field | Delimiter | Special, ...]
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_mean: Literal["modality", "token"] = "modality"

    def __post_init__(self) -> None:
        names = [v.name for v in self.vocabularies]
        if len(set(names)) != len(names):
            raise ValueError(f"vocabulary names must differ, got {names}")
        fields = [part.name for part in self.parts if isinstance(part, Field)]
        if len(set(fields)) != len(fields):
            raise ValueError(f"field names must differ, got {fields}")
        for part in self.parts:
            self._check_part(part)
        unknown = set(self.loss_weights) - set(names)
        if unknown:
            raise ValueError(f"loss_weights names {sorted(unknown)}, the vocabularies are {names}")
        if any(not math.isfinite(w) or w < 0 for w in self.loss_weights.values()):
            raise ValueError(f"loss weights must be finite and not negative, got {self.loss_weights}")
        if self.loss_mean not in ("modality", "token"):
            raise ValueError(f"loss_mean must be 'modality' or 'token', got {self.loss_mean!r}")

    def _check_part(self, part: Part) -> None:
        if isinstance(part, Delimiter):
            self.index("text")
            return
        vocabulary = self.vocabulary(part.modality)
        wanted = (part.special,) if isinstance(part, Special) else (part.group_end, part.last_end)
        missing = [name for name in wanted if name is not None and name not in vocabulary.specials]
        if missing:
            raise ValueError(
                f"vocabulary {part.modality!r} has no special {missing[0]!r} (it has: {', '.join(vocabulary.specials)})"
            )

    def index(self, modality: str) -> int:
        """Number of a modality in `modality` tensors."""
        for index, vocabulary in enumerate(self.vocabularies):
            if vocabulary.name == modality:
                return index
        raise ValueError(f"no vocabulary {modality!r} (there are: {', '.join(v.name for v in self.vocabularies)})")

    def vocabulary(self, modality: str) -> Vocabulary:
        """Vocabulary by name."""
        return self.vocabularies[self.index(modality)]

    def build(
        self, sample: Mapping[str, Any], *, encode_text: EncodeText | None = None, until: str | None = None
    ) -> TokenSequence:
        """Lay out one sample.

        Args:
            sample: Field name to content: text for a text field (or ids), ids as a sequence or tensor (flattened in
                row-major order) for the others, the number of slots for a continuous one.
            encode_text: Text to ids, without BOS or EOS; needed for text and delimiters.
            until: Stop before this field, for a prompt that a model continues. The sample need not hold what follows.

        Raises:
            ValueError: A field is missing, has the wrong length, an id outside its vocabulary, or a special id inside.
        """
        spans: dict[str, tuple[int, int]] = {}
        ids: list[int] = []
        modality: list[int] = []
        scored: list[bool] = []
        if until is not None and until not in [part.name for part in self.parts if isinstance(part, Field)]:
            raise ValueError(f"until={until!r} is not a field of this layout")
        for part in self.parts:
            if isinstance(part, Field) and part.name == until:
                break
            name, part_ids, part_scored = self._content(part, sample, encode_text)
            if isinstance(part, Field):
                spans[part.name] = (len(ids), len(ids) + len(part_ids))
            ids += part_ids
            modality += [self.index(name)] * len(part_ids)
            scored += [part_scored] * len(part_ids)
        kinds = torch.tensor(modality, dtype=torch.int64)
        weight = self._loss_weight(kinds, torch.tensor(scored, dtype=torch.bool))
        return TokenSequence(torch.tensor(ids, dtype=torch.int64), kinds, weight, torch.arange(len(ids)), spans)

    def _content(self, part: Part, sample: Mapping[str, Any], encode: EncodeText | None) -> tuple[str, list[int], bool]:
        if isinstance(part, Delimiter):
            return "text", _encode(part.text, encode), part.delimiter_scored
        vocabulary = self.vocabulary(part.modality)
        if isinstance(part, Special):
            return part.modality, [vocabulary.specials[part.special]], part.special_scored
        if part.name not in sample:
            raise ValueError(f"the sample has no {part.name!r} (it has: {', '.join(sample)})")
        content = _to_ids(part, vocabulary, sample[part.name], encode)
        return part.modality, _with_group_ends(part, vocabulary, content), part.scored

    def _loss_weight(self, modality: Tensor, scored: Tensor) -> Tensor:
        share = torch.tensor([self.loss_weights.get(v.name, 0.0) for v in self.vocabularies], dtype=torch.float32)
        weight = share[modality] * scored
        if self.loss_mean == "token":
            return weight / max(int((weight > 0).sum()), 1)
        counts = torch.bincount(modality[scored], minlength=len(self.vocabularies)).clamp(min=1)
        return weight / counts[modality]

    def read(self, sequence: TokenSequence) -> dict[str, Tensor]:
        """Contents of the fields again, group ends removed and checked; the inverse of `build`.

        Raises:
            ValueError: A group end is not where the layout puts it.
        """
        found = {}
        for part in self.parts:
            if not isinstance(part, Field) or part.name not in sequence.spans:
                continue
            start, end = sequence.spans[part.name]
            found[part.name] = _without_group_ends(part, self.vocabulary(part.modality), sequence.ids[start:end])
        return found


def _encode(text: str, encode_text: EncodeText | None) -> list[int]:
    if encode_text is None:
        raise ValueError(f"text {text!r} needs `encode_text`, the tokenizer's text-to-ids function")
    return list(encode_text(text))


def _to_ids(part: Field, vocabulary: Vocabulary, value: Any, encode: EncodeText | None) -> list[int]:
    if isinstance(value, str):
        ids = _encode(value, encode)
    elif vocabulary.continuous:
        ids = list(range(int(value)))
    else:
        ids = torch.as_tensor(value).reshape(-1).tolist()
        taken = set(vocabulary.specials.values()) & set(ids) if vocabulary.name != "text" else set()
        if taken:
            raise ValueError(f"field {part.name!r} holds {sorted(taken)}, special ids of {vocabulary.name!r}")
    bad = [] if vocabulary.continuous else [i for i in ids if not 0 <= i < vocabulary.size]
    if bad:
        raise ValueError(
            f"field {part.name!r}: ids of {vocabulary.name!r} lie in 0..{vocabulary.size - 1}, got {bad[0]}"
        )
    if part.group is not None and (
        len(ids) % part.group or len(ids) != part.group * (part.groups or len(ids) // part.group)
    ):
        wanted = f"{part.groups} x {part.group}" if part.groups else f"a multiple of {part.group}"
        raise ValueError(f"field {part.name!r} needs {wanted} ids, got {len(ids)}")
    return ids


def _ends(part: Field, vocabulary: Vocabulary, count: int) -> list[int | None]:
    """Special id after each of `count` groups, None for none."""
    each = None if part.group_end is None else vocabulary.specials[part.group_end]
    last = each if part.last_end is None else vocabulary.specials[part.last_end]
    return [each] * (count - 1) + [last] * (count > 0)


def _with_group_ends(part: Field, vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    length = part.group or max(len(ids), 1)
    groups = [ids[start : start + length] for start in range(0, len(ids), length)]
    ends = _ends(part, vocabulary, len(groups))
    return [i for group, end in zip(groups, ends, strict=True) for i in (*group, *(() if end is None else (end,)))]


def _without_group_ends(part: Field, vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    each, last = _ends(part, vocabulary, 2) if len(ids) else (None, None)
    step = (part.group or len(ids) - (last is not None)) + ((each if part.group else last) is not None)
    kept, start = [], 0
    while start < len(ids):
        final = start + step >= len(ids)
        end = last if final else each
        stop = min(start + step, len(ids)) if not final else len(ids)
        if end is not None and int(ids[stop - 1]) != end:
            raise ValueError(f"field {part.name!r} should end a group with id {end}, found {int(ids[stop - 1])}")
        kept.append(ids[start : stop - (end is not None)])
        start = stop
    return torch.cat(kept) if kept else ids


def pad_sequences(
    sequences: Sequence[TokenSequence], *, length: int | None = None, side: Literal["right", "left"] = "right"
) -> SequenceBatch:
    """Stack sequences of different lengths.

    Args:
        sequences: At least one.
        length: Length to pad to; None takes the longest.
        side: `right` for training, `left` for prompts that are continued together.

    Raises:
        ValueError: No sequence, or one longer than `length`.
    """
    if not sequences:
        raise ValueError("pad_sequences needs at least one sequence")
    longest = max(len(s.ids) for s in sequences)
    size = longest if length is None else length
    if longest > size:
        raise ValueError(f"a sequence has {longest} positions, length is {size}; raise the length or shorten the text")

    def padded(values: Sequence[Tensor]) -> Tensor:
        gaps = [size - len(v) for v in values]
        sides = [(0, gap) if side == "right" else (gap, 0) for gap in gaps]
        return torch.stack([torch.nn.functional.pad(v, pad) for v, pad in zip(values, sides, strict=True)])

    mask = padded([torch.ones(len(s.ids), dtype=torch.int64) for s in sequences]).bool()
    return SequenceBatch(
        ids=padded([s.ids for s in sequences]),
        modality=padded([s.modality for s in sequences]),
        loss_weight=padded([s.loss_weight for s in sequences]),
        position=padded([s.position for s in sequences]),
        attention_mask=mask,
    )
