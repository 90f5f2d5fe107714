"""UniFlow's training loss, with what to log beside it. The authors released no training code.

Source: arXiv 2510.10575, method section (losses 1:1, beta 2); time per patch and detached weights after third-party
training code on the official class. Time convention of the released sampler: 0 noise, 1 pixels.
"""

# Shape letters in this file: B batch, N patches, P numbers in a patch, L layers.

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.time import fat_logit_normal_time, logit_normal_time, segment_time, uniform_time
from headrace.nn.distill import LayerwiseDistillation
from headrace.nn.patches import patchify
from headrace.nn.segmented_patch_flow import SegmentedPatchFlow
from headrace.tokenizers.uniflow import UniFlow

TIME_BINS = 4
TIME_LAWS: dict[str, Callable[..., Tensor]] = {
    "fat_lognormal": fat_logit_normal_time,
    "lognormal": logit_normal_time,
    "uniform": uniform_time,
}


def even_time(
    count: int, *, borders: Sequence[float], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """`segment_time` in random order, so that no image has all its patches in one segment, shape (count,)."""
    times = segment_time(count, borders, generator=generator, device=device).t
    return times[torch.randperm(count, generator=generator, device=device)]


class UniFlowTerms(NamedTuple):
    """One training step's losses.

    Attributes:
        total: What to minimise.
        flow: Flow-matching loss; at a zero-initialised head about Var(x) + mean(x)^2 + 1.
        distill: Weighted cosine distance to the teacher, 0 when no distillation is given.
        alpha: Cosine distance of each layer, (L,), no gradient.
        weight: Distillation weight of each layer, (L,).
        flow_by_time: Flow loss within each quarter of [0, 1], (4,); NaN where no time fell.
        latents: What the encoder gave, (B, N, Z), detached; for running statistics.
    """

    total: Tensor
    flow: Tensor
    distill: Tensor
    alpha: Tensor
    weight: Tensor
    flow_by_time: Tensor
    latents: Tensor

    def log(self) -> dict[str, float]:
        """Scalars by name: the losses, `alpha/l` and `weight/l` for each layer, `flow/t0` to `flow/t3`."""
        values = {"total": self.total, "flow": self.flow, "distill": self.distill}
        values |= {f"alpha/{i}": a for i, a in enumerate(self.alpha, start=1)}
        values |= {f"weight/{i}": w for i, w in enumerate(self.weight, start=1)}
        values |= {f"flow/t{i}": f for i, f in enumerate(self.flow_by_time)}
        values |= {"latent/mean": self.latents.float().mean(), "latent/std": self.latents.float().std()}
        return {name: float(value.detach()) for name, value in values.items()}


def draw_times(model: UniFlow, batch: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Training times of all patches, (B * N,), by the law and the grouping of the model's config.

    Raises:
        ValueError: Fewer draws than the flow head has segments.
    """
    law = TIME_LAWS[model.config.time_sampling]
    if isinstance(model.flow_head, SegmentedPatchFlow):
        law = partial(even_time, borders=model.flow_head.borders)
    if model.config.time_per == "patch":
        return law(batch * count, generator=generator, device=model.device)
    return law(batch, generator=generator, device=model.device).repeat_interleave(count)


def uniflow_loss(
    model: UniFlow,
    images: Tensor,
    *,
    distillation: LayerwiseDistillation | None = None,
    generator: torch.Generator | None = None,
) -> UniFlowTerms:
    """Losses of one batch; gradients reach decoder, bottleneck and encoder.

    Args:
        model: In training mode.
        images: Normalised images, (B, 3, H, W); both the encoder's input and the flow's target.
        distillation: Holds the frozen teacher; None trains on pixels alone.
        generator: Of times and noise, on the model's device.

    Raises:
        ValueError: As `UniFlow.grid_of`, or a distillation weight above 0 without a distillation.
    """
    config = model.config
    if distillation is None and config.distill_weight > 0:
        raise ValueError(
            "distill_weight is above 0 but no distillation was given; pass LayerwiseDistillation(teacher, "
            "model.encoder) or set distill_weight=0"
        )
    grid = model.grid_of(images)
    layers, last = model.hidden(images)
    latents = model.latent(last)
    condition = model.condition(latents, grid).flatten(0, 1)
    target = patchify(images.float() * config.target_scale, config.encoder.patch)
    batch, count, length = target.shape
    t = draw_times(model, batch, count, generator)
    noise = torch.randn(batch * count, length, generator=generator, device=target.device)
    sample = straight_path(noise, target.flatten(0, 1), t)
    velocity = model.flow_head(sample.x_t.to(condition.dtype), t, condition)
    flow = flow_matching_loss(velocity, sample.target)
    if distillation is None:
        alpha = weight = torch.zeros(len(layers), device=flow.device)
        distill = flow.new_zeros(())
    else:
        distill, alpha, weight = distillation(images, layers)
    return UniFlowTerms(
        total=config.flow_weight * flow + config.distill_weight * distill,
        flow=flow,
        distill=distill,
        alpha=alpha,
        weight=weight,
        flow_by_time=loss_by_time(velocity.detach(), sample.target, t),
        latents=latents.detach(),
    )


def loss_by_time(velocity: Tensor, target: Tensor, t: Tensor, *, bins: int = TIME_BINS) -> Tensor:
    """Mean squared error within equal bins of the time, (bins,); NaN in an empty bin."""
    error = (velocity.float() - target).square().mean(-1)
    which = (t * bins).long().clamp(0, bins - 1)
    total = torch.zeros(bins, device=t.device).index_add(0, which, error)
    return total / torch.bincount(which, minlength=bins)


def parameter_groups(model: UniFlow, *, lr: float, encoder_factor: float = 0.25) -> list[dict[str, object]]:
    """Optimizer groups: new modules at `lr`, the pretrained encoder slower (the paper does not say; our default)."""
    encoder = {id(p) for p in model.encoder.parameters()}
    new = [p for p in model.parameters() if id(p) not in encoder]
    return [{"params": new, "lr": lr}, {"params": list(model.encoder.parameters()), "lr": lr * encoder_factor}]
