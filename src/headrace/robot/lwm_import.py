"""Checkpoints of LWM and ViPRA-7B, which exist in JAX only, as weights of our networks.

A file is a stream of msgpack records (path of the leaf, array in Flax's own encoding), so 7 B parameters are copied
leaf by leaf and never held twice. Kernels are (in, out) there and (out, in) here; layers may be stacked; rotary
embeddings turn neighbouring pairs there and the two halves of a head here, so queries and keys are reordered.
Sources: sroutray/vipra@d5d8c0d and LargeWorldModel/LWM (llama.py, vision_llama.py), flax.serialization.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor, nn

from headrace.robot.action_decoder import time_in_paper_order

CHUNKED = "__msgpack_chunked_array__"
ARRAY = 1  # Flax's msgpack extension for arrays
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}
LAYER = {
    "attention/wq": "self_attn.q_proj",
    "attention/wk": "self_attn.k_proj",
    "attention/wv": "self_attn.v_proj",
    "attention/wo": "self_attn.o_proj",
    "feed_forward/w1": "mlp.gate_proj",
    "feed_forward/w2": "mlp.down_proj",
    "feed_forward/w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where the official leaves go in one of our networks.

    Attributes:
        layers: Prefix of the transformer's blocks.
        top: Our key of each leaf outside the blocks.
        unused: Leaves that this network has no place for.
        kept: Prefixes of our own keys that the official file does not hold.
    """

    layers: str
    top: dict[str, str]
    unused: tuple[str, ...]
    kept: tuple[str, ...] = ()


ACTION_PART = {
    "transformer/action_encoder/linear_1/kernel": "decoder.action_in.weight",
    "transformer/action_encoder/linear_1/bias": "decoder.action_in.bias",
    "transformer/action_encoder/linear_2/kernel": "decoder.mix.weight",
    "transformer/action_encoder/linear_2/bias": "decoder.mix.bias",
    "transformer/action_encoder/linear_3/kernel": "decoder.out.weight",
    "transformer/action_encoder/linear_3/bias": "decoder.out.bias",
    "action_head/kernel": "decoder.velocity_out.weight",
    "action_head/bias": "decoder.velocity_out.bias",
}
HEADS = ("lm_head/kernel", "vision_head/kernel", "latent_actions_head/kernel", "transformer/late/embedding")
# `VipraPolicy` with frames as ids and text from a tokenizer; time features `paper`.
POLICY = Names(
    layers="backbone.layers",
    top={
        "transformer/wte/embedding": "text.weight",
        "transformer/vte/embedding": "image_tokens.table.weight",
        "transformer/ln_f/kernel": "backbone.norm.weight",
        **ACTION_PART,
    },
    unused=HEADS,
    kept=("image_tokens.encoder.",),
)
# `VipraPretraining` with frames as ids and text from a tokenizer: the released pretrained network.
PRETRAINING = Names(
    layers="backbone.layers",
    top={
        "transformer/wte/embedding": "text.weight",
        "transformer/vte/embedding": "image_tokens.table.weight",
        "transformer/late/embedding": "tables.latent.weight",
        "transformer/ln_f/kernel": "backbone.norm.weight",
        "lm_head/kernel": "heads.spelling.weight",
        "vision_head/kernel": "heads.visual.weight",
        "latent_actions_head/kernel": "heads.latent.weight",
    },
    unused=tuple(ACTION_PART),
    kept=("image_tokens.encoder.",),
)
# `VideoLanguageModel` around a LLaMA, with the vocabularies `visual` and `latent`.
LANGUAGE = Names(
    layers="language.model.layers",
    top={
        "transformer/wte/embedding": "language.model.embed_tokens.weight",
        "transformer/vte/embedding": "tables.visual.weight",
        "transformer/late/embedding": "tables.latent.weight",
        "transformer/ln_f/kernel": "language.model.norm.weight",
        "lm_head/kernel": "language.lm_head.weight",
        "vision_head/kernel": "heads.visual.weight",
        "latent_actions_head/kernel": "heads.latent.weight",
    },
    unused=tuple(ACTION_PART),
    kept=("encoder.",),
)


def read_stream(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Leaves of a streamed checkpoint by their path, such as `transformer/wte/embedding`, without leading `params`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no such stream, or is truncated.
    """
    with Path(path).open("rb") as file:
        records = msgpack.Unpacker(file, read_size=64 << 20, max_buffer_size=0, raw=False)
        count = 0
        try:
            for record in records:
                key, value = record
                parts = list(key)
                while parts and parts[0] in ("params", "train_state"):
                    parts.pop(0)
                count += 1
                yield "/".join(parts), array_of(value)
        except (ValueError, TypeError, msgpack.exceptions.ExtraData) as error:
            raise ValueError(f"{path} is no stream of Flax arrays: record {count}: {error}") from error
        if not count or records.tell() != Path(path).stat().st_size:
            raise ValueError(f"{path} ends in the middle of record {count}; copy or download it again")


def array_of(packed: bytes) -> Tensor:
    """One array from Flax's bytes, also one that was cut into chunks.

    Raises:
        ValueError: Something else than an array.
    """
    value = msgpack.unpackb(packed, ext_hook=_array, raw=False, strict_map_key=False, max_ext_len=2**32 - 1)
    if isinstance(value, dict) and value.get(CHUNKED):
        shape = [value["shape"][str(axis)] for axis in range(len(value["shape"]))]
        chunks = [value["chunks"][str(index)] for index in range(len(value["chunks"]))]
        return torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"expected an array, got {type(value).__name__}")
    return value


def _array(code: int, data: bytes) -> Tensor:
    if code != ARRAY:
        raise ValueError(f"msgpack extension {code} is no array")
    shape, dtype, raw = msgpack.unpackb(data, raw=False, max_bin_len=2**32 - 1)
    if dtype not in DTYPES:
        raise ValueError(f"arrays of {dtype} are not known")
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def ours(name: str, value: Tensor, names: Names, *, heads: int, scan_axis: int = 0) -> dict[str, Tensor]:
    """Our keys and tensors of one official leaf; empty for a leaf that this network does not use.

    Args:
        name: Path of the leaf.
        value: Its array.
        names: Of the network that is filled.
        heads: Attention heads, for the order of rotary pairs.
        scan_axis: Axis along which stacked layers lie.

    Raises:
        ValueError: A leaf that is not part of these models.
    """
    if name in names.unused:
        return {}
    if name in names.top:
        key, tensor = names.top[name], _turned(name, value)
        return {key: time_in_paper_order(tensor) if key.endswith("decoder.mix.weight") else tensor}
    found = re.fullmatch(r"transformer/h/(\d+|scan_decoder)/(.+)/kernel", name)
    if found is None or found[2] not in LAYER:
        raise ValueError(f"{name} is not part of LWM's or ViPRA's language model")
    stacked = value.unbind(scan_axis) if found[1] == "scan_decoder" else (value,)
    first = 0 if found[1] == "scan_decoder" else int(found[1])
    answer = {}
    for index, one in enumerate(stacked, start=first):
        tensor = _turned(name, one)
        if found[2] in ("attention/wq", "attention/wk"):
            tensor = halves_of_pairs(tensor, heads)
        answer[f"{names.layers}.{index}.{LAYER[found[2]]}.weight"] = tensor
    return answer


def _turned(name: str, value: Tensor) -> Tensor:
    """Kernels of dense layers are (in, out) in Flax; tables, norms and biases stay."""
    return value.T if name.endswith("/kernel") and value.ndim == 2 else value


def halves_of_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key map, (D, D_in), from neighbouring rotary pairs to halves of each head."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def pairs_of_halves(weight: Tensor, heads: int) -> Tensor:
    """The way back of `halves_of_pairs`."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)


def load_leaves(
    model: nn.Module, leaves: Iterable[tuple[str, Tensor]], names: Names, *, heads: int, scan_axis: int = 0
) -> None:
    """Copy official leaves into a network, one at a time.

    Args:
        model: Its own dtype and device are kept.
        leaves: From `read_stream`.
        names, heads, scan_axis: See `ours`.

    Raises:
        ValueError: Leaves that the network does not know, weights that stayed unfilled, or other shapes; up to five of
            each are named.
    """
    own = dict(model.state_dict(keep_vars=True))
    filled: set[str] = set()
    problems: dict[str, list[str]] = {"not known to the network": [], "of another shape": [], "missing": []}
    for name, value in leaves:
        for key, tensor in ours(name, value, names, heads=heads, scan_axis=scan_axis).items():
            if key not in own:
                problems["not known to the network"].append(key)
            elif own[key].shape != tensor.shape:
                problems["of another shape"].append(f"{key} {tuple(tensor.shape)} for {tuple(own[key].shape)}")
            else:
                own[key].data.copy_(tensor)
                filled.add(key)
    problems["missing"] = [key for key in own if key not in filled and not key.startswith(names.kept or ("\0",))]
    named = [f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in problems.items() if keys]
    if named:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: " + "; ".join(named))


def theirs(model: nn.Module, names: Names, *, heads: int) -> dict[str, Tensor]:
    """A network's weights under the official paths, layers one by one; the way back of `load_leaves`."""
    top = {key: name for name, key in names.top.items()}
    blocks = {part: path for path, part in LAYER.items()}
    answer: dict[str, Any] = {}
    for key, tensor in model.state_dict().items():
        if key in top:
            tensor = paper_order_of_time(tensor) if key.endswith("decoder.mix.weight") else tensor
            answer[top[key]] = _turned(top[key], tensor)
        elif key.startswith(names.layers + "."):
            index, part = key.removeprefix(names.layers + ".").removesuffix(".weight").split(".", 1)
            path = blocks[part]
            tensor = pairs_of_halves(tensor, heads) if path in ("attention/wq", "attention/wk") else tensor
            name = f"transformer/h/{index}/{path}/kernel"
            answer[name] = _turned(name, tensor)
    return answer


def paper_order_of_time(mix: Tensor) -> Tensor:
    """The way back of `time_in_paper_order`."""
    quarter = mix.shape[1] // 4
    cosines, sines, action = mix.split((quarter, quarter, 2 * quarter), 1)
    return torch.cat((sines, cosines, action), 1)
