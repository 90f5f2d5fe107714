"""`headrace finetune`: train a policy on demonstrations."""

from pathlib import Path
from typing import Literal


def finetune(
    *,
    dataset: tuple[str, ...],
    out: Path,
    init: str = "scratch",
    size: Literal["tiny", "small", "published"] = "small",
    steps: int = 10_000,
    batch_size: int = 64,
    lr: float = 5e-4,
    seed: int = 0,
    precision: Literal["fp32", "bf16", "fp16"] = "bf16",
    resume: bool = False,
    track: tuple[Literal["tensorboard", "wandb"], ...] = (),
) -> int:
    """Train a flow-matching policy on LeRobot datasets and save it to OUT/model.

    Args:
        dataset: Folders or Hub ids of LeRobotDatasets v3.0, with one set of cameras and actions.
        out: Run folder with checkpoints and log; the policy ends in its `model` folder.
        init: Checkpoint to go on from, or `scratch`.
        size: Network size when from scratch.
        steps: Updates.
        batch_size: Samples per update, over all processes.
        lr: Peak learning rate.
        seed: Of data order, augmentation, times, noise and first weights.
        precision: `bf16` is several times faster where the processor multiplies it natively.
        resume: Go on with an interrupted run, exactly.
        track: Also log to TensorBoard or Weights & Biases.
    """
    from headrace.robot.finetune import FinetuneSettings, prepare, train_policy

    model, data = prepare(dataset, init=init, size=size, seed=seed)
    settings = FinetuneSettings(steps=steps, batch_size=batch_size, lr=lr, seed=seed, precision=precision)
    fitted = train_policy(
        model, data, settings, out, resume=resume, trackers=track, facts={"dataset": list(dataset), "init": init}
    )
    print(f"{fitted.step} updates in {fitted.seconds:.0f} s; the policy: {out / 'model'}")
    print(f"try it: headrace rollout {out / 'model'} --task TASK --episodes 24")
    return 0
