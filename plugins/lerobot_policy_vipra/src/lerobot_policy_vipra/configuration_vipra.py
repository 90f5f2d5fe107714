"""LeRobot's configuration of the ViPRA policy."""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from headrace.contracts import ActionSpec

if TYPE_CHECKING:
    from headrace.robot.vipra import VipraConfig
    from headrace.robot.vipra_pretraining import VipraPretrainingConfig

NORMALIZATIONS = ("network", "processors")
DIFFERENCES = ("history", "rate")


@PreTrainedConfig.register_subclass("vipra")
@dataclass
class LeRobotVipraConfig(PreTrainedConfig):
    """Options of the policy; see the README.

    `network` is headrace's own config as a dictionary. It is filled when the policy is first made from a dataset, so
    that a saved checkpoint needs neither the dataset nor these options again.
    """

    size: str = "small"
    init: str | None = None
    override: list[str] = field(default_factory=list)
    normalization: str = "network"
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)
    history: list[int] | None = None
    chunk_size: int | None = None
    n_action_steps: int | None = None
    camera_size: int | None = None
    move: int = 4
    num_inference_steps: int = 10
    rtc_config: RTCConfig | None = None
    fast_pictures: bool = True
    dtype: str = "float32"
    optimizer_lr: float | None = None
    optimizer_weight_decay: float = 1e-4
    scheduler_warmup_steps: int = 200
    scheduler_decay_steps: int = 30_000
    action_feature_names: list[str] | None = None
    network: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"--policy.normalization is {' or '.join(NORMALIZATIONS)}, got {self.normalization!r}")
        if not self.normalization_mapping:
            mode = NormalizationMode.MEAN_STD if self.normalization == "processors" else NormalizationMode.IDENTITY
            self.normalization_mapping = {"VISUAL": NormalizationMode.IDENTITY, "STATE": mode, "ACTION": mode}
        changed = [k for k, v in self.normalization_mapping.items() if v is not NormalizationMode.IDENTITY]
        if self.normalization == "network" and changed:
            raise ValueError(
                f"the network normalises by itself and normalization_mapping names {', '.join(changed)}: that would "
                "normalise twice. Give --policy.normalization=processors to leave it to LeRobot's processors."
            )
        if self.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY) is not NormalizationMode.IDENTITY:
            raise ValueError("pictures are normalised inside the network; VISUAL must stay IDENTITY")
        if set(self.override) - set(DIFFERENCES):
            raise ValueError(f"--policy.override takes {' and '.join(DIFFERENCES)}, got {', '.join(self.override)}")
        built = self._planned()
        own = {"history": list(built.history), "chunk_size": built.decoder.horizon, "camera_size": built.camera_size}
        for name, value in own.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"the network has {name} {value}, the options say {getattr(self, name)}")
            setattr(self, name, value)
        if self.optimizer_lr is None:
            from headrace.robot.finetune import usual_lr

            self.optimizer_lr = usual_lr(built)
        self.n_obs_steps = len(built.history)
        self.n_action_steps = self.n_action_steps or max(1, built.decoder.horizon // 2)
        if not 1 <= self.n_action_steps <= built.decoder.horizon:
            raise ValueError(f"n_action_steps must lie in 1..{self.chunk_size}, got {self.n_action_steps}")
        if self.fast_pictures:
            from lerobot_policy_vipra import fast_pictures

            fast_pictures.install()

    def _planned(self) -> "VipraConfig":
        """Our config as far as it is known: saved, that of a checkpoint that is trained further, or the size's."""
        if not self.network and self.init is not None and self.pretraining() is None:
            from headrace.nn.pretrained import read_config, resolve_folder

            found = read_config(resolve_folder(self.init))
            self.network = found.get("network", found) if "type" in found else found
        if self.network:
            from headrace.robot.lerobot_checkpoint import network_config

            return network_config({"network": self.network})
        return self.template(ActionSpec(names=("a",), frame="joint", rotation="none", gripper="none", rate=1.0), ("c",))

    def pretraining(self) -> "VipraPretrainingConfig | None":
        """The config of the network that `init` names if that was pretrained on videos; None for policies."""
        if self.init is None:
            return None
        from headrace.nn.pretrained import config_from_dict, read_config, resolve_folder

        found = read_config(resolve_folder(self.init))
        if found.pop("model", None) != "VipraPretraining":
            return None
        from headrace.robot.vipra_pretraining import VipraPretrainingConfig

        return config_from_dict(VipraPretrainingConfig, found)

    def template(self, spec: ActionSpec, cameras: tuple[str, ...]) -> "VipraConfig":
        """The pretrained network's or the size's config with this config's windows, without statistics."""
        seen = self.pretraining()
        if seen is not None:
            from headrace.robot.policy_start import policy_of

            record = seen.record  # demonstrations are taken to be at the videos' own rate until the dataset is known
            history = record.history_at((record.rate or 0) * record.stride)
            return policy_of(
                seen,
                spec,
                cameras=cameras,
                history=tuple(self.history) if self.history else history,
                horizon=self.chunk_size,
            )
        return self._sized(spec, cameras)

    def _sized(self, spec: ActionSpec, cameras: tuple[str, ...]) -> "VipraConfig":
        """The size's config."""
        from headrace.robot.sizes import policy_config

        seen = policy_config(self.size, spec, cameras=cameras, camera_size=4096).image.size
        camera_size = self.camera_size or seen + seen // 8  # room for the random crop
        config = policy_config(self.size, spec, cameras=cameras, camera_size=camera_size)
        return replace(
            config,
            history=tuple(self.history) if self.history else config.history,
            decoder=replace(config.decoder, horizon=self.chunk_size or config.decoder.horizon),
        )

    def set_network(self, config: "VipraConfig") -> None:
        """Remember the network that was built."""
        self.network = asdict(config)

    def validate_features(self) -> None:
        """Refuse features that the policy cannot use.

        Raises:
            ValueError: No camera, or no action.
        """
        if not self.image_features:
            raise ValueError("the vipra policy needs at least one camera (observation.images.*)")
        if self.action_feature is None:
            raise ValueError("the vipra policy needs the feature 'action'")

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW as in headrace's own fine-tuning."""
        return AdamWConfig(
            lr=self.optimizer_lr, betas=(0.9, 0.95), weight_decay=self.optimizer_weight_decay, grad_clip_norm=1.0
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Warm-up, then a cosine to a tenth."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr / 10,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Steps of the pictures, or None for the present alone."""
        return None if self.history in (None, [0]) else list(self.history)

    @property
    def action_delta_indices(self) -> list[int]:
        """Steps of the chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None
