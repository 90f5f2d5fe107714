"""How fast does a flow head learn, by the way its weights start and its learning rate? The head alone, on 8 px patches.

The condition is the patch itself through a fixed random map to 64 numbers and a trained linear layer, so no encoder is
involved. Held-out patches (half rendered shapes, half photographs) are decoded in one step; what two noise seeds make
different is noise that the head let through. A quarter of a minute of one core per variant.

    python benchmarks/uniflow_head_start.py
"""

import json
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from headrace.datasets.captioned_shapes import CaptionedShapes
from headrace.datasets.picture_crops import PictureCrops
from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.time import fat_logit_normal_time
from headrace.nn.patch_flow import PatchFlow, PatchFlowConfig
from headrace.nn.patches import patchify
from headrace.nn.precision import mixed

PATCH, LENGTH, LATENT, WIDTH = 8, 192, 64, 256
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PIXEL = 0.225  # deviation that normalised pixels are divided by, about


# Gain of the condition's layers (0: 0.02 everywhere), deviation of the condition, learning rate.
VARIANTS = (
    {"gain": 0.0, "condition": 0.31, "lr": 1e-3},
    {"gain": 0.64, "condition": 0.31, "lr": 1e-3},
    {"gain": 0.0, "condition": 0.31, "lr": 3e-3},
    {"gain": 0.0, "condition": 1.0, "lr": 1e-3},
    {"gain": 0.64, "condition": 1.0, "lr": 3e-3},
    {"gain": 1.0, "condition": 1.0, "lr": 3e-3},
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The budget of each variant."""

    steps: int = 200
    patches: int = 512
    seed: int = 0


def patches(count: int, part: str, seed: int) -> Tensor:
    """Normalised patches of `count` shapes and as many crops of photographs."""
    shapes = CaptionedShapes(size=64, count=count, seed=seed).batch(np.arange(count)).images
    photos = PictureCrops(size=64, count=count, part="held_out" if part == "held_out" else "training", seed=seed)
    pictures = torch.cat([shapes, photos.batch(np.arange(count))])
    return patchify((pictures - MEAN) / STD, PATCH).flatten(0, 1)


class Conditioned(nn.Module):
    """A head with its condition from the target patch."""

    def __init__(self, gain: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("squeeze", torch.randn(LENGTH, LATENT) * LENGTH**-0.5)
        self.widen = nn.Linear(LATENT, WIDTH)
        nn.init.normal_(self.widen.weight, std=deviation * LATENT**-0.5)
        self.head = PatchFlow(
            PatchFlowConfig(patch_dim=LENGTH, condition_dim=WIDTH, width=WIDTH, depth=3, init_gain=gain)
        )

    def forward(self, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        return self.head(x, t, self.widen(target @ self.squeeze))


@torch.no_grad()
def one_step(model: Conditioned, target: Tensor, seed: int) -> Tensor:
    """Target patches decoded in one step from the noise of a seed."""
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))
    return noise + model(noise, torch.zeros(len(target)), target)


def train(options: Options, variant: dict[str, float], training: Tensor, held_out: Tensor) -> dict[str, float]:
    """One variant's figures."""
    torch.manual_seed(options.seed)
    model = Conditioned(variant["gain"], variant["condition"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=variant["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.process_time()
    for step in range(options.steps):
        ramp = min(1.0, (step + 1) / 30, (options.steps - step) / (0.3 * options.steps) + 0.05)
        optimizer.param_groups[0]["lr"] = variant["lr"] * ramp
        x = training[torch.randint(len(training), (options.patches,), generator=generator)]
        noise = torch.randn(x.shape, generator=generator)
        t = fat_logit_normal_time(len(x), generator=generator)
        path = straight_path(noise, x, t)
        optimizer.zero_grad()
        with mixed("cpu"):
            velocity = model(path.x_t, t, x)
        flow_matching_loss(velocity.float(), path.target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    one, two = (one_step(model, held_out, seed) for seed in (1, 2))
    error = (one - held_out).square().mean() * PIXEL**2
    return {
        **variant,
        "psnr_1step": round(-10 * torch.log10(error).item(), 2),
        "noise_let_through": round((one - two).square().mean().item() / 2, 4),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def main(options: Options) -> None:
    """Print one JSON line per variant."""
    training, held_out = patches(150, "training", 0), patches(16, "held_out", 779)
    for variant in VARIANTS:
        print(json.dumps(train(options, variant, training, held_out)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
