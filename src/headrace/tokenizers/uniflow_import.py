"""Weights of the released UniFlow (Hugging Face `yuezhengrong/UniFlow`, 530 keys) to ours and back.

Sizes are read from the shapes of the tensors, not from the published config, whose class defaults are misleading.
"""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.nn.pretrained import load_strictly, read_weights, resolve_folder, write_atomically
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ViTConfig

OFFICIAL_GLOBAL_HEADS = 16
# (official, ours); the right side of a pair is unique, so that the list reads both ways.
RENAMES = (
    ("embeddings.class_embedding", "encoder.cls_token"),
    ("embeddings.position_embedding", "encoder.pos_embed"),
    ("embeddings.patch_embedding.", "encoder.patch_embed.proj."),
    ("encoder.layers.", "encoder.blocks."),
    ("chal_proj.", "to_latent."),
    ("chal_unproj.", "from_latent."),
    ("global_block_pos_embed", "global_positions.table"),
    ("decoder_pos_embed", "decoder_positions.table"),
    ("flow_head.net.final_layer.linear.", "flow_head.out."),
    ("flow_head.net.final_layer.adaLN_modulation.1.", "flow_head.out_modulation."),
    ("flow_head.net.", "flow_head."),
)
INFIXES = ((".adaLN_modulation.1.", ".modulation."),)
OUR_STATISTICS = ("latent_count", "latent_mean", "latent_square")


def from_official_name(name: str) -> str:
    """Our name of an official key."""
    for official, ours in RENAMES:
        if name.startswith(official):
            name = ours + name.removeprefix(official)
            break
    for official, ours in INFIXES:
        name = name.replace(official, ours)
    return re.sub(r"^(encoder\.blocks\.\d+\.ls[12])$", r"\1.gamma", name)


def to_official_name(name: str) -> str:
    """The official key of one of our names."""
    name = re.sub(r"^(encoder\.blocks\.\d+\.ls[12])\.gamma$", r"\1", name)
    for official, ours in RENAMES:
        if name.startswith(ours):
            name = official + name.removeprefix(ours)
            break
    for official, ours in INFIXES:
        name = name.replace(ours, official)
    return name


def official_config(state: dict[str, Tensor], *, heads: int = 0) -> UniFlowConfig:
    """Sizes of an official checkpoint from its shapes.

    Args:
        state: Tensors under official names.
        heads: Heads of the encoder, which no shape shows; 0 assumes 64 channels per head.

    Raises:
        ValueError: A key that gives a size is missing, so this is no UniFlow checkpoint.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"no {name!r} among {len(state)} keys: this is not an official UniFlow checkpoint")
        return tuple(state[name].shape)

    def depth(prefix: str) -> int:
        return 1 + max((int(k.split(".")[prefix.count(".")]) for k in state if k.startswith(prefix)), default=-1)

    width, _, patch, _ = shape("embeddings.patch_embedding.weight")
    tokens = shape("global_block_pos_embed")[1]
    flow_width = shape("flow_head.net.input_proj.weight")[0]
    hidden = shape("encoder.layers.0.mlp.fc1.weight")[0]
    ratio = hidden / width
    encoder = ViTConfig(
        image_size=round(tokens**0.5) * patch,
        patch=patch,
        width=width,
        depth=depth("encoder.layers."),
        heads=heads or max(1, width // 64),
        mlp_ratio=ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,  # timm rounds down
    )
    return UniFlowConfig(
        encoder=encoder,
        latent_channels=shape("chal_proj.c_proj.weight")[0],
        global_depth=depth("global_blocks."),
        global_heads=OFFICIAL_GLOBAL_HEADS,
        flow_depth=depth("flow_head.net.res_blocks."),
        flow_width=flow_width,
        allow_narrow_head=flow_width < 3 * patch**2,
    )


def load_official(source: str | os.PathLike[str], *, heads: int = 0, dtype: torch.dtype = torch.float32) -> UniFlow:
    """Read the released weights from a safetensors file, a folder with one, or the Hub, strictly.

    No remote code is run. The release holds no latent statistics; call `observe_latents` before diffusion.

    Args:
        source: `model.safetensors`, its folder, or a Hub id such as `yuezhengrong/UniFlow`.
        heads: See `official_config`.
        dtype: Type of the loaded weights; bfloat16 files widen to float32 exactly.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: Truncated file, another model's keys, or shapes that do not fit together.
    """
    path = Path(source)
    if not path.is_file():
        path = resolve_folder(source) / "model.safetensors"
    model = model_from_official(read_weights(path), heads=heads, what=str(path))
    for parameter in model.parameters():  # not the latent statistics, which half precision would spoil
        parameter.data = parameter.data.to(dtype)
    return model


def model_from_official(state: dict[str, Tensor], *, heads: int = 0, what: str = "the given state") -> UniFlow:
    """Build a model around official tensors, strictly; raises ValueError naming what is missing or left over."""
    model = UniFlow(official_config(state, heads=heads))
    ours = {from_official_name(name): tensor.float() for name, tensor in state.items()}
    statistics = {name: getattr(model, name) for name in OUR_STATISTICS}
    load_strictly(model, ours | statistics, what=what)
    return model.eval()


def official_state(model: UniFlow) -> dict[str, Tensor]:
    """The model's tensors under official names, without our latent statistics."""
    return {to_official_name(k): v for k, v in model.state_dict().items() if k not in OUR_STATISTICS}


def save_official(model: UniFlow, path: Path) -> None:
    """Write an official-layout safetensors file.

    Raises:
        ValueError: The official class could not read the file, or would read another model from it: another encoder
            than InternViT, or settings that its keys do not hold.
    """
    config = model.config
    if config.encoder.name != "vit_intern300m_patch14_448":
        raise ValueError(f"the official layout knows InternViT encoders only, not {config.encoder.name}")
    official = UniFlowConfig()
    for name in ("latent_norm", "target_scale", "flow_segments"):
        if getattr(config, name) != getattr(official, name):
            raise ValueError(
                f"the official layout holds no {name}: its reader takes {getattr(official, name)!r}, this model has "
                f"{getattr(config, name)!r}; use save_pretrained"
            )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in official_state(model).items()}
    write_atomically(path, lambda temporary: save_file(state, temporary, {"format": "pt"}))
