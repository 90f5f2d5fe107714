"""Low-rank adapters on a policy's transformer, through peft, merged into plain weights when the policy is saved.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.robot.vipra_actor import VipraActor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters.

    Attributes:
        rank: Of the update of each matrix.
        alpha: The update is scaled by alpha / rank.
        dropout: On the input of the adapters.
        targets: Names of the matrices that get one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


def add_adapters(model: VipraActor, settings: LoraSettings) -> int:
    """Freeze the transformer and put adapters into it; everything else goes on learning.

    Returns:
        The number of parameters of the adapters.

    Raises:
        ModuleNotFoundError: peft is not installed; names the extra.
        ValueError: No matrix has one of the names, or the model has adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'headrace[lerobot]'") from error
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("this network has adapters already")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    model.backbone.requires_grad_(False)
    inject_adapter_in_model(config, model.backbone, adapter_name=ADAPTER)
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


def without_adapters(model: VipraActor) -> VipraActor:
    """A plain network whose matrices hold base and update together; needs memory for a second copy.

    A model without adapters comes back as it is.
    """
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return model
    plain = type(model)(model.config)
    plain.load_state_dict(merged_state(model))
    plain.tokenizer = model.tokenizer
    return plain.to(model.device).train(model.training)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state without adapters: each adapted matrix with its update added."""
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    state = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in layers and leaf == "weight":
            value = value + layers[owner].get_delta_weight(ADAPTER)
        state[name.replace(".base_layer.", ".")] = value
    return state
