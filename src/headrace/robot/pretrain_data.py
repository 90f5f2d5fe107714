"""Pretraining samples: a labelled frame with its context, the ids of its future frame and its latent actions."""
# Shape letters: B batch.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.datasets.latent_labels import LatentLabels
from headrace.datasets.random_crop import random_crop
from headrace.datasets.video_clips import VideoClips
from headrace.robot.frame_codes import FrameCodesConfig
from headrace.robot.token_cache import FrameTokens
from headrace.robot.vipra_pretraining import PretrainingInput, VipraPretrainingConfig

EncodeText = Callable[[Sequence[str]], Tensor]


class RawSamples(NamedTuple):
    """Samples before augmentation; fields as in `PretrainingInput`, with the words still words."""

    images: Tensor
    frames: Tensor
    future: Tensor
    latents: Tensor
    instructions: list[str]


class PretrainingData:
    """Labelled frames as `len()` and `batch(indices)`, for `headrace.training.batches.batches`.

    Args:
        labels: Written by `headrace label`.
        corpus: The labelled videos, at the config's `camera_size`.
        tokens: Their frames as ids; None where neither the future frame nor the context is ids.
        config: What the network sees and predicts.

    Raises:
        ValueError: Labels of another shape or horizon than the config's, videos that the corpus lacks, or no tokens
            where there should be.
    """

    def __init__(
        self, labels: LatentLabels, corpus: VideoClips, tokens: FrameTokens | None, config: VipraPretrainingConfig
    ) -> None:
        header, record = labels.header, config.record
        if (header.tokens, header.codes, header.horizon) != (config.latent_tokens, config.latent_codes, record.horizon):
            raise ValueError(
                f"the labels hold {header.horizon} transitions of {header.tokens} codes of {header.codes}, the network "
                f"is made for {record.horizon} of {config.latent_tokens} of {config.latent_codes}"
            )
        header.require_model(record.lam_hash, name="the model named in the config")
        self.context_is_ids = isinstance(config.image, FrameCodesConfig)
        if tokens is None and (self.context_is_ids or record.future):
            raise ValueError("this network reads or predicts frames as ids: make the token cache first")
        if tokens is not None and tokens.header.tokenizer_hash != record.tokenizer_hash:
            raise ValueError(
                f"the cache was made by tokenizer {tokens.header.tokenizer_hash}, the config names "
                f"{record.tokenizer_hash}; use that one, or make the cache again"
            )
        self.labels, self.corpus, self.tokens, self.config = labels, corpus, tokens, config
        names = list(zip(labels.source, labels.video, strict=True))
        number = {pair: corpus.number(*pair) for pair in set(names)}
        self._videos = np.array([number[pair] for pair in names], np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> RawSamples:
        """Samples by number."""
        indices = np.asarray(indices)
        config, labels, videos = self.config, self.labels, self._videos[indices]
        count, steps = len(indices), config.record.latent_steps
        past = np.array(config.history)[None] * labels.stride[indices][:, None]
        seen = np.maximum(labels.frame[indices][:, None] + past, 0)
        empty = torch.zeros(count, 0, dtype=torch.int64)
        images, frames, future = torch.zeros(count, 0, dtype=torch.uint8), empty, empty
        if self.context_is_ids:
            assert self.tokens is not None
            width = seen.shape[1]
            frames = self.tokens.read(np.repeat(videos, width), seen.reshape(-1)).view(count, -1)
        else:
            pictures = [self.corpus.read(int(v), rows) for v, rows in zip(videos, seen, strict=True)]
            images = torch.from_numpy(np.stack(pictures))[:, None]
        if config.record.future:
            assert self.tokens is not None
            future = self.tokens.read(videos, labels.future[indices].astype(np.int64))
        codes = torch.from_numpy(labels.codes[indices].astype(np.int64))[:, :steps].flatten(1)
        return RawSamples(images, frames, future, codes, [str(text) for text in labels.instruction[indices]])


class Prepare:
    """Turns samples into training batches, in the loading thread: crops, moved by up to `move` px, and text ids."""

    def __init__(self, config: VipraPretrainingConfig, encode: EncodeText, *, move: int = 0) -> None:
        if move and isinstance(config.image, FrameCodesConfig):
            raise ValueError("frames that are read as cached ids cannot be moved; use move=0")
        self.config, self.encode, self.move = config, encode, move

    def __call__(self, batch: RawSamples, generator: torch.Generator) -> PretrainingInput:
        config, images = self.config, batch.images
        if images.shape[1]:
            images = random_crop(
                images, corner=config.crop, size=config.image.size, pixels=self.move, generator=generator
            )
        text = self.encode(batch.instructions)
        return PretrainingInput(images, batch.frames, batch.future, batch.latents, text)
