"""Samplers of training times in [0, 1], 0 noise and 1 data. Each returns a float32 tensor of shape (count,)."""

import torch
from torch import Tensor


def uniform_time(count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Times drawn evenly from [0, 1)."""
    return torch.rand(count, generator=generator, device=device)


def beta_time(
    count: int,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    scale: float = 0.999,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`t = scale * (1 - s)` with `s ~ Beta(alpha, beta)`: more mass near noise, never above `scale`.

    Mean 0.4 at the defaults. Source: ViPRA (sroutray/vipra, finetuning); openpi in the opposite time direction.
    Only `beta = 1` (or `alpha = 1`) has the closed inverse used here.

    Raises:
        ValueError: Neither `alpha` nor `beta` is 1.
    """
    u = torch.rand(count, generator=generator, device=device)
    if beta == 1.0:
        s = u ** (1.0 / alpha)
    elif alpha == 1.0:
        s = 1.0 - (1.0 - u) ** (1.0 / beta)
    else:
        raise ValueError(f"one of alpha and beta must be 1 for the closed inverse, got alpha={alpha}, beta={beta}")
    return scale * (1.0 - s)


def logit_normal_time(
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sigmoid of a normal draw: most mass in the middle. Source: Esser et al. 2024, arXiv 2403.03206, sec. 3.1."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))
