"""ViPRA from beginning to end in ManiSkill: videos without actions, latent actions, pretraining, few demonstrations.

    python recipes/vipra_maniskill/story.py --size smoke --out runs/vipra_smoke    # minutes; shows that all parts meet
    python recipes/vipra_maniskill/story.py --size cpu --out runs/vipra            # two cores, an evening
    python recipes/vipra_maniskill/story.py --size gpu --out runs/vipra_gpu        # sized for one GPU hour

Stages: videos, tokenizer, lam, labels, pretrain, demonstrations, finetune, rollout. Each leaves its folder under OUT
and is skipped when that is complete; a stage that was cut off goes on. `--only finetune rollout` runs some of them,
`--videos` and `--demonstrations` take LeRobot datasets that are there already; `--stride` or `--rate` brings videos to
the steps of a model that is there already (`--lam`). Every number stands in `SIZES`.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tokenizer import train_tokenizer

from headrace.cli.collect import collect
from headrace.cli.finetune import finetune
from headrace.cli.label import label
from headrace.cli.pretrain import pretrain
from headrace.cli.rollout import rollout
from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_source import open_sources

RECIPES = Path(__file__).resolve().parents[1]
STAGES = ("videos", "tokenizer", "lam", "labels", "pretrain", "demonstrations", "finetune", "rollout")
VIDEO_SEED, DEMONSTRATION_SEED = 2_000_000, 1_000_000  # evaluations start at 0, so no layout is met twice


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one size of the story costs.

    Attributes:
        network: Size of the policy's network.
        crop: (left, top) of the square that the network sees of the 224 px pictures; None is the middle.
        videos: Episodes per task that are rendered and whose actions are never read.
        demonstrations: Episodes per task that the policy is trained on.
        stride: Frames of the videos between neighbouring frames of latent actions, labels and pretraining.
        label_horizon: Steps of that stride from the present to the future frame.
        horizon: Actions of a chunk, at the control rate.
        token_frames, token_steps: Pictures and updates of the tokenizer.
        lam_steps: Updates of the latent action model.
        pretrain_steps, pretrain_batch: Updates and samples of pretraining.
        finetune_steps, finetune_batch: Of the policy.
        episodes: Rollouts per task.
    """

    network: str
    crop: tuple[int, int] | None
    videos: int
    demonstrations: int
    stride: int
    label_horizon: int
    horizon: int
    token_frames: int
    token_steps: int
    lam_steps: int
    pretrain_steps: int
    pretrain_batch: int
    finetune_steps: int
    finetune_batch: int
    episodes: int


SMOKE = Size(
    network="tiny", crop=(80, 96), videos=6, demonstrations=2, stride=2, label_horizon=2, horizon=4, token_frames=64,
    token_steps=4, lam_steps=6, pretrain_steps=6, pretrain_batch=8, finetune_steps=6, finetune_batch=8, episodes=2,
)  # fmt: skip
CPU = Size(
    network="small", crop=(48, 76), videos=200, demonstrations=25, stride=4, label_horizon=4, horizon=14,
    token_frames=4000, token_steps=800, lam_steps=1200, pretrain_steps=2000, pretrain_batch=64, finetune_steps=2000,
    finetune_batch=64, episodes=100,
)  # fmt: skip
GPU = replace(
    CPU, videos=1000, token_frames=20_000, token_steps=6000, lam_steps=8000, pretrain_steps=12_000, pretrain_batch=128,
    finetune_steps=6000, finetune_batch=128,
)  # fmt: skip
SIZES = {"smoke": SMOKE, "cpu": CPU, "gpu": GPU}


@dataclass(frozen=True, kw_only=True)
class Story:
    """What can be chosen.

    Attributes:
        out: Everything goes here.
        size: One of `SIZES`.
        tasks: Names of ManiSkill tasks with a scripted expert.
        fields: What is predicted: `ls_la`, or the ablations `la`, `ls`, `ls_la1`.
        head: Of the policy.
        videos: Datasets or folders of videos in place of rendered ones, such as recordings of other arms.
        demonstrations: Datasets in place of collected ones, one per task.
        tokenizer, lam: Trained models in place of training them.
        held_out: Of so many videos one is kept from the latent action model, to judge it; the recipe's 4 if not given.
        stride: Frames of the videos between neighbouring frames, in place of the size's.
        rate: With `lam`, instead of a stride: steps a second [Hz], for videos of several frame rates.
        override: `rate` where videos or demonstrations are meant to have another rate than what was trained before.
        only: Stages to run; all if empty.
        processes: Simulator processes.
        seed: Of training.
    """

    out: Path
    size: str = "smoke"
    tasks: tuple[str, ...] = ("PushCube-v1", "PickCube-v1", "StackCube-v1")
    fields: str = "ls_la"
    head: str = "flow"
    videos: tuple[str, ...] = ()
    demonstrations: tuple[str, ...] = ()
    tokenizer: Path | None = None
    lam: Path | None = None
    held_out: int | None = None
    stride: int | None = None
    rate: float | None = None
    override: tuple[Literal["rate"], ...] = ()
    only: tuple[str, ...] = ()
    processes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r} (known: {', '.join(SIZES)})")
        unknown = set(self.only) - set(STAGES)
        if unknown:
            raise ValueError(f"no stages {sorted(unknown)} (there are: {', '.join(STAGES)})")
        if self.rate is not None and (self.stride is not None or self.lam is None):
            raise ValueError(
                "--rate goes with --lam and takes the place of --stride, which the model here is trained at"
            )


def collected(story: Story, name: str, episodes: int, seed: int) -> tuple[str, ...]:
    """Datasets of all tasks below OUT/name; collects those that are missing."""
    folders = [story.out / name / task for task in story.tasks]
    for task, folder in zip(story.tasks, folders, strict=True):
        if not folder.exists():
            collect(task=task, out=folder, episodes=episodes, seed=seed, num_envs=story.processes)
    return tuple(map(str, folders))


def pictures_of(videos: tuple[str, ...], folder: Path, count: int, crop: tuple[int, int, int]) -> Path:
    """About `count` frames of the videos as PNG files, cut as the network sees them."""
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = VideoClips(open_sources(videos), image_size=224)
        left, top, side = crop
        each = max(1, count // len(corpus))
        for video in range(len(corpus)):
            frames = np.linspace(0, corpus.lengths[video] - 1, each).astype(np.int64)
            for frame, picture in zip(frames, corpus.read(video, frames), strict=True):
                Image.fromarray(picture[top : top + side, left : left + side]).save(folder / f"{video}_{frame}.png")
        done.touch()
    return folder


def tell(stage: str, story: Story) -> bool:
    """Whether a stage is to run."""
    wanted = not story.only or stage in story.only
    print(f"== {stage}" + ("" if wanted else " (not asked for)"), flush=True)
    return wanted


def resumed(folder: Path) -> bool:
    """Whether a training run in `folder` goes on."""
    return (folder / "run.json").is_file()


def main(story: Story) -> None:
    """Tell the story."""
    size, out = SIZES[story.size], story.out
    side = {"tiny": 64, "small": 128}[size.network]
    left, top = size.crop or (112 - side // 2,) * 2
    tokenizer, lam = story.tokenizer or out / "tokenizer" / "model", story.lam or out / "lam" / "model"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stride = size.stride if story.stride is None else story.stride
    strides = None if story.rate is not None else (stride,)
    videos = story.videos or tuple(str(out / "videos" / task) for task in story.tasks)
    demonstrations = story.demonstrations or tuple(str(out / "demonstrations" / task) for task in story.tasks)

    if tell("videos", story) and not story.videos:
        collected(story, "videos", size.videos, VIDEO_SEED)
    if tell("tokenizer", story) and story.tokenizer is None:
        pictures = pictures_of(videos, out / "pictures", size.token_frames, (left, top, side))
        train_tokenizer(pictures, out / "tokenizer", steps=size.token_steps, seed=story.seed)
    if tell("lam", story) and story.lam is None and not lam.exists():
        command = [sys.executable, str(RECIPES / "latent_actions.py"), "--data", *videos, "--out", str(out / "lam")]
        command += ["--steps", str(size.lam_steps), "--seed", str(story.seed), "--stride", str(stride)]
        command += ["--window", *(f"{edge / 224:.4f}" for edge in (left, top, side))]  # what the policy sees
        command += ["--held-out", str(story.held_out)] if story.held_out is not None else []
        command += ["--resume"] if resumed(out / "lam") else []
        subprocess.run(command, check=True)
    if tell("labels", story):
        label(
            lam,
            data=videos,
            out=out / "labels",
            stride=strides,
            rate=story.rate,
            horizon=size.label_horizon,
            device=device,
            decode="cache",
            override=story.override,
        )
    if tell("pretrain", story):
        pretrain(
            data=videos,
            labels=out / "labels",
            out=out / f"pretrain_{story.fields}",
            tokenizer=str(tokenizer),
            lam=lam,
            stride=strides,
            rate=story.rate,
            size=size.network,  # type: ignore[arg-type]
            fields=story.fields,  # type: ignore[arg-type]
            crop=(left, top),
            cache=out / "tokens",
            steps=size.pretrain_steps,
            batch_size=size.pretrain_batch,
            lr=5e-4,
            warmup=size.pretrain_steps // 20,
            schedule="cosine",
            seed=story.seed,
            resume=resumed(out / f"pretrain_{story.fields}"),
        )
    if tell("demonstrations", story) and not story.demonstrations:
        collected(story, "demonstrations", size.demonstrations, DEMONSTRATION_SEED)
    policy = out / f"policy_{story.fields}_{story.head}"
    if tell("finetune", story):
        finetune(
            dataset=demonstrations,
            out=policy,
            init=str(out / f"pretrain_{story.fields}" / "model"),
            head=story.head,  # type: ignore[arg-type]
            demonstrations=size.demonstrations,
            horizon=size.horizon,
            override=story.override,
            lam=lam,
            steps=size.finetune_steps,
            batch_size=size.finetune_batch,
            seed=story.seed,
            resume=resumed(policy),
        )
    if tell("rollout", story):
        rollout(
            str(policy / "model"),
            task=",".join(story.tasks),
            episodes=size.episodes,
            num_envs=story.processes,
            out=out / f"rollout_{story.fields}_{story.head}",
        )


if __name__ == "__main__":
    main(tyro.cli(Story))
