"""FlowTok's training losses, one per stage: image tokenizer, text-to-image flow, text tokenizer, image-to-text flow.

Source: arXiv 2503.10772 and TACJu/FlowTok (flow), bytedance/1d-tokenizer (image tokenizer, single stage).
Where paper and code differ, `FlowTokConfig` says which is the default.
"""

# Shape letters in this file: B batch, K tokens, D channels, C text width.

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.flow.path import straight_path
from headrace.flow.time import beta_time, logit_normal_time
from headrace.nn.dit import SequenceDiT
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_bridge import ImageToText, TextToImage, draw_flags, swap_flagged
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_image import Posterior
from headrace.tokenizers.flowtok_text import contrastive_loss, gaussian_divergence, wall_divergence

Perceptual = Callable[[Tensor, Tensor], Tensor]


class ImageTokenizerTerms(NamedTuple):
    """Image tokenizer losses, without the adversarial part, and the decoded images (B, 3, S, S)."""

    total: Tensor
    squared: Tensor
    perceptual: Tensor
    kl: Tensor
    decoded: Tensor


def image_tokenizer_loss(
    model: FlowTok,
    images: Tensor,
    text: Tensor,
    *,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.1,
    kl_weight: float = 1e-6,
    generator: torch.Generator | None = None,
) -> ImageTokenizerTerms:
    """Squared error, perceptual distance and KL of the sampled tokens' reconstruction.

    Args:
        model: Its `image` part is trained.
        images: (B, 3, S, S) in [0, 1].
        text: Text tower tokens of their captions, (B, K, C).
        perceptual: Distance of two image batches, a scalar; None leaves it out.
        perceptual_weight: 1.1 in TA-TiTok.
        kl_weight: On the sum over tokens and channels; tiny, so that tokens are nearly deterministic.
        generator: Of the sampling noise, on the model's device.
    """
    posterior = model.posterior(images)
    decoded = model.image.decode(posterior.sample(_noise_like(posterior.mean, generator)), text)
    squared = F.mse_loss(decoded.float(), images.float())
    distance = perceptual(decoded, images) if perceptual is not None else squared.new_zeros(())
    kl = posterior.kl().mean()
    return ImageTokenizerTerms(squared + perceptual_weight * distance + kl_weight * kl, squared, distance, kl, decoded)


class FlowTerms(NamedTuple):
    """Text-to-image losses.

    Attributes:
        total: Scalar to minimise.
        flow: Per sample, (B,).
        contrastive: Scalar.
        kl: Scalar, by the config's form and reduction, not yet weighted.
        source_std: Mean deviation of the text posterior; below about 0.1 the source has collapsed.
        source_reach: Mean absolute mean of the text posterior.
    """

    total: Tensor
    flow: Tensor
    contrastive: Tensor
    kl: Tensor
    source_std: Tensor
    source_reach: Tensor


def posterior_kl(posterior: Posterior, config: FlowTokConfig) -> Tensor:
    """Divergence of the text posterior by the config's form and reduction, a scalar."""
    form = wall_divergence if config.kl_form == "wall6" else gaussian_divergence
    entries = form(posterior)
    if config.kl_reduction == "mean":
        return entries.mean()
    return entries.sum() / (len(entries) if config.kl_reduction == "per_sample_sum" else 1)


def flow_terms(
    bridge: TextToImage,
    text: Tensor,
    target: Tensor,
    config: FlowTokConfig,
    *,
    t: Tensor,
    noise: Tensor,
    flags: Tensor,
    same: Tensor | None = None,
) -> FlowTerms:
    """The text-to-image loss with every random draw given; nothing passed in is changed.

    Args:
        bridge: Projector, alignment head and velocity network; gradients reach all three, the source included.
        text: Text tower tokens, (B, K, C).
        target: Scaled image tokens, (B, K, D).
        config: Weights and forms.
        t: Times, (B,), 0 text to 1 image.
        noise: Draw of the source, (B, K, D).
        flags: Samples that get somebody else's target, (B,).
        same: See `contrastive_loss`.
    """
    posterior = bridge.projector(text)
    source = posterior.sample(noise)
    flow = _transport_loss(bridge.velocity, source, target, flags, t, config)
    contrastive = contrastive_loss(source, bridge.align(text), bridge.align.log_temperature, same=same)
    kl = posterior_kl(posterior, config)
    return FlowTerms(
        total=flow.mean() + config.align_weight * contrastive + config.kl_weight * kl,
        flow=flow,
        contrastive=contrastive,
        kl=kl,
        source_std=torch.exp(0.5 * posterior.logvar.detach()).mean(),
        source_reach=posterior.mean.detach().abs().mean(),
    )


def text_to_image_loss(
    model: FlowTok, captions: Tensor, target: Tensor, *, generator: torch.Generator | None = None
) -> FlowTerms:
    """One training step of text-to-image.

    Args:
        model: Its `to_image` part is trained.
        captions: Ids, (B, K); equal captions are no negatives of each other.
        target: Scaled image tokens, (B, K, D), sampled from stored posteriors or encoded on the fly.
        generator: Of noise, times and flags, on the model's device.
    """
    same = (captions[:, None] == captions[None]).all(-1)
    draws = _draw(target, model.config.indicator_probability, generator)
    return flow_terms(model.to_image, model.captions(captions), target, model.config, same=same, **draws)


class TextTokenizerTerms(NamedTuple):
    """Losses of the text autoencoder, and the share of positions up to the end mark that come out right."""

    total: Tensor
    words: Tensor
    kl: Tensor
    accuracy: Tensor


def text_tokenizer_loss(
    model: FlowTok,
    captions: Tensor,
    *,
    kl_weight: float = 1e-4,
    noise_std: float = 0.1,
    generator: torch.Generator | None = None,
) -> TextTokenizerTerms:
    """Cross-entropy of the words from sampled text tokens, plus the wall divergence.

    Extra noise on the tokens teaches the decoder to bear what the flow gets wrong. Pads are not scored.

    Args:
        model: The projector and decoder of its image-to-text half are trained.
        captions: Ids, (B, K).
        kl_weight: On the divergence summed per sample.
        noise_std: Deviation of the extra noise.
        generator: On the model's device.
    """
    bridge = model.captioner()
    posterior = bridge.projector(model.captions(captions))
    tokens = posterior.sample(_noise_like(posterior.mean, generator))
    scores = bridge.decoder(tokens + noise_std * _noise_like(tokens, generator))
    scored = _up_to_end(captions, model.captions.ids.end)
    words = F.cross_entropy(scores[scored].float(), captions[scored])
    kl = wall_divergence(posterior).sum(dim=(1, 2)).mean()
    accuracy = (scores.argmax(-1) == captions)[scored].float().mean()
    return TextTokenizerTerms(words + kl_weight * kl, words, kl, accuracy)


def image_to_text_loss(
    model: FlowTok, images: Tensor, captions: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Flow loss from image tokens to the frozen text tokenizer's means, a scalar; no KL, no contrast (paper).

    Times are `u ** early_times`; at the default 2.5 a third of them are below 0.05. Captions are few and far apart, so
    from t = 0.1 on the state gives the caption away; which one it is must be learned at the very beginning, where
    logit-normal times hardly ever are. (With them the error was 0.02 from t = 0.1 on and worse than the mean caption at
    0: docs/results/flowtok.md.)

    Args:
        model: Only the velocity network of the image-to-text half gets a gradient.
        images: Scaled image tokens, (B, K, D).
        captions: Ids, (B, K).
        generator: On the model's device.
    """
    bridge = model.captioner()
    target = _means(bridge, model.captions(captions))
    beta = 1 / model.config.early_times
    t = beta_time(len(images), alpha=1.0, beta=beta, scale=1.0, generator=generator, device=images.device)
    flags = draw_flags(len(images), model.config.indicator_probability, generator=generator, device=images.device)
    return _transport_loss(bridge.velocity, images, target, flags, t, model.config).mean()


@torch.no_grad()
def _means(bridge: ImageToText, text: Tensor) -> Tensor:
    """The frozen text tokenizer's means, without the dropout that training mode would put on them."""
    training = bridge.projector.training
    bridge.projector.eval()
    mean = bridge.projector(text).mean
    bridge.projector.train(training)
    return mean


def _transport_loss(
    net: SequenceDiT, source: Tensor, target: Tensor, flags: Tensor, t: Tensor, config: FlowTokConfig
) -> Tensor:
    path = straight_path(source, swap_flagged(target, flags), t, sigma_min=config.sigma_min)
    error = net(path.x_t, t, flags).float() - path.target.float()
    return error.square().mean(dim=(1, 2))


def _draw(like: Tensor, probability: float, generator: torch.Generator | None) -> dict[str, Tensor]:
    batch = len(like)
    return {
        "t": logit_normal_time(batch, generator=generator, device=like.device),
        "noise": _noise_like(like, generator),
        "flags": draw_flags(batch, probability, generator=generator, device=like.device),
    }


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _up_to_end(captions: Tensor, end: int) -> Tensor:
    ended = (captions == end).long().cumsum(-1)
    return (ended == 0) | (captions == end) & (ended == 1)
