"""Sequence layouts of ViPRA's pretraining and finetuning, at any size.

Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d (field strings `fields_ls_la`, `fields_la`, `fields_ls`, `fields_ca`,
`fields_qa`). The future frame continues the vision span; the latent actions come after it and so see it.

Two choices suit networks that bring no language or no tokenizer of their own. Delimiters are text of the language
model's tokenizer, as released, or `marks`: one learned id each, in a vocabulary of their own. Context frames are ids of
the frame tokenizer, as released, or `pictures`: slots for the rows of an encoder; the future frame is ids always.
"""

from dataclasses import dataclass
from typing import Literal

from headrace.vlm.sequence import Delimiter, Field, Part, SequenceLayout, Special, Vocabulary

# Delimiters as learned ids: what each is called, and the text that it stands for.
MARKS = {
    "bos": "",
    "vision": "<vision>",
    "eof": "",
    "end_vision": "</vision>",
    "proprio": "<proprio>",
    "end_proprio": "</proprio>",
    "action": "<action>",
    "dynamics": "<dynamics>",
    "end_dynamics": "</dynamics>",
    "eos": "",
    "end_action": "</action>",
}


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
        delimiters: `text` of the tokenizer, or `marks`, learned ids.
        context: Context frames as `codes` of the frame tokenizer, or as `pictures`, rows of an encoder.
        picture_tokens: Rows of one frame where the context is `pictures`.
        proprio: Tokens of the state between the frames and the actions; 0 for none. Pretraining has none.
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
    delimiters: Literal["text", "marks"] = "text"
    context: Literal["codes", "pictures"] = "codes"
    picture_tokens: int = 0
    proprio: int = 0

    def __post_init__(self) -> None:
        if self.delimiters not in ("text", "marks"):
            raise ValueError(f"delimiters must be 'text' or 'marks', got {self.delimiters!r}")
        if self.context not in ("codes", "pictures"):
            raise ValueError(f"context must be 'codes' or 'pictures', got {self.context!r}")
        if (self.context == "pictures") != (self.picture_tokens > 0):
            raise ValueError(f"picture_tokens is for a context of pictures and only for it, got {self.picture_tokens}")
        if self.reserved < 2:
            raise ValueError(f"reserved must be at least 2 (EOF and EOV), got {self.reserved}")

    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """Text, visual, latent and the two kinds of action, with their end ids; marks, pictures, state where used."""
        more = []
        if self.delimiters == "marks":
            more.append(Vocabulary(name="mark", size=len(MARKS), specials={m: i for i, m in enumerate(MARKS)}))
        if self.context == "pictures":
            more.append(Vocabulary(name="picture", size=0))
        if self.proprio:
            more.append(Vocabulary(name="state", size=0))
        specials = {"bos": self.bos, "eos": self.eos} if self.delimiters == "text" else {}
        return (
            Vocabulary(name="text", size=self.text_vocabulary, specials=specials),
            Vocabulary(
                name="visual",
                size=self.frame_codes + self.reserved,
                specials={"eof": self.frame_codes, "eov": self.frame_codes + 1},
            ),
            Vocabulary(name="latent", size=self.latent_codes + 1, specials={"eola": self.latent_codes}),
            Vocabulary(name="action_bin", size=self.action_bins + 1, specials={"eoa": self.action_bins}),
            Vocabulary(name="action", size=0),
            *more,
        )

    @property
    def spelling(self) -> str:
        """The vocabulary that delimiters belong to."""
        return "mark" if self.delimiters == "marks" else "text"

    def delimiter(self, name: str, *, scored: bool = False) -> Part:
        """The delimiter called `name` in `MARKS`, as text, as a special id of the text, or as a mark."""
        if self.delimiters == "marks":
            return Special(special=name, modality="mark", special_scored=scored)
        if MARKS[name]:
            return Delimiter(text=MARKS[name], delimiter_scored=scored)
        return Special(special=name, special_scored=scored)


def _context(sizes: VipraSizes, *, closes_span: bool) -> tuple[Part, ...]:
    head = (sizes.delimiter("bos"), Field(name="instruction", modality="text", scored=False), sizes.delimiter("vision"))
    end = (sizes.delimiter("end_vision"),) if closes_span else ()
    if sizes.context == "pictures":
        return (*head, *_pictures(sizes), *end)
    frames = Field(
        name="frames",
        modality="visual",
        scored=False,
        group=sizes.frame_tokens,
        groups=sizes.frames,
        group_end="eof",
        last_end="eov" if closes_span else None,
    )
    return (*head, frames, *end)


def _pictures(sizes: VipraSizes) -> tuple[Part, ...]:
    """One field of slots per frame, `frame_0` and following, each closed by EOF where there are marks."""
    end = (sizes.delimiter("eof"),) if sizes.delimiters == "marks" else ()
    size = sizes.picture_tokens
    frames = [
        Field(name=f"frame_{i}", modality="picture", scored=False, group=size, groups=1) for i in range(sizes.frames)
    ]
    return tuple(part for frame in frames for part in (frame, *end))


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
        parts.append(sizes.delimiter("end_vision", scored=True))
    if latents:
        codes = Field(
            name="latents", modality="latent", group=sizes.latent_tokens, groups=sizes.horizon, group_end="eola"
        )
        parts += [sizes.delimiter("dynamics", scored=True), codes, sizes.delimiter("end_dynamics", scored=True)]
    parts.append(sizes.delimiter("eos", scored=True))
    return SequenceLayout(
        vocabularies=sizes.vocabularies(),
        parts=tuple(parts),
        loss_weights={sizes.spelling: 0.02, "visual": 0.48, "latent": 0.48},
    )


def frame_ahead(sizes: VipraSizes) -> SequenceLayout:
    """Instruction, frames and the future frame: pretraining's sequence up to where the future frame ends.

    Fields: `instruction`, `frames`, `future`. For a frame that is predicted beside a policy's own sequence.
    """
    future = Field(name="future", modality="visual", group=sizes.frame_tokens, groups=1, group_end="eov")
    return SequenceLayout(
        vocabularies=sizes.vocabularies(),
        parts=(*_context(sizes, closes_span=False), future),
        loss_weights={"visual": 1.0},
    )


def finetuning(sizes: VipraSizes, *, discrete: bool = False) -> SequenceLayout:
    """Instruction, frames and one action chunk.

    Fields: `instruction`, `frames`, `state` where there is one, `actions`. Continuous actions (ViPRA-FM) are slots,
    given as a count and scored by the flow loss, not here. Discrete ones (ViPRA-AR) are `action_dim` bins per step,
    each step closed by EOA.
    """
    if discrete:
        actions = Field(
            name="actions", modality="action_bin", group=sizes.action_dim, groups=sizes.horizon, group_end="eoa"
        )
    else:
        actions = Field(name="actions", modality="action", scored=False, group=1, groups=sizes.horizon)
    state: tuple[Part, ...] = ()
    if sizes.proprio:
        slots = Field(name="state", modality="state", scored=False, group=sizes.proprio, groups=1)
        state = (sizes.delimiter("proprio"), slots, sizes.delimiter("end_proprio"))
    tail = (sizes.delimiter("action"), actions, sizes.delimiter("end_action"), sizes.delimiter("eos"))
    return SequenceLayout(
        vocabularies=sizes.vocabularies(),
        parts=(*_context(sizes, closes_span=True), *state, *tail),
        loss_weights={"action_bin": 1.0} if discrete else {},
    )
