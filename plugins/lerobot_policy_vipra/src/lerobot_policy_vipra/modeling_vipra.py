"""headrace's ViPRA network as a LeRobot policy: batches and conventions are translated here, nothing else happens."""
# Shape letters: B batch, V cameras, T pictures of history, H horizon, A action dimension, S state.

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import NormalizerConfig
from headrace.datasets.random_crop import random_crop
from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import settings_for
from headrace.nn.pretrained import load_strictly, read_weights, resolve_folder
from headrace.robot.carry_over import carry_over, require_same_conditions
from headrace.robot.continuation import sample_after
from headrace.robot.finetune import parameter_groups, still
from headrace.robot.lerobot_checkpoint import PREFIX, load_network, network_config, read_tokenizer
from headrace.robot.policy import settle
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_config import PretrainingRecord
from headrace.robot.vipra_pretraining import VipraPretraining
from headrace.vlm.text_tokenizer import TOKENIZER_FOLDER
from lerobot_policy_vipra.configuration_vipra import LeRobotVipraConfig
from lerobot_policy_vipra.new_network import camera_name, from_features
from lerobot_policy_vipra.stretching import stretched


class LeRobotVipraPolicy(PreTrainedPolicy):
    """Flow-matching policy with an action queue, as LeRobot's tools expect one.

    Args:
        config: With features; where it has no network yet, one is made from them and from `dataset_meta`.
        dataset_stats, dataset_meta: Of the dataset that is trained on; not needed by a saved policy.
        saved: The weights follow from a saved policy, so what `config.init` names is not read.

    Raises:
        GridMismatch: `config.init` was straightened for another grid than `num_inference_steps` equal steps.
        ValueError: The features do not fit the network, or the dataset's rate or the history is another one than the
            network was trained on and `config.override` does not name it.
    """

    config_class = LeRobotVipraConfig
    name = "vipra"
    _fsdp_wrap_modules = ["LlamaDecoderLayer"]  # noqa: RUF012

    def __init__(
        self,
        config: LeRobotVipraConfig,
        *,
        dataset_stats: dict[str, Any] | None = None,
        dataset_meta: Any | None = None,
        saved: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        begins = not saved and config.pretrained_path is None
        seen = config.pretraining() if begins else None
        if not config.network:
            config.set_network(from_features(config, dataset_stats, dataset_meta))
        ours = self._effective(network_config({"network": config.network}))
        require_features(config, ours)
        if dataset_meta is not None:
            require_rate(config, ours, float(dataset_meta.fps))
        self.model = VipraPolicy(ours)
        self.solver = SolverSettings(method="euler", steps=config.num_inference_steps)
        if seen is not None:
            rate = ours.action_spec.rate
            require_pretraining(config, seen.record, ours.history, rate)
            source = VipraPretraining.from_pretrained(resolve_folder(config.init))
            carry_over(source, self.model, frames_per_step=seen.record.frames_per_step(rate))
        elif config.init is not None and begins:
            trained = load_network(config.init)
            self.solver = settings_for(resolve_folder(config.init), self.solver)
            self.model.load_state_dict(trained.state_dict())
            self.model.tokenizer = trained.tokenizer
        self.spec: ActionSpec = ours.action_spec
        self.reset()

    def _effective(self, ours: VipraConfig) -> VipraConfig:
        """The network's config with one place that normalises: here, or LeRobot's processors."""
        if self.config.normalization == "network":
            return ours
        ours = replace(
            ours,
            action_normalizer=NormalizerConfig.identity(ours.decoder.action_dim),
            state_normalizer=NormalizerConfig.identity(len(ours.state_names)) if ours.state_names else None,
        )
        self.config.set_network(ours)
        return ours

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **options: Any) -> "LeRobotVipraPolicy":
        """As LeRobot's; the folder holds all weights, so what the policy began from need not be on this machine."""
        return super().from_pretrained(pretrained_name_or_path, saved=True, **options)

    @classmethod
    def _load_as_safetensor(
        cls, model: "LeRobotVipraPolicy", model_file: str, map_location: str, strict: bool
    ) -> "LeRobotVipraPolicy":
        """Weights that fit entirely, or an error: LeRobot's own way would leave missing ones random."""
        state = {key.removeprefix(PREFIX): value for key, value in read_weights(Path(model_file)).items()}
        load_strictly(model.model, state, what=model_file)
        read_tokenizer(model.model, Path(model_file).parent)
        return model

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """LeRobot's files, and the text tokenizer of a network that reads one's ids."""
        super()._save_pretrained(save_directory, state_dict=state_dict)
        if self.model.tokenizer is not None:
            self.model.tokenizer.save_pretrained(save_directory / TOKENIZER_FOLDER)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, the rest without."""
        return parameter_groups(self.model, self.config.optimizer_weight_decay)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """LoRA on the backbone's attention; what meets the robot is trained in full."""
        return {
            "target_modules": r"model\.backbone\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
            "modules_to_save": ["decoder", "proprio"] if self.model.config.state_names else ["decoder"],
        }

    def reset(self) -> None:
        """Start an episode: no queued actions, no history."""
        self._queue: deque[Tensor] = deque()
        self._frames: deque[Tensor] = deque(maxlen=1 - self.model.config.history[0])

    def supports_rtc(self) -> bool:
        """Whether chunks can continue the one being executed: not with a decoder that holds its features."""
        return self.model.config.decoder.features != "hold"

    def init_rtc_processor(self) -> None:
        """LeRobot calls this when it has set `config.rtc_config`; the guidance is ours and reads it from there."""

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of a training batch, a scalar, or (B,) with `reduction="none"`."""
        inputs = self._inputs(batch, self._pictures(batch))
        if self.training:
            inputs = inputs._replace(images=self._moved(inputs.images))
        actions, valid = self._scored(batch)
        if reduction == "none":
            rows = [
                self.model.loss(
                    PolicyInput(*(part[i : i + 1] for part in inputs)), actions[i : i + 1], valid[i : i + 1]
                )
                for i in range(len(actions))
            ]
            each = torch.stack([row["total"] for row in rows])
            return each, {"flow_loss": float(each.detach().mean())}
        loss = self.model.loss(inputs, actions, valid)["total"]
        return loss, {"flow_loss": float(loss.detach())}

    def _scored(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Actions (B, H, A) and which of them count.

        Behind an episode's end joint targets repeat the last one and count, as in headrace's own training; deltas are
        zero there, or do not count where the processors have hidden their zero.
        """
        actions = batch[ACTION]
        is_pad = batch.get(f"{ACTION}_is_pad")
        if is_pad is None:
            return actions, torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        if self.config.normalization == "processors" and self.spec.frame.endswith("delta"):
            return actions, ~is_pad
        return still(actions, is_pad, self.spec), torch.ones_like(is_pad)

    def _moved(self, images: Tensor) -> Tensor:
        ours = self.model.config
        seed = int(torch.randint(2**31, ()))  # from the global generator, which LeRobot seeds and restores
        generator = torch.Generator().manual_seed(seed)
        return random_crop(images, corner=ours.crop, size=ours.image.size, pixels=self.config.move, generator=generator)

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """A chunk (B, H, A) in the units of the post-processor's input.

        Args:
            batch: Preprocessed observation; pictures are remembered where the policy has a history.
            noise: (B, H, A); drawn when None.
            inference_delay: Actions that will be executed before this chunk is there.
            prev_chunk_left_over: Rest of the chunk being executed, (P, A) or (B, P, A); continued by
                real-time chunking.
        """
        self.eval()
        inputs = self._inputs(batch, self._remembered(batch))
        decoder = self.model.config.decoder
        shape = (len(inputs.state), decoder.horizon, decoder.action_dim)
        noise = torch.randn(shape, device=inputs.images.device) if noise is None else noise
        rtc = self.config.rtc_config
        rest = None if prev_chunk_left_over is None else without_padding(prev_chunk_left_over, shape)
        if rtc is not None and rtc.enabled and rest is not None and rest.shape[1]:
            chunk = sample_after(
                self.model,
                inputs,
                noise,
                self.solver,
                prefix=rest[:, : rtc.execution_horizon],
                delay=inference_delay or 0,
                limit=rtc.max_guidance_weight,
            )
        else:
            chunk = self.model.sample(inputs, noise, self.solver)
        if self.config.normalization == "network":
            chunk = torch.from_numpy(settle(chunk.float().cpu().numpy(), self.spec)).to(chunk.device)
        return chunk.clone()  # made outside inference mode, so that processors may write to it

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """The next action (B, A); a new chunk is sampled when `n_action_steps` of the last one are used up."""
        if self._queue:
            if self._frames.maxlen != 1:
                self._remembered(batch)
            return self._queue.popleft()
        chunk = self.predict_action_chunk(batch, noise=noise)
        self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    def _pictures(self, batch: dict[str, Any]) -> Tensor:
        """uint8 (B, V, T, size, size, 3) of the batch's cameras, stretched to the network's size where they differ."""
        size = self.model.config.camera_size
        by_name = {camera_name(key): batch[key] for key in self.config.image_features if key in batch}
        absent = [name for name in self.model.config.cameras if name not in by_name]
        if absent:
            raise ValueError(f"the batch has no pictures of {', '.join(absent)}; use --rename_map")
        cameras = []
        for name in self.model.config.cameras:
            pictures = by_name[name]
            pictures = pictures[:, None] if pictures.ndim == 4 else pictures
            pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
            cameras.append(stretched(pictures, size))
        both = torch.stack(cameras, 1)  # (B, V, T, 3, size, size)
        return (both.clamp(0, 1) * 255).round().to(torch.uint8).movedim(3, -1)

    def _remembered(self, batch: dict[str, Any]) -> Tensor:
        """Pictures with their history; a batch of single ones is queued, and the first stands for what was before."""
        pictures = self._pictures(batch)
        history = self.model.config.history
        if pictures.shape[2] == len(history) and len(history) > 1:
            return pictures
        self._frames.append(pictures[:, :, -1])
        frames = self._frames
        return torch.stack([frames[max(len(frames) - 1 + step, 0)] for step in history], 2)

    def _inputs(self, batch: dict[str, Any], images: Tensor) -> PolicyInput:
        ours = self.model.config
        count = len(images)
        state = images.new_zeros((count, 0), dtype=torch.float32)
        if ours.state_names:
            state = batch[OBS_STATE].float()
            state = state[:, -1] if state.ndim == 3 else state
        task = batch.get("task", [""] * count)
        task = [task] * count if isinstance(task, str) else list(task)
        return PolicyInput(images, state, self.model.encode_text(task).to(images.device))


def require_features(config: LeRobotVipraConfig, ours: VipraConfig) -> None:
    """Refuse data that do not fit the network.

    Raises:
        ValueError: Another action or state size, or a camera missing; names both sides.
    """
    action = config.action_feature.shape[0]
    state = config.robot_state_feature.shape[0] if config.robot_state_feature else 0
    cameras = {camera_name(key) for key in config.image_features}
    if action != ours.decoder.action_dim:
        raise ValueError(f"the network has {ours.decoder.action_dim} action numbers, the data {action}")
    if ours.state_names and state != len(ours.state_names):
        raise ValueError(f"the network has a state of {len(ours.state_names)} numbers, the data one of {state}")
    if not set(ours.cameras) <= cameras:
        raise ValueError(
            f"the network needs the cameras {', '.join(ours.cameras)}, the data have {', '.join(sorted(cameras))}; "
            "map them with --rename_map"
        )


def require_rate(config: LeRobotVipraConfig, ours: VipraConfig, fps: float) -> None:
    """Refuse a dataset at another rate than the network commands at.

    Raises:
        ValueError: They differ, and `--policy.override` does not say that it is meant.
    """
    rate = ours.action_spec.rate
    if abs(rate - fps) > 1e-3 * fps and "rate" not in config.override:
        raise ValueError(
            f"the network acts {rate:g} times a second, the dataset has {fps:g} frames a second; resample it, or name "
            """the difference: --policy.override='["rate"]'"""
        )


def require_pretraining(
    config: LeRobotVipraConfig, record: PretrainingRecord, history: tuple[int, ...], rate: float
) -> None:
    """Refuse another rate or history than pretraining's, by the names of the plugin's options.

    LeRobot cuts its windows before it tells the dataset's rate, so the default history is that for the videos' rate.

    Raises:
        ValueError: They differ, and `--policy.override` does not say that it is meant.
    """
    wanted = record.history_at(rate)
    try:
        require_same_conditions(record, history=wanted, rate=rate, override=tuple(config.override))
    except ValueError as error:
        raise ValueError(f"""{error} (here --policy.override='["rate"]')""") from error
    if tuple(history) != wanted and "history" not in config.override:
        raise ValueError(
            f"at {rate:g} frames a second the network was pretrained on frames {wanted}, the policy is to see "
            f"{history}: give --policy.history='{list(wanted)}', or name the difference: "
            """--policy.override='["history"]'"""
        )


def without_padding(rest: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """LeRobot's left-over rows as (B, P, A) without the zero rows that it pads them with."""
    rest = rest[None] if rest.ndim == 2 else rest
    used = np.flatnonzero(rest.detach().abs().sum((0, 2)).cpu().numpy() > 0)
    rows = int(used[-1]) + 1 if len(used) else 0
    return rest[:, :rows].expand(shape[0], rows, shape[2])
