"""Pretraining from labelled videos: what belongs together is checked, then the one training loop runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headrace.datasets.frame_rate import common_rate
from headrace.datasets.latent_labels import LatentLabels
from headrace.datasets.video_clips import Decode, VideoClips
from headrace.datasets.video_source import VideoSource
from headrace.nn.precision import Precision
from headrace.nn.pretrained import resolve_folder
from headrace.robot.frame_codes import FrameCodesConfig
from headrace.robot.pretrain_data import Prepare, PretrainingData
from headrace.robot.token_cache import FrameTokens, cache_tokens, encoder_hash
from headrace.robot.vipra_config import BackboneConfig, PretrainingRecord, TrunkConfig, shared_fields
from headrace.robot.vipra_pretraining import PretrainingInput, VipraPretraining, VipraPretrainingConfig
from headrace.robot.vipra_trunk import words_of
from headrace.tokenizers.auto import TOKENIZERS, load_tokenizer
from headrace.training.batches import batches
from headrace.training.loop import Fitted, fit
from headrace.training.schedule import Schedule
from headrace.vlm.visual_encoder import VisualEncoder, VisualEncoderConfig

Fields = Literal["ls_la", "la", "ls", "ls_la1"]
MODEL_FOLDER, TOKEN_FOLDER = "model", "tokens"


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """How the network is trained; the defaults are the paper's.

    Attributes:
        steps: Updates.
        batch_size: Samples per update, over all processes.
        lr: Learning rate after `warmup` updates.
        schedule: `constant`, or a `cosine` to a tenth.
        move: Pictures are moved by up to so many pixels [px]; only where neither context nor future frame is ids.
        precision: Of the forward pass; `auto` is bf16 where the device multiplies it natively, else fp32.
        checkpointing: Whether activations are computed again in the backward pass, for memory.
    """

    steps: int = 50_001
    batch_size: int = 320
    lr: float = 4e-5
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    move: int = 0
    precision: Precision = "auto"
    checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 20


def open_encoder(source: str | Path) -> VisualEncoder:
    """A trained discrete tokenizer as an encoder of codes.

    Raises:
        ValueError: Not a tokenizer, or a continuous one.
        FileNotFoundError: No such folder or Hub id.
    """
    tokenizer = load_tokenizer(str(source))
    if tokenizer.kind != "discrete":
        raise ValueError(f"{source} is a continuous tokenizer; frames as ids need a discrete one, such as TokenFlow")
    path = f"{type(tokenizer).__module__}:{type(tokenizer).__name__}"
    family = next(name for name, entry in TOKENIZERS.items() if entry == path)
    encoder = VisualEncoder(VisualEncoderConfig.of_tokenizer(tokenizer, family=family, tokens="codes"))
    encoder.inner.load_state_dict(tokenizer.state_dict())
    return encoder.eval()


def labelled_rate(labels: LatentLabels) -> float | None:
    """Frames a second of the labelled windows [Hz]; None where the sources differ by more than `same_rate`."""
    return common_rate(labels.header.rates)


def config_for(
    trunk: TrunkConfig,
    labels: LatentLabels,
    encoder: VisualEncoder | None,
    *,
    fields: Fields = "ls_la",
    text: Any = None,
) -> VipraPretrainingConfig:
    """The network's config, with what labels, tokenizer and ablation decide.

    Args:
        trunk: Network, pictures and history, from `headrace.robot.sizes.trunk_config`.
        labels: Horizon and codes are theirs, words come from their instructions.
        encoder: Tokenizer of the future frame; None where nothing is predicted or read as ids.
        fields: `ls_la` future frame and latent actions, `la` or `ls` one of them, `ls_la1` one latent step.
        text: Text tokenizer of transformers that takes the place of the words.

    Raises:
        ValueError: Unknown fields, or a tokenizer missing.
    """
    if fields not in ("ls_la", "la", "ls", "ls_la1"):
        raise ValueError(f"fields are ls_la, la, ls or ls_la1, got {fields!r}")
    future = fields != "la"
    if encoder is None and (future or isinstance(trunk.image, FrameCodesConfig)):
        raise ValueError(f"fields {fields!r} need a frame tokenizer")
    header, strides = labels.header, set(labels.stride.tolist())
    record = PretrainingRecord(
        history=trunk.history,
        rate=labelled_rate(labels),
        horizon=header.horizon,
        latent_steps={"ls": 0, "ls_la1": 1}.get(fields, header.horizon),
        future=future,
        lam_hash=header.lam_hash,
        tokenizer_hash="" if encoder is None else encoder_hash(encoder),
        stride=strides.pop() if len(strides) == 1 else 1,
    )
    more: dict[str, Any] = {}
    if encoder is not None:
        more = {"frame_tokens": encoder.tokens_per_picture, "frame_codes": encoder.codes}
    if isinstance(trunk.image, FrameCodesConfig):
        more["reserved"] = trunk.image.reserved
    seen = shared_fields(trunk, TrunkConfig)
    if text is not None:
        seen |= {"text_vocabulary": len(text), "bos": text.bos_token_id, "eos": text.eos_token_id}
    else:
        seen["words"] = words_of(set(labels.instruction))
    return VipraPretrainingConfig(**seen, record=record, latent_tokens=header.tokens, latent_codes=header.codes, **more)


def open_data(
    sources: Sequence[VideoSource],
    labels: LatentLabels,
    config: VipraPretrainingConfig,
    encoder: VisualEncoder | None,
    cache: Path,
    *,
    decode: Decode = "cache",
    done: Any = lambda part, parts: None,
    shard: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> PretrainingData:
    """Samples of labelled videos; frames are tokenised into `cache` where that is not done yet.

    The encoder works where it lies; `done`, `shard` and `wait` are those of `cache_tokens`.

    Raises:
        ValueError: The labels are of another corpus, or do not fit the config.
    """
    corpus = VideoClips(sources, image_size=config.camera_size, decode=decode)
    if labels.header.corpus != corpus.fingerprint():
        raise ValueError(
            "these labels are of other videos or strides than those given; name the same, in the same order"
        )
    tokens: FrameTokens | None = None
    if encoder is not None:
        crop = (*config.crop, config.image.size)
        tokens = cache_tokens(corpus, encoder, cache, crop=crop, done=done, shard=shard, wait=wait)
    return PretrainingData(labels, corpus, tokens, config)


def pretraining_loss(model: VipraPretraining, batch: PretrainingInput, generator: torch.Generator) -> dict[str, Tensor]:
    """Loss as `fit` calls it."""
    return model.loss(batch, generator)


def pretrain(
    model: VipraPretraining,
    data: PretrainingData,
    settings: PretrainSettings,
    out: Path,
    *,
    resume: bool = False,
    trackers: tuple[Any, ...] = (),
    facts: dict[str, Any] | None = None,
    shard: tuple[str, ...] = (),
) -> Fitted:
    """Train and save to `out/model`; AdamW (0.9, 0.95) without weight decay, gradients clipped to 1.

    `shard`, such as `("LlamaDecoderLayer",)`, spreads the model over the processes (see `fit`): for the published size.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        ValueError: Resumed with other settings.
    """
    if settings.checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = Schedule(warmup=settings.warmup)
    if settings.schedule == "cosine":
        schedule = Schedule(kind="cosine", warmup=settings.warmup, steps=settings.steps, floor=0.1)
    fitted = fit(
        model,
        pretraining_loss,
        optimizer,
        batches(
            data,
            settings.batch_size,
            seed=settings.seed,
            transform=Prepare(model.config, model.encode_text, move=settings.move),
        ),
        steps=settings.steps,
        out=out,
        resume=resume,
        seed=settings.seed,
        schedule=schedule,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        trackers=trackers,
        settings={"pretrain": vars(settings), **(facts or {})},
        shard=shard,
    )
    model.save_pretrained(out / MODEL_FOLDER)
    return fitted


def backbone_of(source: str | Path) -> BackboneConfig:
    """The shape of a LLaMA-shaped language model.

    Raises:
        ValueError: Another architecture.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve_folder(source))
    if config.model_type != "llama":
        raise ValueError(f"{source} is a {config.model_type}; the trunk is LLaMA-shaped")
    return BackboneConfig(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        key_value_heads=config.num_key_value_heads,
    )


def text_tokenizer(source: str | Path) -> Any:
    """A language model's text tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_folder(source))


def start_from_language_model(model: VipraPretraining, source: str | Path) -> tuple[str, ...]:
    """Take over a LLaMA-shaped language model's blocks, its text table and its tokenizer, as ViPRA does with LWM.

    Args:
        model: Made with that model's width, depth and `text_vocabulary`.
        source: Folder or Hub id of a causal language model of transformers.

    Returns:
        Names of the parameters that stay as they were drawn.

    Raises:
        ValueError: Another shape, or blocks that it lacks.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(source)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {f"backbone.{name}": value for name, value in other.base_model.state_dict().items()}
    found["text.weight"] = found.pop("backbone.embed_tokens.weight")
    found["heads.spelling.weight"] = other.get_output_embeddings().weight.detach()
    own = model.state_dict()
    wanted = [name for name in own if name.startswith("backbone.") or name in found]
    wrong = [n for n in wanted if n not in found or found[n].shape != own[n].shape]
    if wrong or set(found) - set(own):
        surplus = sorted(set(found) - set(own))
        raise ValueError(f"{source} does not fit this network: {', '.join([*wrong, *surplus][:5])}")
    model.load_state_dict(found, strict=False)
    model.tokenizer = text_tokenizer(folder)
    return tuple(name for name in own if name not in found)
