"""ViPRA's third stage: a causal transformer over instruction, frames and proprioception, with action tokens at its end.

Sequence: BOS instruction <vision> frame EOF ... frame EOF </vision> <proprio> state </proprio> <action> a_0 .. a_{H-1}
Without pretraining this is the paper's "Scratch-FM". Source: arXiv 2511.07732, sroutray/vipra@d5d8c0d, finetuning.
Where the released code spells delimiters as text of its language model's tokenizer, a network from scratch has one
learned vector for each.
"""
# Shape letters: B batch, V cameras, T frames of history, N prefix length, H horizon, A action dimension, D width,
# S state dimension, K draws of (time, noise) per sample.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import Normalizer, NormalizerConfig
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import SolverSettings
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.action_decoder import ActionDecoder, ActionDecoderConfig, BoundActions
from headrace.robot.action_pass import ActionPass, reads_weights_of
from headrace.robot.vipra_actor import PolicyInput, Prefix, VipraActor
from headrace.robot.vipra_config import ActorConfig, Attention, BackboneConfig
from headrace.robot.vipra_trunk import additive, positions, words_of
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.sequence import SequenceLayout
from headrace.vlm.vipra_sequences import finetuning


@dataclass(frozen=True, kw_only=True)
class VipraConfig(ActorConfig):
    """The policy network and everything that a rollout must know about it.

    Attributes:
        action_attention: `causal` as in the paper, or `bidirectional`, among the actions.
        draws: Draws of (time, noise) per training sample; the prefix is computed once for all of them.
        action_normalizer: Statistics of the training data.
    """

    action_normalizer: NormalizerConfig
    decoder: ActionDecoderConfig = ActionDecoderConfig()  # noqa: RUF009
    action_attention: Attention = "causal"
    draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = ActionSpec.from_dict(self.spec)
        if spec.dim != self.decoder.action_dim:
            raise ValueError(f"the spec names {spec.dim} actions, the decoder has {self.decoder.action_dim}")
        if self.decoder.width != self.backbone.width:
            raise ValueError("image tokens, backbone and action decoder must have one width")
        if self.action_normalizer.dim != spec.dim:
            raise ValueError(f"action statistics of {self.action_normalizer.dim} numbers for {spec.dim} actions")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

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


class VipraPolicy(VipraActor):
    """Flow-matching policy network (ViPRA-FM when its weights come from video pretraining, Scratch-FM otherwise)."""

    Config = VipraConfig

    def __init__(self, config: VipraConfig) -> None:
        super().__init__(config)
        self.decoder = ActionDecoder(config.decoder)
        self.normalize_action = Normalizer(config.action_normalizer)

    @property
    def layout(self) -> SequenceLayout:
        """The whole sequence; actions are slots."""
        config = self.config.decoder
        return finetuning(self.sizes(horizon=config.horizon, action_dim=config.action_dim))

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
        return self.decoder.velocity(hidden, noisy, t)

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
        hidden = self._read_whole(embedded, self.decoder.embed(noisy, t), None)
        return self.decoder.velocity(hidden[:, embedded[1].shape[1] :], noisy, t)

    def _read_whole(self, embedded: tuple[Tensor, Tensor], actions: Tensor, cache: KVCache | None) -> Tensor:
        """Hidden states of prefix and action tokens, shape (B, N + H, D), from one pass over both.

        Args:
            embedded: What `embed_prefix` returned.
            actions: Embeddings of action tokens, shape (B, H, D).
            cache: Takes the keys and values of all positions; None keeps none.
        """
        embeddings, prefix_valid = embedded
        start, count = embeddings.shape[1], actions.shape[1]
        valid = torch.cat((prefix_valid, prefix_valid.new_ones(actions.shape[:2])), 1)
        mask = valid.new_zeros(valid.shape[0], 1, start + count, start + count)
        mask[:, :, :start, :start] = self._mask(prefix_valid, start, self.config.prefix_attention, start=0)
        mask[:, :, start:] = self._mask(valid, count, self.config.action_attention, start=start)
        return self.backbone(
            inputs_embeds=torch.cat((embeddings, actions), 1),
            attention_mask=additive(mask, actions.dtype),
            position_ids=positions(valid),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

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
        return self.loss_after(self.compute_prefix(inputs), actions, valid, generator)

    def loss_after(
        self, prefix: Prefix, actions: Tensor, valid: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`loss` of a prefix that is computed already; its cache is used up."""
        draws, horizon = self.config.draws, self.config.decoder.horizon
        data = self.normalize_action(actions).repeat_interleave(draws, 0)
        noise = torch.randn(data.shape, generator=generator, device=data.device)
        t = self.decoder.draw_times(data.shape[0], generator, data.device)
        point = straight_path(noise, data, t, sigma_min=self.config.decoder.sigma_min)
        tokens = self.decoder.embed(point.x_t, point.t).unflatten(0, (-1, draws))
        hidden = self._read_actions(prefix, tokens)
        velocity = self.decoder.velocity(hidden.unflatten(1, (draws, horizon)).flatten(0, 1), point.x_t, point.t)
        weight = None if valid is None else valid.repeat_interleave(draws, 0)[..., None]
        return {"total": flow_matching_loss(velocity, point.target, weight=weight)}

    @torch.inference_mode()
    def sample(self, inputs: PolicyInput, noise: Tensor, solver: SolverSettings) -> Tensor:
        """Action chunks in raw units, shape (B, H, A), from noise of that shape.

        The first pass reads the prefix and the first action tokens together, as the released code does; each later one
        computes the action tokens alone.
        """
        embedded = self.embed_prefix(inputs)
        later: Callable[[Tensor], Tensor] | None = None

        def read(tokens: Tensor) -> Tensor:
            nonlocal later
            if later is not None:
                return later(tokens)
            cache, start = KVCache(), embedded[1].shape[1]
            hidden = self._read_whole(embedded, tokens, cache)
            cache.rewind(start)
            later = self._later_steps(Prefix(cache, embedded[1], hidden[:, start - 1]))
            return hidden[:, start:]

        return self.normalize_action.inverse(BoundActions(self.decoder, read).sample(noise, solver))

    def _later_steps(self, prefix: Prefix) -> Callable[[Tensor], Tensor]:
        """Action tokens (B, H, D) to their hidden states given a prefix, for many calls; without gradients."""
        if reads_weights_of(self.backbone):
            causal, horizon = self.config.action_attention == "causal", self.config.decoder.horizon
            return ActionPass(self.backbone, prefix.cache, prefix.valid, horizon=horizon, causal=causal)

        def read(tokens: Tensor) -> Tensor:
            hidden = self._read_actions(prefix, tokens[:, None])
            prefix.cache.rewind(prefix.valid.shape[1])
            return hidden

        return read

    @torch.inference_mode()
    def sample_uncached(self, inputs: PolicyInput, noise: Tensor, solver: SolverSettings) -> Tensor:
        """`sample` without the cache: pictures are encoded once, the transformer reads the prefix at every step."""
        embedded = self.embed_prefix(inputs)
        bound = BoundActions(
            self.decoder, lambda tokens: self._read_whole(embedded, tokens, None)[:, embedded[1].shape[1] :]
        )
        return self.normalize_action.inverse(bound.sample(noise, solver))
