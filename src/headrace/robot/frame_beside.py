"""The future frame predicted while a policy is fine-tuned as well: the ablation SP3 of ViPRA's table 2.

The policy's own sequence stays as it is. Beside it the same transformer reads pretraining's sequence up to the future
frame's end, and what it gets wrong there is added to the loss. Nothing of this is saved with the policy or runs in a
rollout. Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d, whose fine-tuning loss is FM + CE(future frame).
"""
# Shape letters: B batch, N ids of a frame, s side of the picture that the network sees.

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.mixture import Mixture
from headrace.nn.pretrained import read_config, resolve_folder
from headrace.robot.frame_codes import FrameCodes, frames_to_codes
from headrace.robot.pretrain import open_encoder
from headrace.robot.token_cache import encoder_hash
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_bins import VipraBins
from headrace.robot.vipra_config import PretrainingRecord
from headrace.robot.vipra_pretraining import VipraPretraining
from headrace.robot.vipra_trunk import with_ends
from headrace.vlm.sequence import Field
from headrace.vlm.vipra_sequences import frame_ahead
from headrace.vlm.visual_encoder import VisualEncoder


class FrameSource(NamedTuple):
    """What predicts the future frame, from pretraining.

    Attributes:
        encoder: The frame tokenizer.
        record: What the network was pretrained on; says how far ahead the frame is.
        reserved: Ids after the tokenizer's.
        weights: Of head and table; empty for new ones.
    """

    encoder: VisualEncoder
    record: PretrainingRecord
    reserved: int
    weights: dict[str, Tensor]


class FrameInput(NamedTuple):
    """A training batch: as `TrainingInput`, and the first camera's future picture, uint8, shape (B, s, s, 3)."""

    inputs: PolicyInput
    actions: Tensor
    valid: Tensor
    future: Tensor


def open_frames(init: str | Path, tokenizer: str | Path, *, new_head: bool = False) -> FrameSource:
    """The frame tokenizer and the head that a pretrained network predicts the future frame with.

    Args:
        init: From `headrace pretrain`.
        tokenizer: The one of that pretraining, a folder or Hub id.
        new_head: Begin a new head, for a network that was pretrained without the future frame (fields `la`).

    Raises:
        ValueError: No pretrained network, one without such a head while `new_head` is False or with one while it is
            True, or another tokenizer.
        FileNotFoundError: No such folder or Hub id.
    """
    wanted = "to predict the future frame while fine-tuning, start from a network of headrace pretrain"
    if str(init) == "scratch":
        raise ValueError(f"{wanted}; got scratch")
    folder = resolve_folder(init)
    written_by = read_config(folder).get("model")
    if written_by != VipraPretraining.__name__:
        raise ValueError(f"{wanted}; {init} is a {written_by}")
    network = VipraPretraining.from_pretrained(folder)
    config, record = network.config, network.config.record
    if not (record.future or new_head):
        raise ValueError(
            f"{init} was pretrained without the future frame and has no head for it; take one of fields ls_la, ls or "
            "ls_la1, or begin a new head (--new-frame-head, the paper's SP3)"
        )
    if record.future and new_head:
        raise ValueError(f"{init} has a head for the future frame; leave out --new-frame-head")
    encoder = open_encoder(tokenizer)
    found = encoder_hash(encoder)
    if record.tokenizer_hash and found != record.tokenizer_hash:
        raise ValueError(
            f"{tokenizer} is tokenizer {found}, {init} was pretrained with {record.tokenizer_hash}; give that one"
        )
    weights = {}
    if record.future:
        modules = {"head": network.heads["visual"]}
        if "visual" in network.tables:
            modules["table"] = network.tables["visual"]
        weights = {f"{name}.weight": m.get_parameter("weight").detach().clone() for name, m in modules.items()}
    return FrameSource(encoder, record, config.reserved, weights)


class PolicyWithFrame(nn.Module):
    """A policy and, for its training alone, the future frame's tokenizer, table and head.

    Args:
        policy: Is trained, and saved without the rest.
        frames: From `open_frames`.
        weight: Of the frame's cross-entropy beside the policy's own loss; 1 as released.

    Raises:
        ValueError: A weight that is not above 0.
    """

    def __init__(self, policy: VipraPolicy | VipraBins, frames: FrameSource, weight: float) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"the future frame's weight must be above 0, got {weight}; leave it out for none")
        assert frames.encoder.codes is not None  # `open_encoder` gives discrete ones
        self.policy, self.weight = policy, weight
        self.encoder = frames.encoder.requires_grad_(False).eval()
        self.codes, self.reserved = frames.encoder.codes, frames.reserved
        width = policy.config.backbone.width
        self.head = nn.Linear(width, self.codes + self.reserved, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        if not isinstance(policy.image_tokens, FrameCodes):  # context as ids: one table for all frames, the policy's
            self.table = nn.Embedding(self.codes + self.reserved, width)
            nn.init.normal_(self.table.weight, std=0.02)
        with torch.no_grad():
            for name, value in frames.weights.items():
                self.get_parameter(name).copy_(value)

    def train(self, mode: bool = True) -> Self:
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def facts(self) -> dict[str, Any]:
        """What a resumed run must have alike, JSON-ready."""
        return {"weight": self.weight, "tokenizer": encoder_hash(self.encoder)}

    def loss(self, batch: FrameInput, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The policy's loss and the future frame's.

        Returns:
            The policy's terms with `total` now the weighted sum, `action` (its own total), `frame` (mean cross-entropy
            of the future frame's ids and EOV) and `frame_right` (share of ids that are most likely).
        """
        contents = self.policy.frame_contents(batch.inputs.images)
        prefix = self.policy.compute_prefix(batch.inputs, contents)
        terms = self.policy.loss_after(prefix, batch.actions, batch.valid, generator)
        logits, wanted = self._frame(batch.inputs.text, contents, batch.future)
        frame = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        return {
            **terms,
            "total": terms["total"] + self.weight * frame,
            "action": terms["total"].detach(),
            "frame": frame.detach(),
            "frame_right": (logits.argmax(-1) == wanted).float().mean().detach(),
        }

    def _frame(self, text: Tensor, contents: dict[str, Tensor], future: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N + 1, ids) of the future frame and EOV, each from those before it, and the ids (B, N + 1)."""
        policy = self.policy
        codes = frames_to_codes(self.encoder, future.permute(0, 3, 1, 2))
        layout = frame_ahead(policy.sizes(frame_tokens=codes.shape[1], frame_codes=self.codes, reserved=self.reserved))
        given = policy.embed(layout, {"instruction": text, **contents}, until="future")
        ids = with_ends(layout, next(p for p in layout.parts if isinstance(p, Field) and p.name == "future"), codes)
        table = policy.image_tokens.table if isinstance(policy.image_tokens, FrameCodes) else self.table
        rows = torch.cat((given.rows, table(ids[:, :-1]).to(given.rows.dtype)), 1)
        valid = torch.cat((given.valid, given.valid.new_ones(ids[:, :-1].shape)), 1)
        start = given.rows.shape[1]
        return self.head(policy.read_after(start, rows, valid)[:, start - 1 :]).float(), ids


def predict_frame(
    policy: VipraPolicy | VipraBins, data: Mixture | LeRobotDemos, frames: FrameSource, weight: float
) -> tuple[PolicyWithFrame, Mixture | LeRobotDemos]:
    """A policy and its demonstrations, made ready to predict the future frame beside the actions.

    The frame is as far ahead as in pretraining: `record.horizon` steps, in frames of the demonstrations.
    """
    steps = frames.record.horizon * frames.record.frames_per_step(data.fps)
    return PolicyWithFrame(policy, frames, weight), data.looking_ahead(steps)
