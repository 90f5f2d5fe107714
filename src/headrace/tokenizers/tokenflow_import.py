"""Read and write the checkpoint files of the TokenFlow release (ByteVisionLab/TokenFlow), both directions.

The release names what belongs to meaning `vqkd` and what belongs to pixels `vqgan`. Its B tower has OpenAI CLIP names,
L timm names and XL the names of transformers' SigLIP, with or without `vision_model.` in front (transformers 4 and 5).
"""

import argparse
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.nn.pretrained import load_strictly, read_weights, write_atomically
from headrace.nn.quantizers.multi_scale import MultiScaleConfig
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_semantic import FAMILIES, Family, SemanticDecoderConfig, TowerConfig
from headrace.tokenizers.vqgan import VQGANConfig

State = dict[str, Tensor]

# ours: official. Prefixes; the tower is translated apart.
PREFIXES = {
    "pixel_encoder.": "encoder.",
    "pixel_decoder.": "decoder.",
    "to_code.": "quant_conv.",
    "from_code.": "post_quant_conv.",
    "semantic_decoder.": "decoder_vqkd.",
    "encode_task.": "encode_task_layer.",
    "decode_task.": "decode_task_layer.",
    "quantizer.books.0": "quantize.embedding_vqkd.weight",
    "quantizer.books.1": "quantize.embedding_vqgan.weight",
}
TOWER, OFFICIAL_TOWER = "tower.model.", "encoder_vqkd."
USAGE_KEY, USAGE_LENGTH = "quantize.codebook_used", 131072  # a FIFO of indices of the last steps; no weights
SCALING_KEYS = ("scaling_layer.shift", "scaling_layer.scale")  # mean and std, constants that we keep in the config

CLIP_NAMES = (
    (r"cls_token", "class_embedding"),
    (r"pos_embed", "positional_embedding"),
    (r"patch_embed\.proj\.", "conv1."),
    (r"norm_pre\.", "ln_pre."),
    (r"norm\.", "ln_post."),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"blocks\.(\d+)\.norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
)
SIGLIP_NAMES = (
    (r"pos_embed", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"attn_pool\.latent", "head.probe"),
    (r"attn_pool\.proj\.", "head.attention.out_proj."),
    (r"attn_pool\.norm\.", "head.layernorm."),
    (r"attn_pool\.mlp\.", "head.mlp."),
)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        found = re.match(pattern, name)
        if found:
            return found.expand(new) + name[found.end() :]
    raise ValueError(f"{name!r} is no weight of this tower; the checkpoint is of another model")


def _clip_tower(state: State) -> State:
    out = {_renamed(name, CLIP_NAMES): value for name, value in state.items()}
    out["class_embedding"] = out["class_embedding"].flatten()
    out["positional_embedding"] = out["positional_embedding"][0]
    return out


def _siglip_tower(state: State) -> State:
    out: State = {}
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if block:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[f"encoder.layers.{block[1]}.self_attn.{letter}_proj.{block[2]}"] = part
        elif name in ("attn_pool.q.weight", "attn_pool.q.bias"):
            kind = name.rsplit(".", 1)[1]
            out[f"head.attention.in_proj_{kind}"] = torch.cat([value, state[f"attn_pool.kv.{kind}"]])
        elif not name.startswith("attn_pool.kv."):
            out[_renamed(name, SIGLIP_NAMES)] = value
    out["embeddings.position_embedding.weight"] = out["embeddings.position_embedding.weight"][0]
    return {f"vision_model.{name}": value for name, value in out.items()}


EXPORT_TOWER = {"clip": _clip_tower, "siglip": _siglip_tower, "vitamin": lambda state: dict(state)}


def export_official(model: TokenFlow) -> State:
    """The weights under the release's names, including its constants; the usage FIFO is written as zeros.

    Raises:
        ValueError: The model has parts that the release has no names for, as `mini` has.
    """
    own = {name: value.detach() for name, value in model.state_dict().items()}
    family = model.config.tower.family
    sides = (model.config.pixel_encoder, model.config.pixel_decoder)
    if family not in EXPORT_TOWER or any(side.shortcut for side in sides):
        raise ValueError(
            f"the release has no names for a tower of family {family!r} or a VQGAN with a shortcut; it knows the "
            f"towers {', '.join(EXPORT_TOWER)}. save_pretrained writes this model"
        )
    tower = {name.removeprefix(TOWER): value for name, value in own.items() if name.startswith(TOWER)}
    out = {OFFICIAL_TOWER + name: value for name, value in EXPORT_TOWER[family](tower).items()}
    for name, value in own.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            out[PREFIXES[prefix] + name.removeprefix(prefix)] = value
    device = model.device
    out[USAGE_KEY] = torch.zeros(USAGE_LENGTH, device=device)
    facts = FAMILIES[family]
    if facts.mean is not None and facts.std is not None:
        for key, numbers in zip(SCALING_KEYS, (facts.mean, facts.std), strict=True):
            out[key] = torch.tensor(numbers, device=device).view(1, 3, 1, 1)
    return out


def _tower_from_official(state: State, family: Family, depth: int) -> State:
    if family == "vitamin":
        return dict(state)
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    out: State = {}
    tables = {"clip": CLIP_NAMES, "siglip": SIGLIP_NAMES}[family]
    inverse = tuple((_pattern_of(new), _template_of(old)) for old, new in tables)
    for name, value in state.items():
        if re.search(r"self_attn\.[qkv]_proj", name) or name.startswith("head.attention.in_proj"):
            continue
        out[_renamed(name, inverse)] = value
    if family == "clip":
        out["cls_token"] = out["cls_token"].view(1, 1, -1)
    out["pos_embed"] = out["pos_embed"][None]
    for kind in ("weight", "bias") if family == "siglip" else ():
        for index in range(depth):
            parts = [state[f"encoder.layers.{index}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
        joined = state[f"head.attention.in_proj_{kind}"]
        third = joined.shape[0] // 3
        out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = joined[:third], joined[third:]
    return out


def _pattern_of(template: str) -> str:
    escaped = re.escape(template.replace(r"\1", "FIRST").replace(r"\2", "SECOND"))
    return escaped.replace("FIRST", r"(\d+)").replace("SECOND", r"([12]|weight|bias)")


def _template_of(pattern: str) -> str:
    groups = iter((r"\1", r"\2"))
    return re.sub(r"\([^)]*\)", lambda _: next(groups), pattern).replace(r"\.", ".")


def from_official(state: State, config: TokenFlowConfig) -> State:
    """Rename the release's weights to ours; constants and the usage FIFO are dropped.

    Raises:
        ValueError: A weight of the tower is missing, or one is there that it does not have.
    """
    tower = {k.removeprefix(OFFICIAL_TOWER): v for k, v in state.items() if k.startswith(OFFICIAL_TOWER)}
    try:
        renamed = _tower_from_official(tower, config.tower.family, config.tower.depth)
    except KeyError as error:
        raise ValueError(
            f"the checkpoint is not whole: its {config.tower.family} tower lacks {error.args[0]!r}; download it again"
        ) from error
    out = {TOWER + name: value for name, value in renamed.items()}
    for name, value in state.items():
        if name.startswith(OFFICIAL_TOWER) or name == USAGE_KEY or name in SCALING_KEYS:
            continue
        ours = next((mine for mine, theirs in PREFIXES.items() if name.startswith(theirs)), None)
        out[name if ours is None else ours + name.removeprefix(PREFIXES[ours])] = value
    return out


def official_family(state: State) -> Family:
    """Which tower a release checkpoint holds.

    Raises:
        ValueError: It is no TokenFlow checkpoint.
    """
    names = {name.removeprefix(OFFICIAL_TOWER).removeprefix("vision_model.") for name in state}
    for family, key in (("clip", "class_embedding"), ("siglip", "post_layernorm.weight")):
        if key in names:
            return family  # type: ignore[return-value]
    if any(name.startswith("patch_embed.backbone.") for name in names):
        return "vitamin"
    raise ValueError("this is no TokenFlow checkpoint: no tower of CLIP, ViTamin or SigLIP is in it (encoder_vqkd.*)")


def official_variant(state: State) -> str:
    """The variant of `TokenFlow.VARIANTS` that fits a release checkpoint: tower and decoder decide.

    Raises:
        ValueError: No TokenFlow checkpoint, or not a whole one.
    """
    family = official_family(state)
    if family != "clip":
        return {"vitamin": "l", "siglip": "xl"}[family]
    finest = state.get("decoder.norm_out.weight")
    if finest is None:
        raise ValueError("the checkpoint is not whole: it lacks 'decoder.norm_out.weight'; download it again")
    return "b_256" if finest.shape[0] == TokenFlowConfig.b_256().pixel_decoder.width else "b"


def config_from_official(
    state: State, *, size: int, scales: tuple[int, ...], heads: int, decoder_heads: int
) -> TokenFlowConfig:
    """Configuration of a CLIP-tower checkpoint of any size, read from its shapes.

    Args:
        state: Weights under the release's names.
        size: Side of the pictures [px].
        scales: Sides of the scales; they are not in the weights.
        heads, decoder_heads: Attention heads of tower and semantic decoder; neither are they.
    """
    conv, rows = state["encoder_vqkd.conv1.weight"], state["encoder_vqkd.positional_embedding"].shape[0]
    width, patch = conv.shape[0], conv.shape[-1]
    blocks = _length(state, r"encoder_vqkd\.transformer\.resblocks\.(\d+)\.")
    own = TowerConfig(
        size=round((rows - 1) ** 0.5) * patch,
        patch=patch,
        width=width,
        depth=blocks,
        heads=heads,
        hidden=state["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    )
    table = state["decoder_vqkd.pos_embed"]
    meaning, pixel = (state[f"quantize.embedding_{kind}.weight"].shape for kind in ("vqkd", "vqgan"))
    return TokenFlowConfig(
        size=size,
        tower=own,
        semantic_decoder=SemanticDecoderConfig(
            width=table.shape[-1],
            depth=_length(state, r"decoder_vqkd\.blocks\.(\d+)\."),
            heads=decoder_heads,
            grid=round((table.shape[1] - 1) ** 0.5),
            teacher=state["decode_task_layer.2.weight"].shape[0],
        ),
        pixel_encoder=_vqgan_from(state, "encoder"),
        pixel_decoder=_vqgan_from(state, "decoder"),
        quantizer=MultiScaleConfig(scales=scales, dims=(meaning[1], pixel[1]), codes=meaning[0]),
    )


def _length(state: State, pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _vqgan_from(state: State, side: str) -> VQGANConfig:
    levels = _length(state, rf"{side}\.conv_blocks\.(\d+)\.")
    blocks = _length(state, rf"{side}\.conv_blocks\.0\.res\.(\d+)\.")
    widths = [state[f"{side}.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
    conv_in, conv_out = state[f"{side}.conv_in.weight"].shape, state[f"{side}.conv_out.weight"].shape
    if side == "decoder":
        # The finest level's width is the decoder's; multipliers count from the finest.
        base = widths[-1]
        return VQGANConfig(
            width=base, multipliers=tuple(w // base for w in reversed(widths)), blocks=blocks - 1, latent=conv_in[1]
        )
    return VQGANConfig(
        width=conv_in[0], multipliers=tuple(w // conv_in[0] for w in widths), blocks=blocks, latent=conv_out[0]
    )


def read_official(path: str | os.PathLike[str]) -> State:
    """Weights of a release file: `.pt` or safetensors.

    A `.pt` is read with torch's restricted unpickler only, which makes tensors, containers, numbers and texts and calls
    nothing else; the one more class allowed is `argparse.Namespace`, because the release's trainer stores its arguments
    beside the weights, and filling one runs no code. A file that names any other class is refused; no switch
    changes that. Of a training checkpoint the averaged weights are taken when there are some, as the release does.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off or of another format.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return read_weights(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; download tokenflow_*.pt of ByteVisionLab/TokenFlow")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} asks to run code or to make objects other than tensors, and is refused. Convert it to safetensors "
            "where you trust it."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as a torch checkpoint ({type(error).__name__}); it is cut off or holds something "
            "else. Download it again."
        ) from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            return data[key]
    if isinstance(data, dict) and all(isinstance(value, Tensor) for value in data.values()):
        return data
    raise ValueError(f"{file} holds no weights under 'ema', 'model' or 'state_dict'")


def load_official(path: str | os.PathLike[str], *, variant: str | None = None) -> TokenFlow:
    """Build a TokenFlow from a release file.

    Args:
        path: A `.pt` or safetensors file under the release's names.
        variant: One of `TokenFlow.VARIANTS`; None takes the one that fits (enhanced B: 256 px, 817 codes).

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A broken file, no TokenFlow, or another variant than asked for (both are named).
    """
    state = read_official(path)
    found = official_variant(state)
    wanted = variant or found
    if wanted not in TokenFlow.VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(TokenFlow.VARIANTS)}, got {wanted!r}")
    config: TokenFlowConfig = getattr(TokenFlowConfig, wanted)()
    same = getattr(TokenFlowConfig, found)()
    if (config.tower, config.pixel_decoder) != (same.tower, same.pixel_decoder):
        raise ValueError(f"{path} holds weights of the variant {found!r}, not of {wanted!r}")
    model = TokenFlow(config)
    load_strictly(model, from_official(state, config), what=os.fspath(path))
    return model.eval()


def save_official(model: TokenFlow, path: str | os.PathLike[str]) -> None:
    """Write a file that the release's own code loads: `{"model": ...}` for `.pt`, plain tensors for safetensors."""
    state = {name: value.cpu().contiguous() for name, value in export_official(model).items()}
    if Path(path).suffix == ".safetensors":
        write_atomically(Path(path), lambda part: save_file(state, part))
    else:
        write_atomically(Path(path), lambda part: torch.save({"model": state}, part))
