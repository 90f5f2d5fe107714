"""ViPRA's third stage: a causal transformer over instruction, frames and proprioception, with action tokens at its end.

Sequence: BOS instruction <vision> frame EOF ... frame EOF </vision> <proprio> state </proprio> <action> a_0 .. a_{H-1}
Without pretraining this is the paper's "Scratch-FM". Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d, finetuning.
Where the released code spells delimiters as text of its language model's tokenizer, a network from scratch has one
learned vector for each.
"""
# Shape letters: B batch, V cameras, T frames of history, N prefix length, H horizon, A action dimension, D width,
# S state dimension, K draws of (time, noise) per sample.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import Normalizer, NormalizerConfig
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import SolverSettings
from headrace.flow.time import beta_time
from headrace.nn.image_tokens import ImageTokens, ImageTokensConfig
from headrace.nn.pretrained import Pretrained
from headrace.nn.shapes import expect_shape
from headrace.robot.action_decoder import ActionDecoder, ActionDecoderConfig
from headrace.vlm.kv_cache import KVCache

DELIMITERS = ("bos", "vision", "eof", "end_vision", "proprio", "end_proprio", "action")
Attention = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A LLaMA-shaped decoder; the defaults are LWM-Chat-1M's, which ViPRA builds on."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 11008
    rope_theta: float = 5e7

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")

    def llama(self) -> LlamaConfig:
        """The transformers configuration of this shape, with a token table of one row: embeddings are ours."""
        shape: dict[str, Any] = {  # transformers makes this constructor at run time; its declared one has no such names
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.mlp,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "vocab_size": 1,
            "max_position_embeddings": 4096,
            "attn_implementation": "eager",  # its backward pass was the faster one on a CPU: 0.79 against 0.93 s a step
        }
        return LlamaConfig(**shape)


@dataclass(frozen=True, kw_only=True)
class VipraConfig:
    """The policy network and everything that a rollout must know about it.

    Attributes:
        spec: The action convention, as `ActionSpec.to_dict()` gives it.
        cameras: Camera names in the order of the frames.
        camera_size: Side of the square picture that the cameras give [px].
        crop: (left, top) of the square of side `image.size` that is cut from it [px].
        history: Frames seen, in control steps relative to the present, oldest first; (0,) is the present alone.
        state_names: Names of the state's numbers; empty for a policy from pictures alone.
        words: The words that instructions are made of, in the order of their ids; others are read as unknown.
        prefix_attention, action_attention: `causal` as in the paper, or `bidirectional` within the part.
        draws: Draws of (time, noise) per training sample; the prefix is computed once for all of them.
        action_normalizer, state_normalizer: Statistics of the training data; the state's is None without a state.
    """

    spec: dict[str, Any]
    cameras: tuple[str, ...]
    action_normalizer: NormalizerConfig
    state_normalizer: NormalizerConfig | None = None
    image: ImageTokensConfig = ImageTokensConfig()  # noqa: RUF009  (frozen)
    backbone: BackboneConfig = BackboneConfig()
    decoder: ActionDecoderConfig = ActionDecoderConfig()  # noqa: RUF009
    camera_size: int = 224
    crop: tuple[int, int] = (0, 0)
    history: tuple[int, ...] = (-1, 0)
    state_names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    prefix_attention: Attention = "causal"
    action_attention: Attention = "causal"
    draws: int = 1

    def __post_init__(self) -> None:
        spec = ActionSpec.from_dict(self.spec)
        if spec.dim != self.decoder.action_dim:
            raise ValueError(f"the spec names {spec.dim} actions, the decoder has {self.decoder.action_dim}")
        if not self.cameras:
            raise ValueError("a policy needs at least one camera")
        if self.image.width != self.backbone.width or self.decoder.width != self.backbone.width:
            raise ValueError("image tokens, backbone and action decoder must have one width")
        if list(self.history) != sorted(set(self.history)) or self.history[-1] != 0:
            raise ValueError(f"history must rise to 0 without repeats, such as (-1, 0), got {self.history}")
        if self.action_normalizer.dim != spec.dim:
            raise ValueError(f"action statistics of {self.action_normalizer.dim} numbers for {spec.dim} actions")
        if (self.state_normalizer.dim if self.state_normalizer else 0) != len(self.state_names):
            raise ValueError(f"the state has {len(self.state_names)} numbers, its statistics do not fit")
        if min(self.crop) < 0 or max(self.crop) + self.image.size > self.camera_size:
            raise ValueError(
                f"a crop of {self.image.size} px at {self.crop} leaves the camera's {self.camera_size} px picture"
            )
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    @property
    def action_spec(self) -> ActionSpec:
        """The action convention."""
        return ActionSpec.from_dict(self.spec)

    @classmethod
    def tiny(
        cls, spec: ActionSpec, *, cameras: tuple[str, ...] = ("base_camera",), state_dim: int = 15
    ) -> "VipraConfig":
        """A one-second version for tests and documentation."""
        width = 32
        return cls(
            spec=spec.to_dict(),
            cameras=cameras,
            image=ImageTokensConfig.tiny(width=width),
            backbone=BackboneConfig(width=width, layers=2, heads=2, mlp=64, rope_theta=1e4),
            decoder=ActionDecoderConfig(width=width, action_dim=spec.dim, horizon=4),
            camera_size=64,
            history=(0,),
            state_names=tuple(f"s{i}" for i in range(state_dim)),
            action_normalizer=NormalizerConfig.identity(spec.dim),
            state_normalizer=NormalizerConfig.identity(state_dim) if state_dim else None,
            words=words_of(["push the cube", "pull it"]),
        )


class PolicyInput(NamedTuple):
    """What the network sees.

    Attributes:
        images: uint8 in 0..255, RGB, shape (B, V, T, camera_size, camera_size, 3), or already cut to `image.size`.
        state: Raw state, float32, shape (B, S).
        text: Word ids of the instruction, 0 where padded on the left, 1 for unknown words, int64, shape (B, L).
    """

    images: Tensor
    state: Tensor
    text: Tensor


class Prefix(NamedTuple):
    """A prefix after one pass: its keys and values, and which positions count.

    Attributes:
        cache: Keys and values of N positions.
        valid: True at positions that are not padding, shape (B, N).
    """

    cache: KVCache
    valid: Tensor


def words_of(instructions: Iterable[str]) -> tuple[str, ...]:
    """The different words of instructions, lower case, sorted."""
    return tuple(sorted({word for text in instructions for word in text.lower().split()}))


def encode_text(instructions: Sequence[str], words: tuple[str, ...]) -> Tensor:
    """Instructions as word ids from 2, padded with 0 on the left to the longest; unknown words are 1. int64 (B, L).

    Source: ours. A network from scratch knows no language; a pretrained one brings its own tokenizer.
    """
    ids = {word: index for index, word in enumerate(words, start=2)}
    rows = [[ids.get(word, 1) for word in text.lower().split()] for text in instructions]
    longest = max([1, *(len(row) for row in rows)])
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64)


class VipraPolicy(Pretrained):
    """Flow-matching policy network (ViPRA-FM when its weights come from video pretraining, Scratch-FM otherwise)."""

    Config = VipraConfig

    def __init__(self, config: VipraConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        self.image_tokens = ImageTokens(config.image)
        self.backbone = LlamaModel(config.backbone.llama())
        self.backbone.set_input_embeddings(nn.Identity())  # embeddings are ours; an unused table would stop strict DDP
        self.decoder = ActionDecoder(config.decoder)
        self.text = nn.Embedding(2 + len(config.words), width, padding_idx=0)
        self.delimiters = nn.Embedding(len(DELIMITERS), width)
        self.view = nn.Embedding(len(config.cameras) * len(config.history), width)
        for table in (self.text, self.delimiters, self.view):
            nn.init.normal_(table.weight, std=0.02)
        if config.state_names:
            self.proprio = nn.Sequential(nn.Linear(len(config.state_names), width), nn.SiLU(), nn.Linear(width, width))
        self.normalize_action = Normalizer(config.action_normalizer)
        if config.state_normalizer:
            self.normalize_state = Normalizer(config.state_normalizer)

    def embed_prefix(self, inputs: PolicyInput) -> tuple[Tensor, Tensor]:
        """Embeddings (B, N, D) of everything before the actions, and which positions are not padding (B, N)."""
        config = self.config
        views, side = len(config.cameras) * len(config.history), config.image.size
        images = inputs.images
        if images.shape[3:5] != (side, side):
            size = config.camera_size
            expect_shape("images", images, (None, len(config.cameras), len(config.history), size, size, 3))
            left, top = config.crop
            images = images[..., top : top + side, left : left + side, :]
        batch = images.shape[0]
        pictures = images.flatten(0, 2).permute(0, 3, 1, 2)
        frames = self.image_tokens(pictures).unflatten(0, (batch, views)) + self.view.weight[:, None]
        marks = dict(zip(DELIMITERS, self.delimiters.weight.to(frames).expand(batch, -1, -1).unbind(1), strict=True))
        parts = [marks["bos"][:, None], self.text(inputs.text).to(frames), marks["vision"][:, None]]
        parts.append(torch.cat((frames, marks["eof"][:, None, None].expand(-1, views, 1, -1)), 2).flatten(1, 2))
        parts.append(marks["end_vision"][:, None])
        if config.state_names:
            state = self.normalize_state(inputs.state)
            parts += [marks["proprio"][:, None], self.proprio(state)[:, None].to(frames), marks["end_proprio"][:, None]]
        parts.append(marks["action"][:, None])
        embeddings = torch.cat(parts, 1)
        valid = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        valid[:, 1 : 1 + inputs.text.shape[1]] = inputs.text > 0
        return embeddings, valid

    def compute_prefix(self, inputs: PolicyInput) -> Prefix:
        """One pass over everything before the actions."""
        embeddings, valid = self.embed_prefix(inputs)
        mask = self._mask(valid, valid.shape[1], self.config.prefix_attention, start=0)
        cache = KVCache()
        self.backbone(
            inputs_embeds=embeddings,
            attention_mask=additive(mask, embeddings.dtype),
            position_ids=positions(valid),
            past_key_values=cache,
            use_cache=True,
        )
        return Prefix(cache, valid)

    def velocity(self, prefix: Prefix, noisy: Tensor, t: Tensor) -> Tensor:
        """Velocity of normalised actions given a cached prefix; only the action tokens are computed.

        Args:
            prefix: From `compute_prefix`; unchanged afterwards.
            noisy: Shape (B, H, A).
            t: Shape (B,).

        Returns:
            Shape (B, H, A), float32.
        """
        hidden = self._read_actions(prefix, self.decoder.embed(noisy, t)[:, None])
        prefix.cache.rewind(prefix.valid.shape[1])
        return self.decoder.velocity(hidden)

    def _read_actions(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Hidden states of action tokens, (B, K * H, D), from their embeddings (B, K, H, D).

        The K chunks of a sample share its prefix and do not see each other. Their keys are left in the cache.
        """
        draws, horizon, start = tokens.shape[1], tokens.shape[2], prefix.valid.shape[1]
        one = prefix.valid.new_ones(horizon, horizon)
        block = one.tril() if self.config.action_attention == "causal" else one
        among = torch.block_diag(*[block] * draws).bool()
        seen = prefix.valid[:, None, None].expand(-1, 1, draws * horizon, -1)
        mask = torch.cat((seen, among.expand(len(seen), 1, -1, -1)), -1)
        place = prefix.valid.sum(1, keepdim=True) + torch.arange(horizon, device=tokens.device).repeat(draws)
        return self.backbone(
            inputs_embeds=tokens.flatten(1, 2),
            attention_mask=additive(mask, tokens.dtype),
            position_ids=place,
            past_key_values=prefix.cache,
            use_cache=True,
            cache_position=torch.arange(start, start + draws * horizon, device=tokens.device),
        ).last_hidden_state

    def velocity_uncached(self, embedded: tuple[Tensor, Tensor], noisy: Tensor, t: Tensor) -> Tensor:
        """The same velocity from one pass over the whole sequence, given what `embed_prefix` returned; for checking."""
        embeddings, prefix_valid = embedded
        actions = self.decoder.embed(noisy, t)
        start, count = embeddings.shape[1], actions.shape[1]
        valid = torch.cat((prefix_valid, prefix_valid.new_ones(noisy.shape[:2])), 1)
        mask = valid.new_zeros(valid.shape[0], 1, start + count, start + count)
        mask[:, :, :start, :start] = self._mask(prefix_valid, start, self.config.prefix_attention, start=0)
        mask[:, :, start:] = self._mask(valid, count, self.config.action_attention, start=start)
        hidden = self.backbone(
            inputs_embeds=torch.cat((embeddings, actions), 1),
            attention_mask=additive(mask, actions.dtype),
            position_ids=positions(valid),
            use_cache=False,
        ).last_hidden_state
        return self.decoder.velocity(hidden[:, start:])

    def loss(
        self, inputs: PolicyInput, actions: Tensor, valid: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Flow-matching loss of a batch.

        Args:
            inputs: What the policy sees.
            actions: Raw action chunks, shape (B, H, A).
            valid: False for actions past the end of their episode, shape (B, H); None scores all.
            generator: Of times and noise.

        Returns:
            `total`, a scalar.
        """
        draws, horizon = self.config.draws, self.config.decoder.horizon
        prefix = self.compute_prefix(inputs)
        data = self.normalize_action(actions).repeat_interleave(draws, 0)
        noise = torch.randn(data.shape, generator=generator, device=data.device)
        t = beta_time(data.shape[0], generator=generator, device=data.device)
        point = straight_path(noise, data, t, sigma_min=self.config.decoder.sigma_min)
        tokens = self.decoder.embed(point.x_t, point.t).unflatten(0, (-1, draws))
        hidden = self._read_actions(prefix, tokens)
        velocity = self.decoder.velocity(hidden.unflatten(1, (draws, horizon)).flatten(0, 1))
        weight = None if valid is None else valid.repeat_interleave(draws, 0)[..., None]
        return {"total": flow_matching_loss(velocity, point.target, weight=weight)}

    @torch.inference_mode()
    def sample(self, inputs: PolicyInput, noise: Tensor, solver: SolverSettings) -> Tensor:
        """Action chunks in raw units, shape (B, H, A), from noise of that shape; the prefix is computed once."""
        prefix = self.compute_prefix(inputs)
        normalised = solver.sample(lambda x, t: self.velocity(prefix, x, t), noise)
        return self.normalize_action.inverse(normalised)

    @torch.inference_mode()
    def sample_uncached(self, inputs: PolicyInput, noise: Tensor, solver: SolverSettings) -> Tensor:
        """`sample` without the cache: pictures are encoded once, the transformer reads the prefix at every step."""
        embedded = self.embed_prefix(inputs)
        normalised = solver.sample(lambda x, t: self.velocity_uncached(embedded, x, t), noise)
        return self.normalize_action.inverse(normalised)

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


def positions(valid: Tensor) -> Tensor:
    """Position of each token, counting only those that are not padding; int64, shape (B, N)."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what attention adds to its logits: 0 where seen, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
