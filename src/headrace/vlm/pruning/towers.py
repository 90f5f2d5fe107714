"""Finding the vision encoder inside a model, and what pruning must know about it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.vlm.pruning.observe import reads_by_hook

Packing = Literal["batch", "packed"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision encoder as pruning sees it.

    Attributes:
        model: The encoder.
        layers: Its blocks in order. `attentions` are their attention modules.
        prefix: Tokens before the patches. `has_cls` says whether the first of them is a CLS token.
        consumed: Index of the block whose output the language model gets.
        packing: `batch` blocks see (B, S, D); `packed` ones (S, D), pictures one after another with `cu_seqlens`.
        unit: Patches per side that later become one token; whole units stay or go.
        unit_order: Whether the patches of a unit lie side by side in the sequence, or in raster order of the picture.
        projector: Module after the encoder that treats each token by itself, None when unknown.
        skips_rest: Whether nothing reads what comes after the consumed block.
        crops: Whether the model cuts a picture into several crops and joins their tokens, as LLaVA-NeXT does.
    """

    model: Any
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    prefix: int
    has_cls: bool
    consumed: int
    packing: Packing = "batch"
    unit: int = 1
    unit_order: Literal["consecutive", "raster"] = "raster"
    projector: nn.Module | None = None
    skips_rest: bool = False
    crops: bool = False

    def units(self, tokens: int, device: torch.device) -> Tensor:
        """Unit number of each of a picture's `tokens` patches, int64 (N,).

        Raises:
            ValueError: The patches do not divide into units.
        """
        index = torch.arange(tokens, device=device)
        if self.unit == 1:
            return index
        if self.unit_order == "consecutive":
            return index // self.unit**2
        side = math.isqrt(tokens)
        if side * side != tokens or side % self.unit:
            raise ValueError(f"{tokens} patches are no square grid of {self.unit} x {self.unit} units")
        return index // side // self.unit * (side // self.unit) + index % side // self.unit


def find_tower(model: Any, *, feature_layer: int | None = None, video: bool = False) -> Tower:
    """The vision encoder of a vision-language model, or `model` itself when it is an encoder.

    Args:
        model: A transformers vision-language model or vision encoder, a timm ViT, or a module that holds one.
        feature_layer: Index into the hidden states (0 is the embedding, -1 the last block's output) that is used; None
            asks the model's config, then takes the last.
        video: Take the encoder for clips where the model has one of its own.

    Raises:
        ValueError: No encoder with attention to score; or one whose features come from several layers.
    """
    inner = getattr(model, "model", model)
    names = ("video_tower", "image_tower") if video else ("image_tower",)
    names = (*names, "vision_tower", "visual", "vision_model")
    held = next((getattr(inner, name) for name in names if getattr(inner, name, None) is not None), None)
    tower = inner if held is None else held
    layers, attentions = _blocks(tower)
    config = getattr(model, "config", None)
    packed = held is not None and hasattr(tower, "spatial_merge_size")
    wanted = feature_layer if feature_layer is not None else getattr(config, "vision_feature_layer", None)
    if wanted is not None and not isinstance(wanted, int):
        raise ValueError(f"features come from layers {wanted}; pruning needs one feature layer")
    consumed = len(layers) - 1 if wanted is None else (wanted - 1 if wanted > 0 else len(layers) + wanted)
    prefix, has_cls = _prefix(tower)
    return Tower(
        model=tower,
        layers=layers,
        attentions=attentions,
        prefix=0 if packed else prefix,
        has_cls=has_cls,
        consumed=consumed,
        packing="packed" if packed else "batch",
        unit=_unit(tower, inner, config) if held is not None else 1,
        unit_order="consecutive" if packed else "raster",
        projector=tower.merger if packed else _projector(inner) if held is not None else None,
        skips_rest=getattr(config, "vision_feature_layer", None) is not None,
        crops=held is not None and hasattr(inner, "image_newline"),
    )


def _blocks(tower: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.rpartition(".")[2] in (
            "layers",
            "layer",
            "blocks",
        ):
            attentions = [_attention(block) for block in module]
            if attentions and all(a is not None for a in attentions):
                return tuple(module), tuple(a for a in attentions if a is not None)
    raise ValueError(
        f"{type(tower).__name__} has no attention to score: its blocks are neither transformers' attention modules nor "
        "ones with a fused qkv projection. Pruning needs a transformer encoder."
    )


def _attention(block: nn.Module) -> nn.Module | None:
    for module in block.modules():
        by_name = type(module).__name__.endswith("Attention") and hasattr(module, "config")
        if by_name or reads_by_hook(module):
            return module
    return None


def _prefix(tower: nn.Module) -> tuple[int, bool]:
    """Tokens before the patches, and whether one is CLS."""
    count = getattr(tower, "num_prefix_tokens", None)
    if isinstance(count, int):  # timm
        return count, getattr(tower, "cls_token", None) is not None
    cls, registers = 0, 0
    for name, parameter in tower.named_parameters():
        kind = name.rpartition(".")[2]
        cls |= kind in ("class_embedding", "cls_token")
        registers += parameter.shape[1] if kind in ("register_tokens", "reg_token") else 0
    return int(cls) + registers, bool(cls)


def _unit(tower: Any, inner: Any, config: Any) -> int:
    if hasattr(tower, "spatial_merge_size"):  # Qwen2-VL
        return int(tower.spatial_merge_size)
    if hasattr(getattr(inner, "connector", None), "scale_factor"):  # SmolVLM, Idefics3
        return int(inner.connector.scale_factor)
    ratio = getattr(config, "downsample_ratio", None)  # InternVL
    return 1 if ratio is None else round(1 / ratio)


def _projector(inner: nn.Module) -> nn.Module | None:
    connector = getattr(inner, "connector", None)
    if connector is not None:
        return getattr(connector, "modality_projection", None)
    return getattr(inner, "multi_modal_projector", None)
