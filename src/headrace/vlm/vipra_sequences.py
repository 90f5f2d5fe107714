"""Sequence layouts of ViPRA's pretraining and finetuning, at any size.

Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d (field strings `fields_ls_la`, `fields_la`, `fields_ls`, `fields_ca`,
`fields_qa`). The future frame continues the vision span; the latent actions come after it and so see it.
"""

from dataclasses import dataclass

from headrace.vlm.sequence import Delimiter, Field, Part, SequenceLayout, Special, Vocabulary


@dataclass(frozen=True, kw_only=True)
class VipraSizes:
    """Numbers that fix ViPRA's sequences; the defaults are the released model's.

    Attributes:
        text_vocabulary: Ids of the text tokenizer. `bos` and `eos` are two of them.
        frame_tokens: Tokens of one frame. `frame_codes` is the visual codebook's size.
        frames: Context frames.
        latent_tokens: Latent-action tokens per transition. `latent_codes` is their codebook's size.
        horizon: Transitions, and actions in a chunk.
        action_bins: Ids of one discretised action dimension. `action_dim` is the number of dimensions.
        reserved: Visual ids kept for specials; EOF is the first, EOV the second.
    """

    text_vocabulary: int = 32000
    bos: int = 1
    eos: int = 2
    frame_tokens: int = 256
    frame_codes: int = 8192
    reserved: int = 256
    frames: int = 2
    latent_tokens: int = 16
    latent_codes: int = 8
    horizon: int = 14
    action_bins: int = 2047
    action_dim: int = 7

    def __post_init__(self) -> None:
        if self.reserved < 2:
            raise ValueError(f"reserved must be at least 2 (EOF and EOV), got {self.reserved}")

    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """Text, visual, latent and the two kinds of action, with their end ids."""
        return (
            Vocabulary(name="text", size=self.text_vocabulary, specials={"bos": self.bos, "eos": self.eos}),
            Vocabulary(
                name="visual",
                size=self.frame_codes + self.reserved,
                specials={"eof": self.frame_codes, "eov": self.frame_codes + 1},
            ),
            Vocabulary(name="latent", size=self.latent_codes + 1, specials={"eola": self.latent_codes}),
            Vocabulary(name="action_bin", size=self.action_bins + 1, specials={"eoa": self.action_bins}),
            Vocabulary(name="action", size=0),
        )


def _context(sizes: VipraSizes, *, closes_span: bool) -> tuple[Part, ...]:
    frames = Field(
        name="frames",
        modality="visual",
        scored=False,
        group=sizes.frame_tokens,
        groups=sizes.frames,
        group_end="eof",
        last_end="eov" if closes_span else None,
    )
    head = (
        Special(special="bos"),
        Field(name="instruction", modality="text", scored=False),
        Delimiter(text="<vision>"),
    )
    return (*head, frames, *((Delimiter(text="</vision>"),) if closes_span else ()))


def pretraining(sizes: VipraSizes, *, future: bool = True, latents: bool = True) -> SequenceLayout:
    """Instruction and frames, then the future frame and the latent actions, 0.48 / 0.48 / 0.02 of the loss with text.

    Fields: `instruction`, `frames`, `future`, `latents`. `future=False` or `latents=False` are the paper's ablations.

    Raises:
        ValueError: Neither part is asked for.
    """
    if not (future or latents):
        raise ValueError("a pretraining sequence needs the future frame, the latent actions, or both")
    parts = list(_context(sizes, closes_span=not future))
    if future:
        parts.append(Field(name="future", modality="visual", group=sizes.frame_tokens, groups=1, group_end="eov"))
        parts.append(Delimiter(text="</vision>", delimiter_scored=True))
    if latents:
        codes = Field(
            name="latents", modality="latent", group=sizes.latent_tokens, groups=sizes.horizon, group_end="eola"
        )
        parts += [Delimiter(text="<dynamics>", delimiter_scored=True), codes]
        parts.append(Delimiter(text="</dynamics>", delimiter_scored=True))
    parts.append(Special(special="eos", special_scored=True))
    return SequenceLayout(
        vocabularies=sizes.vocabularies(),
        parts=tuple(parts),
        loss_weights={"text": 0.02, "visual": 0.48, "latent": 0.48},
    )


def finetuning(sizes: VipraSizes, *, discrete: bool = False) -> SequenceLayout:
    """Instruction, frames and one action chunk.

    Fields: `instruction`, `frames`, `actions`. Continuous actions (ViPRA-FM) are slots, given as a count and scored by
    the flow loss, not here. Discrete ones (ViPRA-AR) are `action_dim` bins per step, each step closed by EOA.
    """
    if discrete:
        actions = Field(
            name="actions", modality="action_bin", group=sizes.action_dim, groups=sizes.horizon, group_end="eoa"
        )
    else:
        actions = Field(name="actions", modality="action", scored=False, group=1, groups=sizes.horizon)
    tail = (Delimiter(text="<action>"), actions, Delimiter(text="</action>"), Special(special="eos"))
    return SequenceLayout(
        vocabularies=sizes.vocabularies(),
        parts=(*_context(sizes, closes_span=True), *tail),
        loss_weights={"action_bin": 1.0} if discrete else {},
    )
