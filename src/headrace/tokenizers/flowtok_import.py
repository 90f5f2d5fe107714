"""Weights of the released FlowTok (Hugging Face `turkeyju/FlowTok`) to ours and back.

The release is two PyTorch files: `FlowTiTok_512.bin`, an image tokenizer, and `FlowTok-XL.pth` or `FlowTok-H.pth`, the
flow. We read no pickles; convert once with
`save_file(torch.load(path, map_location="cpu", weights_only=True), "out.safetensors")`.
"""

import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.nn.axial_rope import axial_angles
from headrace.nn.dit import SequenceDiT, SequenceDiTConfig
from headrace.nn.grid_positions import sincos_1d
from headrace.nn.pretrained import load_strictly, read_weights
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_bridge import TextToImage
from headrace.tokenizers.flowtok_captions import CaptionConfig
from headrace.tokenizers.flowtok_config import NETS, FlowTokConfig
from headrace.tokenizers.flowtok_image import TokenVAE, TokenVAEConfig, TowerConfig
from headrace.tokenizers.flowtok_text import ProjectorConfig

OFFICIAL_PROJECTOR_HEADS = 8
OFFICIAL_TIME_SCALE = 1.0
# (official, ours) as plain pieces of a name; each list reads both ways.
IMAGE_RENAMES = (
    ("encoder.latent_token_positional_embedding", "encoder.query_positions"),
    ("decoder.latent_token_positional_embedding", "decoder.latent_positions"),
    ("decoder.text_guidance_positional_embedding", "decoder.text_positions"),
    ("encoder.conv_out.", "encoder.out."),
    ("decoder.conv_out.", "decoder.smooth."),
    ("decoder.decoder_embed.", "decoder.latent_in."),
    ("decoder.text_guidance_proj.", "decoder.text_in."),
    ("decoder.ffn.0.", "decoder.to_pixels."),
    ("latent_tokens", "encoder.queries"),
)
TOWER_PIECES = ("ln_pre.", "ln_post.", "transformer.")
FLOW_RENAMES = (
    ("t2t_temperature", "align.log_temperature"),
    ("context_projector.", "align.mlp."),
    ("context_encoder.", "projector."),
    ("x_embedder.", "velocity.token_in."),
    ("t_embedder.", "velocity.time_embed."),
    ("y_embedder.embedding_table.", "velocity.class_table."),
    ("final_layer.linear.", "velocity.out."),
    ("final_layer.adaLN_modulation.1.", "velocity.out_modulation."),
    ("blocks.", "velocity.blocks."),
)
BLOCK_PIECES = (
    (".adaLN_modulation.1.", ".modulation."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
)
PROJECTOR_PIECES = (
    (".attn.W_Q.", ".query."),
    (".attn.W_K.", ".key."),
    (".attn.W_V.", ".value."),
    (".attn.W_O.", ".out."),
    (".feed_forward.ffn_1.", ".grow."),
    (".feed_forward.ffn_2.", ".shrink."),
)
NORM_PIECES = ((".g", ".gain"), (".b", ".bias"))
ONE_BY_ONE = ("encoder.out.weight", "decoder.to_pixels.weight")
ROTATION = re.compile(r"^(encoder|decoder)\.positional_embedding\.freqs_(cos|sin)$")


def _prefixed(name: str, pairs: tuple[tuple[str, str], ...], *, back: bool) -> str:
    for official, ours in pairs:
        old, new = (ours, official) if back else (official, ours)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _inside(name: str, pairs: tuple[tuple[str, str], ...], *, back: bool) -> str:
    for official, ours in pairs:
        name = name.replace(ours, official) if back else name.replace(official, ours)
    return name


def image_name(name: str, *, back: bool = False) -> str:
    """Official name of an image tokenizer tensor to ours, or `back`."""
    for side in ("encoder.", "decoder."):
        for piece in TOWER_PIECES:
            old, new = (f"{side}tower.{piece}", side + piece) if back else (side + piece, f"{side}tower.{piece}")
            if name.startswith(old):
                return new + name.removeprefix(old)
    return _prefixed(name, IMAGE_RENAMES, back=back)


def flow_name(name: str, *, back: bool = False) -> str:
    """Official name of a flow tensor to ours, or `back`."""
    if name.startswith("projector." if back else "context_encoder."):
        for official, ours in NORM_PIECES:
            old, new = (ours, official) if back else (official, ours)
            name = re.sub(rf"(\.norm[12]){re.escape(old)}$", rf"\1{new}", name)
        name = _inside(name, PROJECTOR_PIECES, back=back)
    elif name.startswith("velocity.blocks." if back else "blocks."):
        name = _inside(name, BLOCK_PIECES, back=back)
    return _prefixed(name, FLOW_RENAMES, back=back)


def _shape(state: dict[str, Tensor], name: str, what: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"no {name!r} among {len(state)} keys: this is no official FlowTok {what}")
    return tuple(state[name].shape)


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(k.split(".")[prefix.count(".")]) for k in state if k.startswith(prefix)), default=-1)


def image_config(state: dict[str, Tensor]) -> TokenVAEConfig:
    """Sizes of an official image tokenizer, all read from shapes.

    Raises:
        ValueError: Keys that give sizes are missing.
    """
    width, _, patch, _ = _shape(state, "encoder.patch_embed.weight", "image tokenizer")
    cells, head_dim = _shape(state, "encoder.positional_embedding.freqs_cos", "image tokenizer")
    decoder_head_dim = _shape(state, "decoder.positional_embedding.freqs_cos", "image tokenizer")[1]
    decoder_width, text_width = _shape(state, "decoder.text_guidance_proj.weight", "image tokenizer")
    tokens = _shape(state, "latent_tokens", "image tokenizer")[0]
    encoder = TowerConfig(width=width, depth=_depth(state, "encoder.transformer."), heads=width // head_dim)
    decoder = TowerConfig(
        width=decoder_width, depth=_depth(state, "decoder.transformer."), heads=decoder_width // decoder_head_dim
    )
    return TokenVAEConfig(
        image_size=math.isqrt(cells) * patch,
        patch=patch,
        tokens=tokens,
        channels=_shape(state, "decoder.decoder_embed.weight", "image tokenizer")[1],
        text_width=text_width,
        encoder=encoder,
        decoder=decoder,
    )


def load_image_tokenizer(model: TokenVAE, state: dict[str, Tensor], *, what: str = "the given state") -> TokenVAE:
    """Put official tensors into an image tokenizer, strictly.

    Raises:
        ValueError: The rotation tables are for another grid (a 512 px tokenizer into a 256 px model, say), or keys or
            shapes do not fit.
    """
    grid = model.config.grid
    ours = {}
    for name, tensor in state.items():
        table = ROTATION.match(name)
        if table is None:
            new = image_name(name)
            ours[new] = tensor.float().squeeze((-1, -2)) if new in ONE_BY_ONE else tensor.float()
            continue
        rows = tensor.shape[0]
        if rows != grid * grid:
            side = math.isqrt(rows)
            raise ValueError(
                f"{what} rotates a grid of {side} x {side} ({side * model.config.patch} px), the model has {grid} x "
                f"{grid} ({model.config.image_size} px); these are two tokenizers, build the config from image_config"
            )
        angles = axial_angles((grid, grid), tensor.shape[1])
        expected = angles.cos() if table[2] == "cos" else angles.sin()
        if not torch.allclose(tensor.float().cpu(), expected, atol=1e-4):
            raise ValueError(f"{what}: {name} is not the rotation that this model computes")
    load_strictly(model, ours, what=what)
    return model


def flow_config(state: dict[str, Tensor], *, heads: int = 0) -> SequenceDiTConfig:
    """Sizes of an official velocity network from shapes.

    Args:
        state: Official tensors.
        heads: No shape shows them; 0 takes the published number for the width.

    Raises:
        ValueError: Missing keys, or an unpublished width without `heads`.
    """
    _, tokens, width = _shape(state, "pos_embed", "flow")
    known = {w: h for w, _, h in NETS.values()}
    if not heads and width not in known:
        raise ValueError(f"width {width} is none of the published {sorted(known)}; give heads")
    return SequenceDiTConfig(
        tokens=tokens,
        channels=_shape(state, "x_embedder.weight", "flow")[1],
        width=width,
        depth=_depth(state, "blocks."),
        heads=heads or known[width],
        mlp_ratio=_shape(state, "blocks.0.mlp.fc1.weight", "flow")[0] / width,
        time_scale=OFFICIAL_TIME_SCALE,
    )


def projector_config(state: dict[str, Tensor], *, heads: int = OFFICIAL_PROJECTOR_HEADS) -> ProjectorConfig:
    """Sizes of an official text projector and alignment head."""
    return ProjectorConfig(
        blocks=_depth(state, "context_encoder.layers."),
        heads=heads,
        hidden=_shape(state, "context_encoder.layers.0.feed_forward.ffn_1.weight", "flow")[0],
        align_hidden=_shape(state, "context_projector.0.weight", "flow")[0],
    )


def load_flow(model: TextToImage, state: dict[str, Tensor], *, what: str = "the given state") -> TextToImage:
    """Put official tensors into a text-to-image half, strictly; raises ValueError as `load_strictly`."""
    positions = state.get("pos_embed")
    if positions is not None:
        expected = sincos_1d(torch.arange(positions.shape[1]), positions.shape[2])[None]
        if not torch.allclose(positions.float().cpu(), expected, atol=1e-4):
            raise ValueError(f"{what}: pos_embed is not the sine-cosine table that this model computes")
    load_strictly(model, {flow_name(k): v.float() for k, v in state.items() if k != "pos_embed"}, what=what)
    return model


def from_official(
    image: dict[str, Tensor],
    flow: dict[str, Tensor],
    captions: CaptionConfig,
    *,
    heads: int = 0,
    projector_heads: int = OFFICIAL_PROJECTOR_HEADS,
    what: tuple[str, str] = ("the image tokenizer", "the flow"),
) -> FlowTok:
    """A FlowTok of both official files, text-to-image only, with the released sampler's step grid.

    Args:
        image: Official image tokenizer tensors.
        flow: Official flow tensors.
        captions: The text tower; `CaptionConfig()` for CLIP, whose weights `model.captions.load_clip()` fetches.
        heads: See `flow_config`.
        projector_heads: Heads of the projector, 8 in the release.
        what: What errors call the two.

    Raises:
        ValueError: The parts do not fit each other or are not what they should be.
    """
    config = FlowTokConfig(
        image=image_config(image),
        captions=captions,
        projector=projector_config(flow, heads=projector_heads),
        net=flow_config(flow, heads=heads),
        kl_reduction="batch_sum",
        legacy_grid=True,
    )
    model = FlowTok(config)
    load_image_tokenizer(model.image, image, what=what[0])
    load_flow(model.to_image, flow, what=what[1])
    return model.eval()


def load_official(
    tokenizer_file: str | os.PathLike[str],
    flow_file: str | os.PathLike[str] | None = None,
    *,
    captions: CaptionConfig | None = None,
    heads: int = 0,
    projector_heads: int = OFFICIAL_PROJECTOR_HEADS,
) -> FlowTok:
    """Read both files of the release, converted to safetensors, strictly.

    Args:
        tokenizer_file: The image tokenizer.
        flow_file: The flow of the same token shape; needed, None only gives a clearer error.
        captions: Text tower without weights of its own; None takes CLIP with its weights, fetched from the Hub.
        heads: See `flow_config`.
        projector_heads: Heads of the projector.

    Returns:
        The model in eval mode, text-to-image only.

    Raises:
        FileNotFoundError: No such file.
        ValueError: One file only, a truncated one, another model's, or two that do not fit each other.
        OSError: CLIP is neither cached nor reachable.
    """
    if flow_file is None:
        raise ValueError(
            f"FlowTok's release is two files, an image tokenizer and a flow, and {tokenizer_file} is one; "
            "give both, by name as flowtok:TOKENIZER_FILE,FLOW_FILE"
        )
    model = from_official(
        read_weights(Path(tokenizer_file)),
        read_weights(Path(flow_file)),
        captions or CaptionConfig(),
        heads=heads,
        projector_heads=projector_heads,
        what=(os.fspath(tokenizer_file), os.fspath(flow_file)),
    )
    if captions is None:
        model.captions.load_clip()
    return model


def official_state(model: FlowTok) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Image tokenizer and flow tensors under official names, tables included."""
    image: dict[str, Tensor] = {}
    for name, tensor in model.image.state_dict().items():
        image[image_name(name, back=True)] = tensor[..., None, None] if name in ONE_BY_ONE else tensor
    for side, part in (("encoder", model.image.encoder), ("decoder", model.image.decoder)):
        image[f"{side}.positional_embedding.freqs_cos"] = _table(part.tower, "cos")
        image[f"{side}.positional_embedding.freqs_sin"] = _table(part.tower, "sin")
    flow = {flow_name(name, back=True): tensor for name, tensor in model.to_image.state_dict().items()}
    net: SequenceDiT = model.to_image.velocity
    flow["pos_embed"] = _table(net, "positions")
    return image, flow


def _table(module: nn.Module, name: str) -> Tensor:
    return module.get_buffer(name)
