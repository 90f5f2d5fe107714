"""headrace's small policy against LeRobot's ACT, Diffusion Policy and SmolVLA: same demonstrations, minutes and seeds.

Usage: python benchmarks/against_lerobot.py --dataset runs/demo_policy/demonstrations/PickCube-v1 --task PickCube-v1 \
    --minutes 30 --episodes 100 --out runs/against_lerobot
The budget is processor time on `--threads` threads, so that other work on the machine takes nothing from a contender.
All see the same 128 px crop through the same reader, train under the same precision with their own optimizer
settings, and are rolled out by the same runner, one environment at a time. LeRobot's networks and losses are LeRobot's
own code, from random weights (no hub here); Diffusion Policy samples with ten DDIM steps, for 100 DDPM steps take half
a minute a chunk on a CPU. SmolVLA is LeRobot's class on a vision-language model of its kind and of our policy's size,
trained whole: config, word list and processor are written to a folder, which is named as the model, for the published
one comes from the hub. A run that was cut off goes on with the contenders that are not finished.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from headrace.contracts import ActionChunk, Observation
from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.normalize import Normalizer, NormalizerConfig
from headrace.flow.solver import SolverSettings
from headrace.nn.precision import mixed
from headrace.robot.chunking import RecedingHorizon
from headrace.robot.finetune import (
    FinetuneSettings,
    fit_to_data,
    parameter_groups,
    policy_loss,
    spec_of,
    training_batches,
)
from headrace.robot.policy import FlowPolicy, settle
from headrace.robot.sizes import policy_config
from headrace.robot.vipra import VipraPolicy
from headrace.sim.rollout import RolloutSettings, roll_out
from headrace.sim.run_folder import write_json
from headrace.sim.tasks import find_task
from headrace.training.batches import batches

CROP, SIDE = (48, 76), 128
IMAGE, STATE, ACTION = "observation.images.base_camera", "observation.state", "action"
WORDS = "observation.language"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data, budget and evaluation; `contenders` are run in this order. Eight is the batch of `lerobot-train`."""

    dataset: Path
    task: str = "PickCube-v1"
    minutes: float = 30.0
    episodes: int = 100
    seed: int = 0
    out: Path = Path("runs/against_lerobot")
    contenders: tuple[str, ...] = ("headrace", "act", "diffusion", "smolvla")
    batch_size: int = 32
    lerobot_batch_size: int = 8
    threads: int = 1


def small_vlm(folder: Path, instructions: Sequence[str]) -> Path:
    """A SmolVLM for LeRobot's `vlm_model_name`: config, word list and processor, no weights; nothing from the hub.

    SigLIP-shaped vision of 4 blocks on 128 px in patches of 16, a language model of 4 blocks, both 192 wide; 16 tokens
    a picture. The published one has 12 and 16 blocks, 768 and 960 wide, and 64 tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    marks = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = ["<pad>", "<unk>", *marks.values(), *sorted({word for text in instructions for word in text.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_specific_special_tokens=marks
    )
    language = LlamaConfig(
        vocab_size=len(words),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        pad_token_id=0,
    )
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = SmolVLMConfig(
        text_config=language,
        vision_config={**vision, "image_size": SIDE, "patch_size": 16},
        scale_factor=2,
        image_token_id=words.index("<image>"),
        pad_token_id=0,
    )
    config.save_pretrained(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=16).save_pretrained(
        folder
    )
    return folder


def lerobot_policy(name: str, state_dim: int, action_dim: int, *, vlm: Path | None = None) -> Any:
    """A policy with LeRobot's defaults but for chunk lengths (and ten DDIM steps); SmolVLA on `vlm`, trained whole."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config

    options: dict[str, Any] = {
        "input_features": {
            IMAGE: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)),
            STATE: PolicyFeature(FeatureType.STATE, (state_dim,)),
        },
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))},
        "device": "cpu",
    }
    if name == "act":
        options |= {"chunk_size": 14, "n_action_steps": 7, "pretrained_backbone_weights": None}
    elif name == "smolvla":
        options |= {"chunk_size": 14, "n_action_steps": 7, "vlm_model_name": str(vlm), "load_vlm_weights": False}
        options |= {"resize_imgs_with_padding": (SIDE, SIDE)}
        options |= {"freeze_vision_encoder": False, "train_expert_only": False}  # its weights are random
    else:
        options |= {"pretrained_backbone_weights": None}
        options |= {"horizon": 16, "n_action_steps": 8, "noise_scheduler_type": "DDIM", "num_inference_steps": 10}
        options |= {"use_group_norm": True}
    config = make_policy_config(name, **options)
    return get_policy_class(name)(config)


class LeRobotContender:
    """A LeRobot policy as a contracts.Policy: one observation in, one action out, its own queue inside."""

    def __init__(self, name: str, policy: Any, spec: Any, action: Normalizer, state: Normalizer) -> None:
        self.name = name
        self.policy, self.spec, self.action, self.state = policy.eval(), spec, action, state

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode."""
        torch.manual_seed(seed)
        self.policy.reset()

    @torch.inference_mode()
    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """The next action; most calls only take it from the policy's queue."""
        assert len(observations) == 1, "LeRobot policies keep one queue; use one environment"
        started = time.perf_counter()
        left, top = CROP
        picture = observations[0].images["base_camera"][top : top + SIDE, left : left + SIDE]
        numbers = self.state(torch.from_numpy(observations[0].state)[None])
        images = torch.from_numpy(picture.copy())[None]
        batch = inputs_of(self.name, self.policy, images, numbers, [observations[0].instruction])
        action = self.action.inverse(self.policy.select_action(batch).float()).numpy()
        return ActionChunk(settle(action, self.spec)[:, None], (time.perf_counter() - started) * 1e3)


def inputs_of(
    name: str, policy: Any, images: torch.Tensor, numbers: torch.Tensor, instructions: list[str]
) -> dict[str, torch.Tensor]:
    """What LeRobot's processors would hand the policy: pictures, normalised state, and for SmolVLA the instruction.

    Args:
        name: Of the contender.
        policy: Whose words are taken.
        images: uint8, shape (B, ..., 128, 128, 3).
        numbers: Normalised state, shape (B, S).
        instructions: B strings.
    """
    if name != "smolvla":
        return {IMAGE: normal_pictures(images), STATE: numbers}
    tokenizer = policy.model.vlm_with_expert.processor.tokenizer
    text = tokenizer(instructions, padding=True, padding_side="right", return_tensors="pt")
    words = {f"{WORDS}.tokens": text.input_ids, f"{WORDS}.attention_mask": text.attention_mask.bool()}
    return {IMAGE: (images.float() / 255).movedim(-1, -3), STATE: numbers, **words}


def normal_pictures(images: torch.Tensor) -> torch.Tensor:
    """ImageNet-normalised pictures (..., 3, H, W) from uint8 (..., H, W, 3), as LeRobot's processors give."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images.float() / 255 - mean) / std).movedim(-1, -3)


def trained_for(settings: Settings, started: float) -> float:
    """The share of the budget that is spent: processor seconds over threads since `started`."""
    return (time.process_time() - started) / settings.threads / (60 * settings.minutes)


def rows_before(data: LeRobotDemos, rows: torch.Tensor) -> np.ndarray:
    """The step before each row, or the row itself where an episode begins."""
    now = rows.numpy()
    before = np.maximum(now - 1, 0)
    begins = data.episode_of(before) != data.episode_of(now)
    return np.where(begins, now, before)


def train_lerobot(name: str, settings: Settings) -> tuple[LeRobotContender, dict[str, Any]]:
    """Train for the budget with the policy's own loss and optimizer settings."""
    history = (-1, 0) if name == "diffusion" else (0,)
    horizon = 16 if name == "diffusion" else 14
    data = LeRobotDemos(settings.dataset, horizon=horizon, history=history)
    kind = "min_max" if name == "diffusion" else "mean_std"
    action = Normalizer(NormalizerConfig.from_statistics(data.action_statistics, kind))
    state = Normalizer(NormalizerConfig.from_statistics(data.state_statistics, kind))
    torch.manual_seed(settings.seed)
    vlm = small_vlm(settings.out / "smolvla_vlm", data.tasks) if name == "smolvla" else None
    policy = lerobot_policy(name, data.state_dim, data.action_dim, vlm=vlm).train()
    preset = policy.config.get_optimizer_preset()
    more = {"betas": tuple(preset.betas), "eps": preset.eps} if name == "smolvla" else {}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=preset.lr, weight_decay=preset.weight_decay, **more)
    steps, started, (left, top) = 0, time.process_time(), CROP
    source = batches(data, settings.lerobot_batch_size, seed=settings.seed)
    while trained_for(settings, started) < 1:
        sample = source.at(steps)
        images = sample.images[:, 0, :, top : top + SIDE, left : left + SIDE]
        numbers, wanted = state(sample.state), action(sample.actions)
        batch = inputs_of(name, policy, images[:, 0], numbers, sample.instructions)
        batch |= {ACTION: wanted, "action_is_pad": sample.action_is_pad}
        if name == "diffusion":  # two observed steps, and actions from the first of them on
            earlier = rows_before(data, sample.rows)
            past_state = state(torch.from_numpy(data.states[earlier]))
            past_action = action(torch.from_numpy(data.actions[earlier]))
            batch |= {IMAGE: normal_pictures(images), STATE: torch.stack((past_state, numbers), 1)}
            batch[ACTION] = torch.cat((past_action[:, None], wanted[:, :-1]), 1)
        with mixed("cpu"):
            loss, _ = policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    parameters = sum(p.numel() for p in policy.parameters())
    spec = spec_of(data.folder, data)
    facts = {"updates": steps, "parameters_million": round(parameters / 1e6, 1), "last_loss": float(loss.detach())}
    return LeRobotContender(name, policy, spec, action, state), facts


def train_headrace(settings: Settings) -> tuple[RecedingHorizon, dict[str, Any]]:
    """Train the small policy for the budget; the learning rate falls with the time that is left."""
    first = LeRobotDemos(settings.dataset, horizon=14)
    spec = spec_of(first.folder, first)
    config = fit_to_data(policy_config("small", spec, cameras=first.cameras, crop=CROP), first, spec)
    torch.manual_seed(settings.seed)
    model = VipraPolicy(config).train()
    chosen = FinetuneSettings(batch_size=settings.batch_size, seed=settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen.weight_decay), lr=5e-4, betas=(0.9, 0.95))
    source = training_batches(first, config, chosen)
    steps, started = 0, time.process_time()
    generator = torch.Generator().manual_seed(settings.seed)
    while (spent := trained_for(settings, started)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min((steps + 1) / 100, 0.1 + 0.45 * (1 + np.cos(np.pi * spent)))
        with mixed("cpu"):
            loss = policy_loss(model, source.at(steps), generator)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"updates": steps, "parameters_million": round(parameters / 1e6, 1), "last_loss": float(loss.detach())}
    return RecedingHorizon(FlowPolicy(model, solver=SolverSettings(method="euler", steps=10)), 7), facts


def main(settings: Settings) -> None:
    """Train and evaluate what is not finished yet; print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(settings.threads)
    task = find_task(settings.task)
    rows = []
    for name in settings.contenders:
        folder = settings.out / name
        if not (folder / "summary.json").exists():
            policy, facts = train_headrace(settings) if name == "headrace" else train_lerobot(name, settings)
            chosen = RolloutSettings(episodes=settings.episodes, seed=settings.seed, num_envs=1, videos=3)
            results = roll_out([replace(task)], policy, chosen, folder, policy_name=name)
            row = {"policy": name, **facts, "minutes": settings.minutes}
            row |= {key: results[key] for key in ("successes", "episodes", "success_rate", "ci95")}
            row["policy_ms_per_action"] = results["tasks"][0]["policy_ms_per_action"]
            write_json(folder / "summary.json", row)
        rows.append(json.loads((folder / "summary.json").read_text()))
    print("| policy | parameters (M) | updates | success | 95 % interval | policy ms per action |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ci95"]
        print(
            f"| {row['policy']} | {row['parameters_million']} | {row['updates']} "
            f"| {row['successes']}/{row['episodes']} | {100 * low:.0f} to {100 * high:.0f} % "
            f"| {row['policy_ms_per_action']:.1f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
