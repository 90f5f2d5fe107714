"""What ViPRA's two policies share: instruction, frames and proprioception before the actions, read once to a cache."""
# Shape letters: B batch, V cameras, T frames of history, N prefix length, L words, D width, S state dimension.

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from headrace.datasets.normalize import Normalizer
from headrace.robot.vipra_config import ActorConfig
from headrace.robot.vipra_trunk import VipraTrunk, additive, positions
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.sequence import SequenceLayout
from headrace.vlm.vipra_sequences import VipraSizes


class PolicyInput(NamedTuple):
    """What the network sees.

    Attributes:
        images: uint8 in 0..255, RGB, shape (B, V, T, camera_size, camera_size, 3), or already cut to `image.size`.
        state: Raw state, float32, shape (B, S).
        text: From `encode_text`: int64, shape (B, L), padded on the left.
    """

    images: Tensor
    state: Tensor
    text: Tensor


class Prefix(NamedTuple):
    """A prefix after one pass: its keys and values, and which positions count.

    Attributes:
        cache: Keys and values of N positions.
        valid: True at positions that are not padding, shape (B, N).
        last: Hidden state of the last position, shape (B, D).
    """

    cache: KVCache
    valid: Tensor
    last: Tensor


class VipraActor(VipraTrunk):
    """The trunk with proprioception; a subclass adds the head and says in `layout` where actions stand."""

    Config: ClassVar[type] = ActorConfig

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        width, states = config.backbone.width, len(config.state_names)
        if config.state_normalizer is not None:
            self.proprio = nn.Sequential(nn.Linear(states, width), nn.SiLU(), nn.Linear(width, width))
            self.normalize_state = Normalizer(config.state_normalizer)

    @property
    def layout(self) -> SequenceLayout:
        """The whole sequence, with a field `actions`."""
        raise TypeError(f"{type(self).__name__} has no head; use VipraPolicy or VipraBins")

    def sizes(self, **more: int) -> VipraSizes:
        """As in the trunk, with the state's token."""
        return super().sizes(proprio=int(bool(self.config.state_names)), **more)

    def embed_prefix(self, inputs: PolicyInput, frames: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, N, D) of everything before the actions, and which positions are not padding (B, N).

        `frames` is what `frame_contents` gives of the pictures, where that is known already.
        """
        contents = {"instruction": inputs.text, **(frames or self.frame_contents(inputs.images))}
        if self.config.state_names:
            contents["state"] = self.proprio(self.normalize_state(inputs.state))[:, None]
        embedded = self.embed(self.layout, contents, until="actions")
        return embedded.rows, embedded.valid

    def compute_prefix(self, inputs: PolicyInput, frames: dict[str, Tensor] | None = None) -> Prefix:
        """One pass over everything before the actions; arguments as in `embed_prefix`."""
        embeddings, valid = self.embed_prefix(inputs, frames)
        mask = self._mask(valid, valid.shape[1], self.config.prefix_attention, start=0)
        cache = KVCache()
        hidden = self.backbone(
            inputs_embeds=embeddings,
            attention_mask=additive(mask, embeddings.dtype),
            position_ids=positions(valid),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return Prefix(cache, valid, hidden[:, -1])
