"""LWM's VQGAN weights under our names, and back. Source: LargeWorldModel/LWM, vqgan.py (Flax names its modules itself).

The published file is a pickled tree of arrays. It is read by an unpickler that knows arrays and nothing else; a file
that asks for more is refused.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.nn.pretrained import load_strictly
from headrace.tokenizers.lwm_vqgan import LwmVQGAN, LwmVQGANConfig

ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
}
INSIDE_BLOCK = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2"}
ENDS = {"Conv_0": "conv_in", "GroupNorm_0": "norm_out", "Conv_1": "conv_out"}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(
                f"the file asks for {module}.{name}, which is no numpy array; it is not loaded. Save the tree again as "
                "plain numpy arrays in an environment that trusts it"
            )
        return super().find_class(module, name)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickled tree by their path, such as `encoder/Conv_0/kernel`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no pickle, or holds something else than arrays.
    """
    with Path(path).open("rb") as file:
        try:
            tree = _ArraysOnly(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path} is no pickled tree of arrays ({error})") from error
    return flat(tree)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """A nested tree as one dictionary with `/` between the names."""
    found: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def our_name(flax: str) -> str:
    """Our key of a Flax path, such as `encoder/DownsamplingBlock_1/ResnetBlock_0/Conv_2/kernel`.

    Raises:
        ValueError: No module of this model.
    """
    if flax == "quantize/embeddings":
        return "codebook.weight"
    *modules, leaf = flax.split("/")
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(leaf)
    side, *inner = modules
    if kind is None or side not in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        raise ValueError(f"{flax} is not part of LWM's VQGAN")
    if not inner:
        return f"{side}.{kind}"
    if inner[0] in ENDS:
        return f"{side}.{ENDS[inner[0]]}.{kind}"
    found = re.fullmatch(r"(DownsamplingBlock|UpsamplingBlock|MidBlock)_(\d+)", inner[0])
    block = re.fullmatch(r"(ResnetBlock|Downsample|Upsample)_(\d+)", inner[1]) if len(inner) == 3 else None
    if found is None or block is None:
        raise ValueError(f"{flax} is not part of LWM's VQGAN")
    if block[1] != "ResnetBlock":
        return f"{side}.conv_blocks.{found[2]}.{block[1].lower()}.conv.{kind}"
    place = f"mid.{block[2]}" if found[1] == "MidBlock" else f"conv_blocks.{found[2]}.res.{block[2]}"
    part = INSIDE_BLOCK.get(inner[2]) or {"Conv_2": "nin_shortcut"}[inner[2]]
    return f"{side}.{place}.{part}.{kind}"


def to_torch(value: np.ndarray) -> Tensor:
    """A Flax array in torch's order: convolutions (h, w, in, out) become (out, in, h, w)."""
    tensor = torch.from_numpy(np.array(value, dtype=np.float32))
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


def from_flax(arrays: Mapping[str, np.ndarray], config: LwmVQGANConfig | None = None) -> LwmVQGAN:
    """A tokenizer with LWM's weights, in eval mode.

    Args:
        arrays: From `read_arrays`.
        config: Sizes; the published ones by default.

    Raises:
        ValueError: An array that is not part of the model, or arrays missing or of another shape; names them.
    """
    model = LwmVQGAN(config or LwmVQGANConfig())
    state = {our_name(name): to_torch(value) for name, value in arrays.items()}
    load_strictly(model, state, what="LWM's VQGAN")
    return model.eval()
