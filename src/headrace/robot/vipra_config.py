"""Settings that all of ViPRA's networks share: the transformer, and what it sees."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import LlamaConfig

from headrace.contracts import ActionSpec
from headrace.datasets.frame_rate import same_rate
from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.frame_codes import FrameCodesConfig

Attention = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A LLaMA-shaped decoder; the defaults are LWM-Chat-1M's, which ViPRA builds on.

    Attributes:
        key_value_heads: Heads of keys and values where queries share them; None for as many as `heads`.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 11008
    rope_theta: float = 5e7
    key_value_heads: int | None = None

    def __post_init__(self) -> None:
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.key_value_heads} key/value heads")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")

    def llama(self) -> LlamaConfig:
        """The transformers configuration of this shape, with a token table of one row: embeddings are ours."""
        shape: dict[str, Any] = {  # transformers makes this constructor at run time; its declared one has no such names
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads or self.heads,
            "intermediate_size": self.mlp,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "vocab_size": 1,
            "max_position_embeddings": 4096,
            "attn_implementation": "eager",  # its backward pass was the faster one on a CPU: 0.79 against 0.93 s a step
        }
        return LlamaConfig(**shape)


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """What a network sees and with what it reads it.

    Attributes:
        cameras: Camera names in the order of the frames.
        image: Frames as rows of a trained encoder, or as ids of a frozen tokenizer (the paper's).
        backbone: The transformer.
        camera_size: Side of the square picture that the cameras give [px].
        crop: (left, top) of the square of side `image.size` that is cut from it [px].
        history: Frames seen, in steps relative to the present, oldest first; (0,) is the present alone.
        words: The words that instructions are made of, in the order of their ids; others are read as unknown.
        text_vocabulary: Size of a text tokenizer that takes the place of `words`; 0 for none.
        bos, eos: Two of its ids.
        prefix_attention: `causal` as in the paper, or `bidirectional`, among everything that is given.
    """

    cameras: tuple[str, ...]
    image: ImageTokensConfig | FrameCodesConfig = ImageTokensConfig()  # noqa: RUF009  (frozen)
    backbone: BackboneConfig = BackboneConfig()
    camera_size: int = 224
    crop: tuple[int, int] = (0, 0)
    history: tuple[int, ...] = (-1, 0)
    words: tuple[str, ...] = ()
    text_vocabulary: int = 0
    bos: int = 1
    eos: int = 2
    prefix_attention: Attention = "causal"

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError("a policy needs at least one camera")
        if self.image.width != self.backbone.width:
            raise ValueError(
                f"image tokens and backbone must have one width, got {self.image.width} and {self.backbone.width}"
            )
        if list(self.history) != sorted(set(self.history)) or not self.history or self.history[-1] != 0:
            raise ValueError(f"history must rise to 0 without repeats, such as (-1, 0), got {self.history}")
        if min(self.crop) < 0 or max(self.crop) + self.image.size > self.camera_size:
            raise ValueError(
                f"a crop of {self.image.size} px at {self.crop} leaves the camera's {self.camera_size} px picture"
            )
        if self.text_vocabulary < 0 or (self.text_vocabulary and self.words):
            raise ValueError("text comes from a tokenizer (text_vocabulary) or from words, not from both")
        if self.prefix_attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention is 'causal' or 'bidirectional', got {self.prefix_attention!r}")

    @property
    def views(self) -> int:
        """Frames in a sequence: cameras times history."""
        return len(self.cameras) * len(self.history)


@dataclass(frozen=True, kw_only=True)
class PretrainingRecord:
    """What a network was pretrained on; kept in every policy that comes of it.

    Attributes:
        history: Frames seen, relative to the present, in steps of `rate`.
        rate: Steps a second of labels, history and horizon [Hz]; None where the videos differed.
        horizon: Steps from the present to the future frame.
        latent_steps: Latent actions predicted, of `horizon`; 0 for none.
        future: Whether the future frame was predicted.
        lam_hash: Which latent action model wrote the labels.
        tokenizer_hash: Which tokenizer the future frame's ids are of.
        stride: Frames of the videos per step, so that they had `rate * stride` frames a second; 1 where they differed.
    """

    history: tuple[int, ...]
    rate: float | None
    horizon: int
    latent_steps: int
    future: bool
    lam_hash: str
    tokenizer_hash: str
    stride: int = 1

    def frames_per_step(self, rate: float) -> int:
        """Frames per step in data of this frame rate [Hz]: `stride` at the videos' own rate, and 1 at any other."""
        own = self.rate is not None and self.stride > 1 and same_rate(self.rate * self.stride, rate)
        return self.stride if own else 1

    def history_at(self, rate: float) -> tuple[int, ...]:
        """`history` in frames of data of this frame rate [Hz]: at the videos' own rate the same moments as there."""
        return tuple(step * self.frames_per_step(rate) for step in self.history)


@dataclass(frozen=True, kw_only=True)
class ActorConfig(TrunkConfig):
    """A network that acts, whatever its head: what it commands, what it feels, and where it comes from.

    Attributes:
        spec: The action convention, as `ActionSpec.to_dict()` gives it.
        state_names: Names of the state's numbers; empty for a policy from pictures alone.
        state_normalizer: Statistics of the state; None without a state.
        pretraining: What the network was pretrained on; None for a network from scratch.
    """

    spec: dict[str, Any]
    state_normalizer: NormalizerConfig | None = None
    state_names: tuple[str, ...] = ()
    pretraining: PretrainingRecord | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.state_normalizer.dim if self.state_normalizer else 0) != len(self.state_names):
            raise ValueError(f"the state has {len(self.state_names)} numbers, its statistics do not fit")

    @property
    def action_spec(self) -> ActionSpec:
        """The action convention."""
        return ActionSpec.from_dict(self.spec)


def shared_fields(config: TrunkConfig, of: type[TrunkConfig]) -> dict[str, Any]:
    """The values of `config` for every field of class `of`; to build one kind of config from another."""
    return {field.name: getattr(config, field.name) for field in fields(of)}
