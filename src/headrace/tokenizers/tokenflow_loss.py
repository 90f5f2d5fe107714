"""TokenFlow's training objective: pixels, perception, critic, teacher and codebooks in one forward pass.

The critic's own loss is part of the sum: it sees detached reconstructions, and the tokenizer's adversarial term sees
detached critic parameters, so one backward pass gives both networks the gradients that two passes would.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.nn.quantizers.code_restart import CodeRestart
from headrace.tokenizers.tokenflow import TokenFlow
from headrace.tokenizers.tokenflow_critic import PatchCritic, hinge_loss, without_gradient_to
from headrace.tokenizers.vqgan import VQGANConfig

USAGE_WINDOW = 100  # updates; a single batch has too few places on the small scales to tell


@dataclass(frozen=True, kw_only=True)
class TokenFlowLossConfig:
    """Weights of the objective; the defaults are the release's.

    Attributes:
        pixel, perceptual, adversarial, semantic, vector: Weights of the terms; `vector` of both codebook terms.
        adversarial_start: Update from which the adversarial term and the critic's loss count; before, both are off.
        critic: Weight of the critic's hinge loss.
        semantic_form: `cosine` is 1 - cos (code); `l2` the squared distance of unit vectors (paper), which is twice it.
        scale_drop: Probability that one scale other than the first is left out of a step.
        drop_last: Whether the last scale may be left out, as in the release.
        tower_is_teacher: The tower is the teacher and frozen, so one pass serves both. Not the published training.
        stage: `all` trains the tokenizer; `decoder` only the pixel decoder, on fixed codes (the enhanced decoder).
    """

    pixel: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    adversarial_start: int = 20_000
    critic: float = 0.5
    semantic: float = 1.0
    semantic_form: Literal["cosine", "l2"] = "cosine"
    vector: float = 1.0
    scale_drop: float = 0.1
    drop_last: bool = True
    tower_is_teacher: bool = False
    stage: Literal["all", "decoder"] = "all"

    def __post_init__(self) -> None:
        weights = (self.pixel, self.perceptual, self.adversarial, self.critic, self.semantic, self.vector)
        if min(weights) < 0:
            raise ValueError(f"weights must be at least 0, got {weights}")
        if not 0 <= self.scale_drop <= 1 or self.adversarial_start < 0:
            raise ValueError("scale_drop must be in 0..1 and adversarial_start at least 0")
        if self.semantic_form not in ("cosine", "l2") or self.stage not in ("all", "decoder"):
            raise ValueError(f"unknown semantic_form {self.semantic_form!r} or stage {self.stage!r}")


class TokenFlowTraining(nn.Module):
    """A tokenizer with everything that trains it; only the tokenizer is kept afterwards.

    Args:
        model: The tokenizer, trained in place.
        teacher: Pictures to features (B, g * g, T), frozen; not needed in stage `decoder`.
        perceptual: Two batches of pictures to distances (B,), frozen.
        critic: The discriminator.
        config: Weights of the terms.
        restart: Restart of unused codes; off in the release, refused in stage `decoder`.
    """

    steps: Tensor
    last_used: Tensor

    def __init__(
        self,
        model: TokenFlow,
        *,
        teacher: nn.Module | None,
        perceptual: nn.Module,
        critic: PatchCritic,
        config: TokenFlowLossConfig = TokenFlowLossConfig(),
        restart: CodeRestart | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and config.stage == "all":
            raise ValueError("stage 'all' needs a teacher")
        if restart is not None and config.stage == "decoder":
            raise ValueError("stage 'decoder' trains on fixed codes, and a restart would move codes: leave it out")
        self.model, self.teacher, self.perceptual, self.critic, self.config = model, teacher, perceptual, critic, config
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        quantizer = model.config.quantizer
        # Update in which each scale last used each code, shape (S, K).
        self.register_buffer("last_used", torch.full((len(quantizer.scales), quantizer.codes), -USAGE_WINDOW))
        self.restart = restart
        self.latest: tuple[Tensor, Tensor] | None = None
        if config.tower_is_teacher:
            model.tower.requires_grad_(False)
        if config.stage == "decoder":
            model.requires_grad_(False)
            model.pixel_decoder.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Frozen networks stay in eval mode."""
        super().train(mode)
        for part in (self.teacher, self.perceptual):
            if part is not None:
                part.eval()
        return self

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None, *, taught: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of one step by name, unweighted, and `total`, their weighted sum with the critic's loss.

        Beside them `batch_usage`, the share of codes that this batch uses, and `usage_1`, ..., `usage_g`, the share
        that each scale has used within the last 100 updates, of several processes as the first one saw them.

        Args:
            images: Shape (B, 3, size, size) in [-1, 1].
            generator: Source of the scale drop, on the pictures' device.
            taught: The teacher's features of these pictures, (B, g * g, T), where they are known already.
        """
        if self.training:
            self.steps += 1
        config, model = self.config, self.model
        drop = None
        terms: dict[str, Tensor] = {}
        if config.stage == "decoder":
            with torch.no_grad():
                quantized = model.quantize(images)
        else:
            assert self.teacher is not None
            wanted = self.teacher(images).float() if taught is None else taught.float()
            drop = self._drop(images.device, generator)
            quantized = model.quantize(images, drop=drop, seen=wanted if config.tower_is_teacher else None)
            terms["vector"], terms["commitment"] = quantized.vector_loss, quantized.commitment_loss
            terms["semantic"] = self._semantic(quantized.features, wanted)
        made = model.decode_pixels(quantized.features).float()
        terms["pixel"] = F.mse_loss(made, images)
        terms["perceptual"] = self.perceptual(made, images).mean()
        # Terms are there, as zeros, before the critic starts: a log keeps the same columns.
        terms["adversarial"] = terms["critic"] = made.new_zeros(())
        if self.steps >= config.adversarial_start:
            terms["adversarial"] = -without_gradient_to(self.critic, made).mean()
            terms["critic"] = hinge_loss(self.critic(images), self.critic(made.detach()))
        self.latest = (quantized.codes.detach(), quantized.queries)
        total = sum(self._weight(name) * value for name, value in terms.items())
        assert isinstance(total, Tensor)
        used = quantized.codes.unique().numel() / model.config.quantizer.codes
        return {"total": total, **terms, "batch_usage": total.new_tensor(used), **self._usage(quantized.codes, drop)}

    def _usage(self, codes: Tensor, drop: int | None) -> dict[str, Tensor]:
        quantizer = self.model.config.quantizer
        if self.training:
            kept = [place for place in range(len(quantizer.scales)) if place != drop]
            parts = codes.split([quantizer.counts[place] for place in kept], dim=1)
            for place, part in zip(kept, parts, strict=True):
                self.last_used[place, part.flatten()] = self.steps
        shares = (self.last_used > self.steps - USAGE_WINDOW).float().mean(1)
        return {f"usage_{side}": share for side, share in zip(quantizer.scales, shares, strict=True)}

    def _weight(self, name: str) -> float:
        return self.config.vector if name == "commitment" else getattr(self.config, name)

    def _drop(self, device: torch.device, generator: torch.Generator | None) -> int | None:
        scales = len(self.model.config.quantizer.scales)
        choices = scales - 1 if self.config.drop_last else scales - 2
        if not self.training or choices < 1:
            return None
        number, place = torch.rand(2, generator=generator, device=device).tolist()
        return 1 + int(place * choices) if number < self.config.scale_drop else None

    def _semantic(self, features: Tensor, wanted: Tensor) -> Tensor:
        predicted = self.model.decode_semantics(features).float()
        if predicted.shape != wanted.shape:
            raise ValueError(f"the teacher gives {tuple(wanted.shape)}, the decoder predicts {tuple(predicted.shape)}")
        distance = 1 - F.cosine_similarity(predicted, wanted, dim=-1).mean()
        return distance if self.config.semantic_form == "cosine" else 2 * distance


def build_optimizer(
    training: TokenFlowTraining,
    *,
    lr: float = 1e-4,
    clip: float = 1.0,
    tower_factor: float = 1.0,
    book_factor: float = 1.0,
) -> torch.optim.Adam:
    """Adam (0.9, 0.95) over tokenizer and critic, each with its own gradient clipping, as the release trains them.

    The clipping and the restart of dead codes are hooks of the optimizer, so call no other clipping: `fit(clip=None)`.

    Args:
        training: The tokenizer and its critic.
        lr: Learning rate; constant in the release.
        clip: Largest gradient norm of each of the two networks.
        tower_factor: Factor on the learning rate of the pretrained tower; the release uses 1.
        book_factor: Factor on that of the codebooks; the release uses 1.
    """
    tower = [p for p in training.model.tower.parameters() if p.requires_grad]
    books = [p for p in training.model.quantizer.parameters() if p.requires_grad] if book_factor != 1 else []
    ours = {id(p) for p in tower + books}
    rest = [p for p in training.model.parameters() if p.requires_grad and id(p) not in ours]
    critic = list(training.critic.parameters())
    groups = [{"params": rest, "lr": lr}, {"params": critic, "lr": lr}]
    if tower:
        groups.append({"params": tower, "lr": lr * tower_factor})
    if books:
        groups.append({"params": books, "lr": lr * book_factor})
    optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.95))

    def clip_each(*_: object) -> None:
        nn.utils.clip_grad_norm_(rest + tower + books, clip)
        nn.utils.clip_grad_norm_(critic, clip)

    optimizer.register_step_pre_hook(clip_each)

    def revive(*_: object) -> None:
        if training.restart is not None and training.latest is not None:
            training.restart.after_step(training.model.quantizer, *training.latest, optimizer)

    optimizer.register_step_post_hook(revive)
    return optimizer


def with_new_decoder(model: TokenFlow, decoder: VQGANConfig) -> TokenFlow:
    """The same tokenizer with an untrained pixel decoder of another size: the start of the enhanced decoder's stage."""
    other = TokenFlow(replace(model.config, pixel_decoder=decoder))
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("pixel_decoder.")}
    other.load_state_dict(other.state_dict() | kept)
    return other
