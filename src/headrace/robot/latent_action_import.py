"""Weights of the official latent action model under our names.

Source: sroutray/vipra@d5d8c0d, class LAQ; released as vipra-project/vipra-laq.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from headrace.nn.pretrained import load_strictly
from headrace.robot.frame_features import timm_names
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig

# Modules that the official model defines and never calls, and frozen networks of its losses.
UNUSED = ("fusion_layer.", "lpips.", "flow_model.")

BLOCK = {"0": "film", "1": "position", "2": "spatial", "3": "temporal", "4": "network"}
PARTS = (
    (r"^enc_spatial_rel_pos_bias\.", "encoder.blocks.position_bias."),
    (r"^dec_spatial_rel_pos_bias\.", "decoder.blocks.position_bias."),
    (r"^enc_st_transformer\.norm_out\.", "encoder.blocks.norm."),
    (r"^dec_transformer\.norm_out\.", "decoder.blocks.norm."),
    (r"^enc_st_transformer\.layers\.", "encoder.blocks.blocks."),
    (r"^dec_transformer\.layers\.", "decoder.blocks.blocks."),
    (r"^vq_project_in\.", "encoder.reducer.inp."),
    (r"^vq_encoder\.", "encoder.reducer.convolutions."),
    (r"^vq\.codebooks$", "quantizer.codebook"),
    (r"^vq\.codebooks_used$", "quantizer.usage"),
    (r"^vq_to_cond\.1\.", "decoder.condition."),
    (r"^vq_to_cond\.2\.", "decoder.condition_network."),
    (r"^dec_patchify\.proj\.", "decoder.patches."),
    (r"^dec_patchify\.norm\.", "decoder.patch_norm."),
    (r"^to_pixels\.0\.", "decoder.out."),
)
INSIDE = (
    (r"\.dsconv\.", ".convolution."),
    (r"\.to_alpha_beta\.", ".scale_shift."),
    (r"\.ffn\.", ".network."),
    (r"\.to_q\.", ".query."),
    (r"\.to_kv\.", ".key_value."),
    (r"\.to_out\.", ".out."),
    (r"\.q_scale$", ".query_scale"),
    (r"\.k_scale$", ".key_scale"),
    (r"network\.0\.gamma$", "network.norm.weight"),
    (r"network\.1\.weight$", "network.inp.weight"),
    (r"network\.4\.weight$", "network.out.weight"),
    (r"\.gamma$", ".weight"),
)
STEM = {"proj": "patches", "ln": "norm", "fc": "mix"}


def our_name(official: str) -> str:
    """Our key of an official key outside the frame features."""
    name = official
    for pattern, ours in PARTS:
        name = re.sub(pattern, ours, name)
    in_film = re.match(r"(.*\.blocks\.blocks\.\d+)\.0\.(.*)", name)
    if in_film:
        rest = in_film[2].replace("to_alpha_beta.", "scale_shift.").replace("ffn.", "network.")
        return f"{in_film[1]}.film.{rest}"
    name = re.sub(r"(\.blocks\.blocks\.\d+)\.([1-4])\.", lambda m: f"{m[1]}.{BLOCK[m[2]]}.", name)
    for pattern, ours in INSIDE:
        name = re.sub(pattern, ours, name)
    return name


def stem_name(official: str) -> str:
    """Our key of a patch stem's key, as stands in for DINOv2 in models without weights."""
    module, _, rest = official.partition(".")
    return f"{STEM.get(module, module)}.{rest}"


def official_state(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state, leaving out what its model never uses.

    Raises:
        ValueError: A norm has a shift other than 0, which our norms cannot hold.
    """
    state, dino = {}, {}
    for name, value in official.items():
        if name.startswith(UNUSED) or ".context_norm." in name:
            continue
        if name.endswith(".beta"):
            if bool((value != 0).any()):
                raise ValueError(f"{name} must be 0, as the official model never learns it; this is another model's")
            continue
        if name.startswith("enc_spatial_transformer."):
            dino[name.removeprefix("enc_spatial_transformer.").removeprefix("model.")] = value
        else:
            state[our_name(name)] = value
    features = timm_names(dino) if "register_tokens" in dino else {stem_name(k): v for k, v in dino.items()}
    return state | {f"encoder.features.net.{key}": value for key, value in features.items()}


def from_official(official: dict[str, Tensor], config: LatentActionConfig | None = None) -> LatentActionModel:
    """The official model's weights in ours, in eval mode.

    Args:
        official: State of class LAQ by its own names, without a prefix.
        config: Size of the model; the published one if not given.

    Raises:
        ValueError: The weights do not fit; lists what is missing or of another shape.
    """
    model = LatentActionModel(config or LatentActionConfig())
    load_strictly(model, official_state(official), what="the official latent action model")
    return model.eval()


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The state of a published latent action model: a PyTorch file, bare, under `model`, or wrapped by a trainer.

    Only tensors are read, never objects.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a PyTorch file of tensors, or no state of class LAQ in it.
    """
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no PyTorch file of plain tensors ({error}); it is not loaded") from error
    for name in ("model", "state_dict", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    state = {str(key).removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if "vq.codebooks" not in state:
        raise ValueError(f"{path} holds no latent action model of class LAQ (there is no vq.codebooks)")
    return state


def load_official(path: str | Path, config: LatentActionConfig | None = None) -> LatentActionModel:
    """`from_official` of `read_official`."""
    return from_official(read_official(path), config)
