"""Which number format a network computes in, and whether a device multiplies bfloat16 natively."""

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Resolved = Literal["fp32", "bf16", "fp16"]


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 products are faster than float32 ones on this device.

    Processors without AVX512-BF16 or AMX only emulate them: on an AVX2 processor a bfloat16 product was measured at a
    fiftieth of the speed of a float32 one. Arm processors are taken at oneDNN's word.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(native or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def resolve_precision(precision: Precision, device: torch.device | str) -> Resolved:
    """What `auto` means on a device: `bf16` where it is native, else `fp32`; other values are checked and kept.

    Raises:
        ValueError: An unknown value, or `fp16` on a device other than a GPU.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision is auto, fp32, bf16 or fp16, got {precision!r}")
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if precision == "fp16" and torch.device(device).type != "cuda":
        raise ValueError("fp16 needs a GPU; use auto, bf16 or fp32 on the CPU")
    return precision


def mixed(device: torch.device | str, precision: Precision = "auto") -> torch.autocast:
    """Autocast to the resolved precision on a device; does nothing where that is float32."""
    device = torch.device(device)
    chosen = resolve_precision(precision, device)
    dtype = torch.float16 if chosen == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=chosen != "fp32")
