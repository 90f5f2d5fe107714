"""ViPRA's second stage: the transformer learns from videos the future frame and the latent actions that lead to it.

Sequence: BOS instruction <vision> frame EOF ... future-frame ids EOV </vision> <dynamics> (codes EOLA) x H </dynamics>
EOS. The future comes first, so latent actions see it. Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d, pretraining.
"""
# Shape letters: B batch, V cameras, T frames of history, N ids of a frame, H transitions, K codes of a transition.

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.frame_codes import FrameCodes, FrameCodesConfig
from headrace.robot.vipra_config import BackboneConfig, PretrainingRecord, TrunkConfig
from headrace.robot.vipra_trunk import VipraTrunk, words_of
from headrace.vlm.sequence import SequenceLayout
from headrace.vlm.vipra_sequences import MARKS, pretraining


@dataclass(frozen=True, kw_only=True)
class VipraPretrainingConfig(TrunkConfig):
    """The network and what it learns to predict.

    Attributes:
        record: What it is trained on; a policy made of it keeps this. Its `latent_steps` and `future` are the paper's
            ablations: both `ls_la`, no future `la`, no latents `ls`, one latent step "1-step".
        frame_tokens: Ids of the future frame. `frame_codes`: size of their codebook.
        reserved: Ids kept after them: EOF, EOV and room.
        latent_tokens: Codes of one transition. `latent_codes`: size of their codebook.
    """

    record: PretrainingRecord
    frame_tokens: int = 256
    frame_codes: int = 8192
    reserved: int = 256
    latent_tokens: int = 16
    latent_codes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(self.record.history) != tuple(self.history):
            raise ValueError(f"the network sees {self.history}, the record says {self.record.history}")
        if not (self.record.future or self.record.latent_steps):
            raise ValueError("pretraining needs the future frame, latent actions, or both")
        if not 0 <= self.record.latent_steps <= self.record.horizon:
            raise ValueError(
                f"latent_steps must be 0 to the horizon of {self.record.horizon}, got {self.record.latent_steps}"
            )
        if isinstance(self.image, FrameCodesConfig) and self.image.reserved != self.reserved:
            raise ValueError(f"context and future frames share ids: reserved {self.image.reserved} and {self.reserved}")

    @classmethod
    def tiny(cls, *, future: bool = True, latent_steps: int = 3) -> "VipraPretrainingConfig":
        """A one-second version for tests and documentation."""
        record = PretrainingRecord(
            history=(0,), rate=20.0, horizon=3, latent_steps=latent_steps, future=future, lam_hash="", tokenizer_hash=""
        )
        return cls(
            cameras=("video",),
            image=ImageTokensConfig.tiny(width=32),
            backbone=BackboneConfig(width=32, layers=2, heads=2, mlp=64, rope_theta=1e4),
            camera_size=64,
            history=(0,),
            words=words_of(["push the cube", "pull it"]),
            record=record,
            frame_tokens=6,
            frame_codes=20,
            reserved=2,
            latent_tokens=2,
            latent_codes=4,
        )


class PretrainingInput(NamedTuple):
    """A training batch; what the network does not use is empty in its second dimension.

    Attributes:
        images: Context frames, uint8 RGB, shape (B, V, T, s, s, 3) as in `PolicyInput`; unused with frames as ids.
        frames: Context frames as ids, int64, shape (B, V * T * N); unused with frames as pictures.
        future: Ids of the future frame, int64, shape (B, N).
        latents: Latent actions, int64, shape (B, H * K).
        text: From `encode_text`, int64, shape (B, L).
    """

    images: Tensor
    frames: Tensor
    future: Tensor
    latents: Tensor
    text: Tensor


class VipraPretraining(VipraTrunk):
    """The trunk with tables and heads for frames, latent actions and delimiters."""

    Config = VipraPretrainingConfig
    MARKS = tuple(MARKS)

    def __init__(self, config: VipraPretrainingConfig) -> None:
        super().__init__(config)
        width, image = config.backbone.width, self.image_tokens
        if isinstance(image, FrameCodes) and (image.tokens, image.codes) != (config.frame_tokens, config.frame_codes):
            raise ValueError(
                f"the tokenizer gives {image.tokens} ids of {image.codes}, the config says {config.frame_tokens} of "
                f"{config.frame_codes}"
            )
        tables: dict[str, nn.Embedding] = {}
        heads = {"spelling": nn.Linear(width, config.text_vocabulary or len(self.MARKS), bias=False)}
        if config.record.future:
            if not isinstance(image, FrameCodes):
                tables["visual"] = nn.Embedding(config.frame_codes + config.reserved, width)
            heads["visual"] = nn.Linear(width, config.frame_codes + config.reserved, bias=False)
        if config.record.latent_steps:
            tables["latent"] = nn.Embedding(config.latent_codes + 1, width)
            heads["latent"] = nn.Linear(width, config.latent_codes + 1, bias=False)
        self.tables, self.heads = nn.ModuleDict(tables), nn.ModuleDict(heads)
        for module in (*tables.values(), *heads.values()):
            nn.init.normal_(module.get_parameter("weight"), std=0.02)

    @property
    def layout(self) -> SequenceLayout:
        """The whole sequence and its loss weights."""
        config, steps = self.config, self.config.record.latent_steps
        sizes = self.sizes(
            frame_tokens=config.frame_tokens,
            frame_codes=config.frame_codes,
            reserved=config.reserved,
            latent_tokens=config.latent_tokens,
            latent_codes=config.latent_codes,
            horizon=max(steps, 1),
        )
        return pretraining(sizes, future=config.record.future, latents=steps > 0)

    def table(self, modality: str) -> nn.Embedding:
        """As in the trunk, with frames and latent actions."""
        if modality in self.tables:
            return self.tables[modality]  # type: ignore[return-value]
        return super().table(modality)

    def loss(self, batch: PretrainingInput, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weighted cross-entropies of a batch.

        Args:
            batch: What is seen and what is to be predicted.
            generator: Not drawn from.

        Returns:
            `total`, and of each scored modality its mean cross-entropy and its share of ids that are most likely
            (`visual`, `visual_right`, `latent`, `latent_right`, `spelling`, `spelling_right`).
        """
        contents = {"instruction": batch.text, "future": batch.future, "latents": batch.latents}
        contents |= self.frame_contents(batch.images) if batch.images.shape[1] else {"frames": batch.frames}
        layout = self.layout
        embedded = self.embed(layout, contents)
        given = int(embedded.scored.nonzero()[0])  # everything before what is predicted first
        hidden = self.read_after(given, embedded.rows, embedded.valid)
        terms: dict[str, Tensor] = {"total": hidden.new_zeros((), dtype=torch.float32)}
        for modality, weight in layout.loss_weights.items():
            where = (embedded.scored & (embedded.kinds == layout.index(modality))).nonzero()[:, 0]
            if not len(where):
                continue
            name = modality if modality in self.heads else "spelling"
            logits, wanted = self.heads[name](hidden[:, where - 1]).float(), embedded.ids[:, where]
            # Every sequence has as many scored positions, so this is also the mean of the sequences' own means.
            terms[name] = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            terms[f"{name}_right"] = (logits.argmax(-1) == wanted).float().mean().detach()
            terms["total"] = terms["total"] + weight * terms[name]
        return terms
