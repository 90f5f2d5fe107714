"""How well a tokenizer gives pictures back: PSNR, SSIM, perceptual distances, Fréchet distances, use of the codes."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.nn.perceptual import EfficientNetLite0
from headrace.nn.quantizers.code_usage import UsageCounter
from headrace.tokenizers.base import Tokenizer
from headrace.tokenizers.compared_at import ComparedAt
from headrace.tokenizers.tokenflow import TokenFlow
from headrace.tokenizers.uniflow_protocol import psnr, seam_ratio

SSIM_WINDOW = 7
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """Means over pictures; `interval` holds the half width of the 95 % interval of the same name, over pictures.

    Attributes:
        pictures: Number of pictures.
        psnr: On 8-bit pictures [dB].
        ssim_range_1: Structural similarity with data range 1, the correct one for pictures in [0, 1].
        ssim_range_2: The same with data range 2, as in the scripts of LlamaGen and TokenFlow; higher. Compare their
            tables with this one only.
        efficientnet: Distance in ImageNet features of EfficientNet-Lite0; no LPIPS.
        lpips: LPIPS on VGG-16, None without its weights.
        fd_efficientnet: Fréchet distance of pooled EfficientNet-Lite0 features; no FID.
        rfid: Fréchet distance of Inception features (torch-fidelity), None without its weights.
        seam_given, seam_made: Seam ratio of the pictures and of what came back, None without a patch side.
        notes: What could not be computed, and why.
        usage: Share of codes used, perplexity and count per scale ("all" over all); empty for continuous tokenizers.
        pictures_per_second: Encode and decode together.
    """

    pictures: int
    psnr: float
    ssim_range_1: float
    ssim_range_2: float
    efficientnet: float | None
    lpips: float | None
    fd_efficientnet: float | None
    rfid: float | None
    seam_given: float | None = None
    seam_made: float | None = None
    interval: dict[str, float]
    notes: tuple[str, ...]
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures_per_second: float


def ssim(a: Tensor, b: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity with a uniform window of 7, mean over places and channels: (B, C, H, W) to (B,).

    The same numbers as scikit-image's `structural_similarity` with its defaults (sample covariance, borders cut).

    Source: Wang et al. 2004.
    """
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures must be at least {SSIM_WINDOW} px on each side, got {tuple(a.shape[-2:])}")
    a, b = a.double(), b.double()
    area = SSIM_WINDOW**2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, SSIM_WINDOW, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    sample = area / (area - 1)
    var_a = sample * (mean(a * a) - mean_a**2)
    var_b = sample * (mean(b * b) - mean_b**2)
    shared = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3)).float()


def _triangular_factor(rows: np.ndarray) -> np.ndarray:
    factor: Any = np.linalg.qr((rows - rows.mean(0)) / np.sqrt(len(rows) - 1), mode="r")
    return np.asarray(factor)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians fitted to feature rows (N, F); biased upwards for few rows.

    Source: Heusel et al. 2017 (arXiv 1706.08500).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets of at least 2 rows of equal width are needed, got {a.shape} and {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    # With scaled centred rows A and B, tr sqrt(cov_a cov_b) is the sum of the singular values of A B^T. Triangular
    # factors have the same ones, and are no larger than the number of features or of rows.
    rows_a, rows_b = _triangular_factor(a), _triangular_factor(b)
    root = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(gap + np.square(rows_a).sum() + np.square(rows_b).sum() - 2 * root, 0.0))


def inception_features(weights: Path | None = None) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """The Inception of FID, from a file on this machine; nothing is downloaded.

    Args:
        weights: torch-fidelity's file; None looks where torch keeps downloaded ones.

    Returns:
        A function from pictures (B, 3, H, W) in [0, 1] to (B, 2048) and an empty note, or None and why not.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        return None, f"rFID was left out: no Inception weights at {path}; put torch-fidelity's {INCEPTION_FILE} there"
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        return None, "rFID was left out: torch-fidelity is not installed; install headrace[metrics]"
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).eval()
    return lambda pictures: net((pictures * 255).round().to(torch.uint8))[0], ""


@torch.no_grad()
def evaluate(
    model: Tokenizer | ComparedAt,
    batches: Iterable[Tensor],
    *,
    efficientnet: EfficientNetLite0 | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    inception: Path | None = None,
    decoding: Mapping[str, Any] | None = None,
    patch: int | None = None,
) -> ReconstructionReport:
    """Reconstruct pictures and measure.

    Args:
        model: Any tokenizer, in eval mode, or one compared at another size.
        batches: Inputs as `model.preprocessing` makes them, shape (B, 3, size, size).
        efficientnet: Feature network for the offline distances; None leaves them out.
        lpips: Distance of two batches in [-1, 1]; None leaves it out.
        inception: File of torch-fidelity's weights, see `inception_features`.
        decoding: Keyword arguments of the tokenizer's `decode`, such as steps and seed of UniFlow's.
        patch: Patch side [px] for the seam ratio; None leaves it out.

    Raises:
        ValueError: Fewer than two pictures.
    """
    extract, note = inception_features(inception)
    notes = [note] if note else []
    if lpips is None:
        notes.append("LPIPS was left out: no VGG-16 weights were given")
    if efficientnet is None:
        notes.append("EfficientNet distances were left out: headrace[offline] is not installed")
    counter = None
    inner = model.model if isinstance(model, ComparedAt) else model
    if isinstance(inner, TokenFlow):
        counter = UsageCounter(scales=inner.config.quantizer.scales, codes=inner.config.quantizer.codes)
    rows: dict[str, list[Tensor]] = {}
    seconds = 0.0
    for inputs in batches:
        start = time.perf_counter()
        tokens = model.encode(inputs.to(model.device))
        decoded = model.decode(tokens, **(decoding or {}))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # until then the work is only queued
        seconds += time.perf_counter() - start
        if counter is not None:
            counter.add(tokens)
        given, made = model.preprocessing.to_unit(inputs).cpu(), model.preprocessing.to_unit(decoded).cpu()
        measured = _measure(given, made, efficientnet, lpips, extract)
        if patch is not None:
            measured |= {"seam_given": seam_ratio(given, patch), "seam_made": seam_ratio(made, patch)}
        for name, value in measured.items():
            rows.setdefault(name, []).append(value)
    tables = {name: torch.cat(values).numpy() for name, values in rows.items()}
    count = len(tables.get("psnr", ()))
    if count < 2:
        raise ValueError(f"at least two pictures are needed, got {count}")
    scores = {name: table for name, table in tables.items() if table.ndim == 1}
    usage = {} if counter is None else {str(side): u._asdict() for side, u in counter.per_scale().items()}
    return ReconstructionReport(
        pictures=count,
        psnr=float(scores["psnr"].mean()),
        ssim_range_1=float(scores["ssim_range_1"].mean()),
        ssim_range_2=float(scores["ssim_range_2"].mean()),
        efficientnet=float(scores["efficientnet"].mean()) if "efficientnet" in scores else None,
        lpips=float(scores["lpips"].mean()) if "lpips" in scores else None,
        fd_efficientnet=_frechet(tables, "pooled"),
        rfid=_frechet(tables, "inception"),
        seam_given=float(scores["seam_given"].mean()) if patch is not None else None,
        seam_made=float(scores["seam_made"].mean()) if patch is not None else None,
        interval={name: float(1.96 * table.std(ddof=1) / count**0.5) for name, table in scores.items()},
        notes=tuple(notes),
        usage=usage if counter is None else {**usage, "all": counter.overall()._asdict()},
        pictures_per_second=count / seconds,
    )


def _measure(
    given: Tensor,
    made: Tensor,
    efficientnet: EfficientNetLite0 | None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    inception: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    out = {
        "psnr": psnr(given, made),
        "ssim_range_1": ssim(given, made, data_range=1.0),
        "ssim_range_2": ssim(given, made, data_range=2.0),
    }
    if efficientnet is not None:
        out["efficientnet"] = efficientnet(given * 2 - 1, made * 2 - 1)
        out["pooled_given"], out["pooled_made"] = efficientnet.pooled(given * 2 - 1), efficientnet.pooled(made * 2 - 1)
    if lpips is not None:
        out["lpips"] = lpips(given * 2 - 1, made * 2 - 1)
    if inception is not None:
        out["inception_given"], out["inception_made"] = inception(given), inception(made)
    return out


def _frechet(tables: dict[str, np.ndarray], name: str) -> float | None:
    if f"{name}_given" not in tables:
        return None
    return frechet_distance(tables[f"{name}_given"], tables[f"{name}_made"])
