"""`headrace finetune`: train a policy on demonstrations."""

from pathlib import Path
from typing import Literal


def finetune(
    *,
    dataset: tuple[str, ...],
    out: Path,
    init: str = "scratch",
    size: Literal["tiny", "small", "published"] = "small",
    head: Literal["flow", "bins"] = "flow",
    bins: int = 2047,
    segments: int = 1,
    demonstrations: int | None = None,
    history: tuple[int, ...] | None = None,
    horizon: int | None = None,
    camera_size: int | None = None,
    crop: tuple[int, int] | None = None,
    override: tuple[Literal["history", "rate"], ...] = (),
    lam: Path | None = None,
    lora: int = 0,
    predict_frame: float = 0.0,
    tokenizer: str | None = None,
    new_frame_head: bool = False,
    steps: int = 10_000,
    batch_size: int = 64,
    lr: float | None = None,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    resume: bool = False,
    track: tuple[Literal["tensorboard", "wandb"], ...] = (),
) -> int:
    """Train a policy on LeRobot datasets and save it to OUT/model.

    Args:
        dataset: Folders or Hub ids of LeRobotDatasets v3.0, with one set of cameras and actions.
        out: Run folder with checkpoints and log; the policy ends in its `model` folder.
        init: `scratch`, a policy to go on from, or a network from `headrace pretrain`.
        size: Network size when from scratch.
        head: `flow` (ViPRA-FM) or `bins` (ViPRA-AR); a policy to go on from has its own.
        bins: Bins per number, for `bins`.
        segments: Time segments of a new flow head, each with its own blocks (BFM); 1 is ViPRA's.
        demonstrations: Episodes of each dataset; all if not given.
        history: Frames seen, such as -1 0, where it is to differ from pretraining's (needs --override history).
        horizon: Actions of a chunk; by default the size's, or as many as pretraining's horizon has steps, which are
            longer than the robot's where it read videos with a stride.
        camera_size: From scratch, pictures are stretched to this side [px]; by default the whole picture is shrunk to
            what the network sees and a margin.
        crop: (left, top) of the square that the network sees of it [px]; the middle by default.
        override: Differences from pretraining that are wanted.
        lam: Latent action model that the pretraining must have learned from; another one is refused.
        lora: Rank of low-rank adapters on the transformer, which then stays as it is; 0 trains everything.
        predict_frame: Weight of the future frame, predicted beside the actions while training (the released code: 1);
            0 for none, as in the paper's best. The policy that is saved has no part in it.
        tokenizer: With `predict_frame`, the frame tokenizer of the pretraining: a folder or Hub id.
        new_frame_head: With `predict_frame`, begin a new head on a network pretrained without the future frame (fields
            `la`): the paper's SP3.
        steps: Updates.
        batch_size: Samples per update, over all processes.
        lr: Peak learning rate; by default 5e-4, and 4e-5 for networks as wide as the published one.
        seed: Of data order, augmentation, times, noise and first weights.
        precision: `auto` is bf16 where the device multiplies it natively, else fp32.
        resume: Go on with an interrupted run, exactly.
        track: Also log to TensorBoard or Weights & Biases.
    """
    from headrace.robot.carry_over import parameter_share
    from headrace.robot.finetune import FinetuneSettings, train_policy, usual_lr
    from headrace.robot.frame_beside import PolicyWithFrame, open_frames
    from headrace.robot.frame_beside import predict_frame as beside
    from headrace.robot.label_clips import model_hash
    from headrace.robot.latent_action import LatentActionModel
    from headrace.robot.lora import LoraSettings, add_adapters
    from headrace.robot.policy_start import Start, prepare
    from headrace.robot.vipra import VipraPolicy
    from headrace.robot.vipra_bins import VipraBins

    frames = None
    if predict_frame:
        if tokenizer is None:
            raise ValueError("--predict-frame needs --tokenizer, the frame tokenizer of the pretraining")
        frames = open_frames(init, tokenizer, new_head=new_frame_head)
    elif tokenizer is not None or new_frame_head:
        raise ValueError("--tokenizer and --new-frame-head belong to --predict-frame WEIGHT; give it too or leave them")
    start = Start(
        init=init,
        size=size,
        head=head,
        bins=bins,
        segments=segments,
        demonstrations=demonstrations,
        history=history,
        horizon=horizon,
        camera_size=camera_size,
        crop=crop,
        override=override,
        lam_hash=None if lam is None else model_hash(LatentActionModel.from_pretrained(lam)),
        seed=seed,
    )
    policy, data, report = prepare(dataset, start)
    if report is not None:
        print(f"{parameter_share(report, policy):.0%} of the numbers are from {init}; fresh: {_heads(report.fresh)}")
    if lora:
        print(f"{add_adapters(policy, LoraSettings(rank=lora, alpha=2 * lora)):,} numbers in adapters of rank {lora}")
    lr = usual_lr(policy.config) if lr is None else lr
    settings = FinetuneSettings(steps=steps, batch_size=batch_size, lr=lr, seed=seed, precision=precision)
    facts = {"dataset": list(dataset), "init": init, "demonstrations": demonstrations, "lora": lora}
    model: VipraPolicy | VipraBins | PolicyWithFrame = policy
    if frames is not None:
        model, data = beside(policy, data, frames, predict_frame)
    fitted = train_policy(model, data, settings, out, resume=resume, trackers=track, facts=facts)
    print(f"{fitted.step} updates in {fitted.seconds:.0f} s; the policy: {out / 'model'}")
    print(f"try it: headrace rollout {out / 'model'} --task TASK --episodes 24")
    return 0


def _heads(names: tuple[str, ...]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names}))
