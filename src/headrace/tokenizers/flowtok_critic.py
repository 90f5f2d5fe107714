"""FlowTok's image tokenizer trained against a critic: TA-TiTok's single-stage objective in one backward pass.

Source: bytedance/1d-tokenizer, TA-TiTok configurations: squared error, perceptual 1.1, KL 1e-6, hinge critic 0.1 from
step 200,000, LeCam 0.001 with a decay of 0.999. Their perceptual distance mixes LPIPS with ConvNeXt logits; here it is
one network of your choice.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_loss import image_tokenizer_loss
from headrace.tokenizers.tokenflow_critic import PatchCritic, hinge_loss, without_gradient_to


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Weights of the objective; defaults as published.

    Attributes:
        perceptual: Weight of the perceptual distance.
        kl: Weight of the divergence, summed over tokens and channels.
        adversarial: Weight of the tokenizer's adversarial term.
        start: Update from which critic and adversarial term count.
        lecam: Weight of the critic's LeCam term.
        lecam_decay: Decay of the averages it compares with.
    """

    perceptual: float = 1.1
    kl: float = 1e-6
    adversarial: float = 0.1
    start: int = 200_000
    lecam: float = 0.001
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        if min(self.perceptual, self.kl, self.adversarial, self.lecam, self.start) < 0:
            raise ValueError(f"weights and start must not be negative, got {self}")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"lecam_decay must lie in [0, 1), got {self.lecam_decay}")


class ImageTokenizerTraining(nn.Module):
    """An image tokenizer with its perceptual distance and its critic; only the tokenizer is kept afterwards.

    Args:
        model: Its `image` part is trained.
        perceptual: Distances (B,) of two batches in [-1, 1], frozen.
        critic: Judges pictures in [-1, 1].
        config: Weights.
    """

    updates: Tensor
    real_mean: Tensor
    made_mean: Tensor

    def __init__(
        self,
        model: FlowTok,
        *,
        perceptual: nn.Module,
        critic: PatchCritic,
        config: CriticConfig = CriticConfig(),
    ) -> None:
        super().__init__()
        self.model, self.perceptual, self.critic, self.config = model, perceptual, critic, config
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("made_mean", torch.zeros(()))

    def train(self, mode: bool = True) -> Self:
        """The perceptual network stays in eval mode."""
        super().train(mode)
        self.perceptual.eval()
        return self

    def forward(self, images: Tensor, text: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Terms of one step by name, and `total`: the tokenizer's loss plus, once started, the critic's own.

        The names are the same at every step; `adversarial`, `critic` and `lecam` are 0 before the critic starts, and
        its weights get no gradient there, so several processes need `find_unused`.

        Args:
            images: (B, 3, S, S) in [0, 1].
            text: Text tower tokens of their captions, (B, K, C).
            generator: Of the sampling noise, on the model's device.
        """
        if self.training:
            self.updates += 1
        config = self.config
        base = image_tokenizer_loss(
            self.model,
            images,
            text,
            perceptual=lambda made, real: self.perceptual(2 * made - 1, 2 * real - 1).mean(),
            perceptual_weight=config.perceptual,
            kl_weight=config.kl,
            generator=generator,
        )
        terms = {"squared": base.squared, "perceptual": base.perceptual, "kl": base.kl}
        total = base.total
        terms |= dict.fromkeys(("adversarial", "critic", "lecam"), total.new_zeros(()))
        if self.updates >= config.start:
            made, real = 2 * base.decoded - 1, 2 * images - 1
            terms["adversarial"] = -without_gradient_to(self.critic, made).mean()
            on_real, on_made = self.critic(real), self.critic(made.detach())
            terms["critic"] = hinge_loss(on_real, on_made)
            terms["lecam"] = self._lecam(on_real, on_made)
            total = total + config.adversarial * terms["adversarial"] + terms["critic"] + config.lecam * terms["lecam"]
        return {"total": total, **terms}

    def _lecam(self, real: Tensor, made: Tensor) -> Tensor:
        """Keeps both verdicts from running away from the other side's average (Tseng et al. 2021)."""
        if self.training:
            for average, verdict in ((self.real_mean, real), (self.made_mean, made)):
                average.lerp_(verdict.detach().mean().float(), 1 - self.config.lecam_decay)
        return F.relu(real - self.made_mean).square().mean() + F.relu(self.real_mean - made).square().mean()
