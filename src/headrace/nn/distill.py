"""Layer-wise adaptive self-distillation between two vision transformers.

Source: UniFlow (arXiv 2510.10575), equations of the distillation section; no training code was released.
"""

# Shape letters in this file: B batch, N patches, D width, L layers.

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.vit_features import block_outputs, expect_vit, patch_tokens

Weighting = Literal["adaptive", "prior", "uniform", "last"]
WEIGHTINGS: tuple[Weighting, ...] = ("adaptive", "prior", "uniform", "last")


class DistillTerms(NamedTuple):
    """The distillation loss and what it is made of.

    Attributes:
        loss: Scalar, sum of weight times alpha.
        alpha: Mean cosine distance of each layer, (L,), 0 equal to 2 opposite.
        weight: Weight of each layer, (L,), sums to 1, no gradient.
    """

    loss: Tensor
    alpha: Tensor
    weight: Tensor


def layer_weights(alpha: Tensor, *, beta: float = 2.0, weighting: Weighting = "adaptive") -> Tensor:
    r"""Weights of the layers, summing to 1 and carrying no gradient.

    `adaptive`: :math:`w_l \propto (l/L)\,e^{\beta\alpha_l}`; `prior`: the same with beta 0; `uniform`: all equal;
    `last`: only the last layer (plain feature distillation).

    Args:
        alpha: Cosine distance of each layer, (L,).
        beta: How strongly weight follows distance; 2 is the paper's best.
        weighting: One of the names above.
    """
    alpha = alpha.detach().float()
    depth = alpha.numel()
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r} (known: {', '.join(WEIGHTINGS)})")
    if weighting == "last":
        return F.one_hot(torch.tensor(depth - 1, device=alpha.device), depth).float()
    if weighting == "uniform":
        return torch.full_like(alpha, 1 / depth)
    base = torch.arange(1, depth + 1, device=alpha.device, dtype=alpha.dtype) / depth
    raw = base * torch.exp(beta * alpha) if weighting == "adaptive" else base
    return raw / raw.sum()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the mean cosine between matching tokens, in float32. Shapes (B, N, D), result a scalar."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


class LayerwiseDistillation(nn.Module):
    """Keeps a student close to a frozen teacher at every layer, harder where it strays and in deep layers.

    The student is not stored here, so a student's checkpoint never contains its teacher.

    Args:
        teacher: A timm ViT; deep-copied, frozen, in eval mode. Give the student itself, after its weights and its
            position table are final, for self-distillation.
        student: Only looked at, for its depth and width. Another depth maps layers proportionally; another width
            adds one trainable linear map per layer (the paper has neither: both towers are one architecture).
        beta: See `layer_weights`.
        weighting: See `layer_weights`.

    Raises:
        TypeError: One of the two is no timm VisionTransformer.
        ValueError: The patch sizes differ, so tokens do not match.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, *, beta: float = 2.0, weighting: Weighting = "adaptive"
    ) -> None:
        super().__init__()
        vit, pupil = expect_vit(teacher, "teacher"), expect_vit(student, "student")
        if vit.patch_embed.patch_size != pupil.patch_embed.patch_size:
            raise ValueError(
                f"student patches are {pupil.patch_embed.patch_size}, teacher patches {vit.patch_embed.patch_size}; "
                "tokens of one picture must match one to one"
            )
        self.beta, self.weighting = beta, weighting
        layer_weights(torch.zeros(1), weighting=weighting)
        self.teacher = copy.deepcopy(vit).eval().requires_grad_(False)
        deep, shallow = len(vit.blocks), len(pupil.blocks)
        self.partner = [max(1, round(layer * deep / shallow)) - 1 for layer in range(1, shallow + 1)]
        same = vit.embed_dim == pupil.embed_dim
        self.projections = nn.ModuleList(
            nn.Identity() if same else nn.Linear(pupil.embed_dim, vit.embed_dim) for _ in range(shallow)
        )

    def train(self, mode: bool = True) -> "LayerwiseDistillation":
        """The teacher stays in eval mode whatever is asked."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixels: Tensor, hidden: Sequence[Tensor]) -> DistillTerms:
        """Compare a student's block outputs with the teacher's on the same pixels.

        Args:
            pixels: Normalised images as both towers take them, (B, 3, H, W).
            hidden: The student's patch tokens after each block, L tensors (B, N, D), with gradient.

        Raises:
            ValueError: Another number of layers than the student has.
        """
        if len(hidden) != len(self.partner):
            raise ValueError(f"hidden must hold {len(self.partner)} layers, got {len(hidden)}")
        distance: dict[int, Tensor] = {}
        with torch.no_grad():
            for layer, tokens in enumerate(block_outputs(self.teacher, pixels)):
                goal = patch_tokens(self.teacher, tokens)
                for index, partner in enumerate(self.partner):
                    if partner == layer:
                        with torch.enable_grad():
                            distance[index] = cosine_distance(self.projections[index](hidden[index]), goal)
        alpha = torch.stack([distance[index] for index in range(len(hidden))])
        weight = layer_weights(alpha, beta=self.beta, weighting=self.weighting)
        return DistillTerms((weight * alpha).sum(), alpha.detach(), weight)
