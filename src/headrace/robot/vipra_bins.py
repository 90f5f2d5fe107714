"""ViPRA-AR: the same transformer with a vocabulary of action bins, written one number at a time.

Sequence: the prefix of `headrace.robot.vipra_actor`, then per step its numbers' bins and EOA. All numbers share one
table and one head. Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d, field string `fields_qa`.
"""
# Shape letters: B batch, N prefix length, H horizon, A action dimension, D width, K bins.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.contracts import ActionSpec
from headrace.nn.shapes import expect_shape
from headrace.robot.action_bins import ActionBins, ActionBinsConfig
from headrace.robot.vipra import VipraConfig
from headrace.robot.vipra_actor import PolicyInput, Prefix, VipraActor
from headrace.robot.vipra_config import ActorConfig, shared_fields
from headrace.robot.vipra_trunk import additive, positions, with_ends
from headrace.vlm.sequence import Field, SequenceLayout
from headrace.vlm.vipra_sequences import finetuning


@dataclass(frozen=True, kw_only=True)
class VipraBinsConfig(ActorConfig):
    """The network with a discrete head.

    Attributes:
        bins: Edges and values of the bins, from the training data.
        horizon: Actions per chunk.
    """

    bins: ActionBinsConfig
    horizon: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if ActionSpec.from_dict(self.spec).dim != self.bins.dim:
            raise ValueError(f"the spec names {len(self.spec['names'])} actions, there are bins for {self.bins.dim}")
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}")

    @classmethod
    def tiny(cls, spec: ActionSpec) -> "VipraBinsConfig":
        """A one-second version for tests: the tiny flow policy's trunk and eight even bins."""
        flow = VipraConfig.tiny(spec)
        edges = tuple(i / 4 - 1 for i in range(9))
        middles = tuple(i / 4 - 0.875 for i in range(8))
        bins = ActionBinsConfig(edges=(edges,) * spec.dim, values=(middles,) * spec.dim)
        return cls(**shared_fields(flow, ActorConfig), bins=bins, horizon=4)


class VipraBins(VipraActor):
    """Policy network that writes actions as ids."""

    Config = VipraBinsConfig

    def __init__(self, config: VipraBinsConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        self.bins = ActionBins(config.bins)
        self.bin_table = nn.Embedding(config.bins.bins + 1, width)
        self.bin_head = nn.Linear(width, config.bins.bins + 1, bias=False)
        for module in (self.bin_table, self.bin_head):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def layout(self) -> SequenceLayout:
        """The whole sequence; actions are ids."""
        config = self.config
        sizes = self.sizes(horizon=config.horizon, action_dim=config.bins.dim, action_bins=config.bins.bins)
        return finetuning(sizes, discrete=True)

    def table(self, modality: str) -> nn.Embedding:
        """As in the trunk, with the bins."""
        return self.bin_table if modality == "action_bin" else super().table(modality)

    def loss(
        self, inputs: PolicyInput, actions: Tensor, valid: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of every bin and EOA given those before it.

        Args:
            inputs: What the policy sees.
            actions: Raw action chunks, shape (B, H, A).
            valid: False for actions past the end of their episode, shape (B, H); None scores all.
            generator: Not drawn from; there is no randomness in this loss.

        Returns:
            `total`, and `accuracy` of the bins among scored steps, without EOA.
        """
        return self.loss_after(self.compute_prefix(inputs), actions, valid, generator)

    def loss_after(
        self, prefix: Prefix, actions: Tensor, valid: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`loss` of a prefix that is computed already."""
        ids = self._with_ends(self.bins.encode(actions).flatten(1))
        logits = self.logits(prefix, ids).float()
        steps, width = self.config.horizon, self.config.bins.dim + 1
        weight = torch.ones_like(ids[:, ::width], dtype=torch.float32) if valid is None else valid.float()
        entropy = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(-1, steps, width)
        right = (logits.argmax(-1) == ids).view(-1, steps, width)[..., :-1].float().mean(-1)
        count = weight.sum().clamp_min(1)
        return {
            "total": (entropy.mean(-1) * weight).sum() / count,
            "accuracy": (right * weight).sum().detach() / count,
        }

    def logits(self, prefix: Prefix, ids: Tensor) -> Tensor:
        """Logits (B, L, K + 1) of given ids (B, L), each from those before it; the prefix stays as it was."""
        hidden = self._read(prefix, ids[:, :-1]) if ids.shape[1] > 1 else prefix.last[:, :0]
        prefix.cache.rewind(prefix.valid.shape[1])
        return self.bin_head(torch.cat((prefix.last[:, None], hidden.view(len(ids), -1, prefix.last.shape[-1])), 1))

    def logits_uncached(self, inputs: PolicyInput, ids: Tensor) -> Tensor:
        """The same logits from one pass over the whole sequence; for checking."""
        rows, prefix_valid = self.embed_prefix(inputs)
        start, count = rows.shape[1], ids.shape[1] - 1
        valid = torch.cat((prefix_valid, prefix_valid.new_ones(len(ids), count)), 1)
        mask = valid.new_zeros(len(ids), 1, start + count, start + count)
        mask[:, :, :start, :start] = self._mask(prefix_valid, start, self.config.prefix_attention, start=0)
        mask[:, :, start:] = self._mask(valid, count, "causal", start=start)
        hidden = self.backbone(
            inputs_embeds=torch.cat((rows, self.bin_table(ids[:, :-1]).to(rows)), 1),
            attention_mask=additive(mask, rows.dtype),
            position_ids=positions(valid),
            use_cache=False,
        ).last_hidden_state
        return self.bin_head(hidden[:, start - 1 :])

    @torch.inference_mode()
    def sample(
        self, inputs: PolicyInput, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Action chunks in raw units, shape (B, H, A).

        A number's id comes from its own dimension's bins; EOA is put where the layout has it, never chosen, and read
        together with the id before it: H * A passes in all, of one or two tokens.

        Args:
            inputs: What the policy sees.
            temperature: 0 takes the most likely bin; above, ids are drawn.
            generator: Of the draws.

        Raises:
            ValueError: A negative temperature.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        config, prefix = self.config, self.compute_prefix(inputs)
        end = torch.full((len(prefix.last), 1), config.bins.bins, dtype=torch.int64, device=prefix.last.device)
        hidden, chosen = prefix.last, []
        for number in range(config.horizon * config.bins.dim):
            column = number % config.bins.dim
            logits = self.bin_head(hidden)[:, : config.bins.bins].float()
            logits = logits.masked_fill(~self.bins.allowed[column], -torch.inf)
            ids = _draw(logits, temperature, generator)
            chosen.append(ids)
            if number + 1 < config.horizon * config.bins.dim:
                read = torch.cat((ids, end), 1) if column + 1 == config.bins.dim else ids
                hidden = self._read(prefix, read)[:, -1]
        return self.bins.decode(torch.cat(chosen, 1).unflatten(1, (config.horizon, config.bins.dim)))

    def _read(self, prefix: Prefix, ids: Tensor) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L) that follow what the cache holds; their keys are left in it."""
        seen, count = prefix.cache.length, ids.shape[1]
        valid = torch.cat((prefix.valid, prefix.valid.new_ones(len(ids), seen + count - prefix.valid.shape[1])), 1)
        rows = self.bin_table(ids).to(prefix.last.dtype)
        place = positions(valid)[:, seen:]
        return self.backbone(
            inputs_embeds=rows,
            attention_mask=additive(self._mask(valid, count, "causal", start=seen), rows.dtype),
            position_ids=place,
            past_key_values=prefix.cache,
            use_cache=True,
            cache_position=torch.arange(seen, seen + count, device=ids.device),
        ).last_hidden_state

    def _with_ends(self, ids: Tensor) -> Tensor:
        layout = self.layout
        part = next(p for p in layout.parts if isinstance(p, Field) and p.name == "actions")
        expect_shape("ids", ids, (None, self.config.horizon * self.config.bins.dim))
        return with_ends(layout, part, ids)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Ids (B, 1) from logits (B, K)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
