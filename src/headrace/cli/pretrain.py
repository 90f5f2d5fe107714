"""`headrace pretrain`: train the video-language model of ViPRA on labelled videos."""

from pathlib import Path
from typing import Literal

BLOCKS = ("LlamaDecoderLayer",)


def pretrain(
    *,
    data: tuple[str, ...],
    labels: Path,
    out: Path,
    tokenizer: str | None = None,
    lam: Path | None = None,
    stride: tuple[int, ...] | None = None,
    rate: float | None = None,
    size: Literal["tiny", "small", "published"] = "small",
    fields: Literal["ls_la", "la", "ls", "ls_la1"] = "ls_la",
    context: Literal["pictures", "ids"] | None = None,
    language: str | None = None,
    camera_size: int = 224,
    crop: tuple[int, int] | None = None,
    cache: Path | None = None,
    decode: Literal["cache", "stream"] = "cache",
    steps: int = 50_001,
    batch_size: int = 320,
    lr: float = 4e-5,
    warmup: int = 0,
    schedule: Literal["constant", "cosine"] = "constant",
    move: int = 0,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    checkpointing: bool = False,
    shard: bool = False,
    seed: int = 0,
    resume: bool = False,
    track: tuple[Literal["tensorboard", "wandb"], ...] = (),
) -> int:
    """Train on videos with latent-action labels; the network for `headrace finetune --init` ends in OUT/model.

    Args:
        data: The labelled videos, in the order and with the strides or the rate that `headrace label` was given.
        labels: What `headrace label` wrote.
        out: Run folder with checkpoints and log.
        tokenizer: Discrete tokenizer of the frames: a folder or Hub id. Not needed for fields `la` with pictures.
        lam: The latent action model that the labels must be of; another one's are refused.
        stride: Frames between neighbouring frames, one for all or one per entry of `data`; 1 by default.
        rate: Instead of a stride, steps a second [Hz], as `headrace label` was given.
        size: Network size.
        fields: What is predicted: `ls_la` future frame and latent actions, `la` or `ls` only one of them, `ls_la1` the
            future frame and one latent step.
        context: Context frames through a trained encoder (`pictures`) or as the tokenizer's ids; by default ids at the
            published size, as in the paper, and pictures below.
        language: LLaMA-shaped language model to start from (the paper: LWM-Chat-1M): shape, text tokenizer, weights.
        camera_size: Frames are stretched to this side [px]; a policy's cameras must give the same.
        crop: (left, top) of the square that the network sees [px]; the middle by default.
        cache: Where frames' ids are kept; OUT/tokens by default.
        decode: Decode videos once into the frame cache, or on demand.
        steps: Updates.
        batch_size: Samples per update, over all processes.
        lr: Learning rate after the warm-up.
        warmup: Updates until then.
        schedule: Constant, as published, or a cosine to a tenth.
        move: Pictures are moved by up to so many pixels; for fields `la` with pictures only, as ids are of one crop.
        precision: Of the forward pass; `auto` is bf16 where the device multiplies it natively, else fp32.
        checkpointing: Compute activations twice, to save memory.
        shard: Spread the model over the processes of `accelerate launch`, block by block, for the published size.
        seed: Of everything.
        resume: Go on with an interrupted run, exactly.
        track: Also log to TensorBoard or Weights & Biases.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from headrace.datasets.latent_labels import LatentLabels
    from headrace.datasets.video_source import open_sources
    from headrace.robot import pretrain as stage
    from headrace.robot.label_clips import model_hash
    from headrace.robot.latent_action import LatentActionModel
    from headrace.robot.sizes import trunk_config
    from headrace.robot.vipra_pretraining import VipraPretraining

    wanted = None if lam is None else model_hash(LatentActionModel.from_pretrained(lam))
    found = LatentLabels(labels, lam_hash=wanted)
    encoder = None if tokenizer is None else stage.open_encoder(tokenizer)
    ids = context == "ids" or (context is None and size == "published")
    if ids and encoder is None:
        raise ValueError("frames as ids need --tokenizer (or choose --context pictures)")
    trunk = trunk_config(
        size,
        cameras=("video",),
        camera_size=camera_size,
        crop=crop,
        encoder=encoder.config if ids and encoder is not None else None,
        backbone=None if language is None else stage.backbone_of(language),
    )
    text = None if language is None else stage.text_tokenizer(language)
    config = stage.config_for(trunk, found, encoder, fields=fields, text=text)
    torch.manual_seed(seed)
    model = VipraPretraining(config)
    if encoder is not None and ids:
        model.image_tokens.get_submodule("encoder").load_state_dict(encoder.state_dict())
    if language is not None:
        stage.start_from_language_model(model, language)
    sources = open_sources(data, strides=stride, rate=rate)
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if encoder is not None:
        encoder.to(processes.device)
    samples = stage.open_data(
        sources, found, config, encoder, cache or out / stage.TOKEN_FOLDER, decode=decode,
        done=lambda part, parts: print(f"frames as ids: part {part + 1} of {parts}", flush=True),
        shard=(processes.process_index, processes.num_processes), wait=processes.wait_for_everyone,
    )  # fmt: skip
    del encoder  # its memory on the device
    settings = stage.PretrainSettings(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        move=move,
        precision=precision,
        checkpointing=checkpointing,
        seed=seed,
    )
    facts = {"data": list(data), "labels": found.header.lam_hash, "fields": fields, "size": size, "language": language}
    fitted = stage.pretrain(
        model, samples, settings, out, resume=resume, trackers=track, facts=facts, shard=BLOCKS if shard else ()
    )
    print(f"{fitted.step} updates on {len(samples)} samples in {fitted.seconds:.0f} s: {out / stage.MODEL_FOLDER}")
    print(f"a policy from it: headrace finetune --init {out / stage.MODEL_FOLDER} --dataset DEMONSTRATIONS --out OUT")
    return 0
