"""Pretraining samples: a labelled frame with its context, the ids of its future frame and its latent actions."""
# Shape letters: B batch.

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.datasets.latent_labels import LatentLabels
from headrace.datasets.random_crop import random_crop
from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_scan import BadVideo
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

    Frames of videos that the token cache could not read are left out, with a warning that counts them. A video whose
    damage shows only when a picture is wanted is counted too; the next labelled frame of another one stands in.

    Args:
        labels: Written by `headrace label`.
        corpus: The labelled videos, at the config's `camera_size`.
        tokens: Their frames as ids; None where neither the future frame nor the context is ids.
        config: What the network sees and predicts.

    Raises:
        ValueError: Labels of another shape or horizon than the config's, videos that the corpus lacks, no tokens where
            there should be, or not one readable video.
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
        self._damaged: set[int] = set() if tokens is None else set(tokens.damaged.tolist())
        self._rows = np.flatnonzero(~np.isin(self._videos, list(self._damaged)))
        if not len(self._rows):
            raise ValueError("none of the labelled videos can be read; copy or record them again")
        if len(self._rows) < len(labels):
            lost = len(np.intersect1d(self._videos, list(self._damaged)))
            warnings.warn(
                f"{len(labels) - len(self._rows)} of {len(labels)} labelled frames are left out: {lost} videos cannot "
                "be read",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray) -> RawSamples:
        """Samples by number.

        Raises:
            BadVideo: No video can be read any more.
        """
        config, labels = self.config, self.labels
        found = [self._readable(int(index)) for index in np.asarray(indices)]
        indices = np.array([row for row, _ in found])
        videos = self._videos[indices]
        count, steps = len(indices), config.record.latent_steps
        empty = torch.zeros(count, 0, dtype=torch.int64)
        images, frames, future = torch.zeros(count, 0, dtype=torch.uint8), empty, empty
        if self.context_is_ids:
            assert self.tokens is not None
            seen = np.stack([self._seen(row) for row in indices.tolist()])
            frames = self.tokens.read(np.repeat(videos, seen.shape[1]), seen.reshape(-1)).view(count, -1)
        else:
            images = torch.from_numpy(np.stack([pictures for _, pictures in found if pictures is not None]))[:, None]
        if config.record.future:
            assert self.tokens is not None
            future = self.tokens.read(videos, labels.future[indices].astype(np.int64))
        codes = torch.from_numpy(labels.codes[indices].astype(np.int64))[:, :steps].flatten(1)
        return RawSamples(images, frames, future, codes, [str(text) for text in labels.instruction[indices]])

    def _seen(self, row: int) -> np.ndarray:
        """Numbers of the context frames of a labelled frame, shape (T,)."""
        past = np.array(self.config.history) * self.labels.stride[row]
        return np.maximum(self.labels.frame[row] + past, 0)

    def _readable(self, index: int) -> tuple[int, np.ndarray | None]:
        """The label row of a sample and its pictures, None for ids; the next one whose video can be read."""
        for step in range(len(self)):
            row = int(self._rows[(index + step) % len(self)])
            video = int(self._videos[row])
            if video in self._damaged:
                continue
            try:
                return row, None if self.context_is_ids else self.corpus.read(video, self._seen(row))
            except BadVideo as error:
                self._damaged.add(video)
                warnings.warn(f"{error}; left out from here on, {len(self._damaged)} videos so far", stacklevel=3)
        raise BadVideo("corrupt", f"none of the {len(set(self._videos.tolist()))} labelled videos can be read any more")


class Prepare:
    """Turns samples into training batches, in the loading thread: crops, moved by up to `move` px, and text ids.

    Raises:
        ValueError: `move` is above 0 where frames are read or predicted as cached ids, which are those of one crop.
    """

    def __init__(self, config: VipraPretrainingConfig, encode: EncodeText, *, move: int = 0) -> None:
        if move and isinstance(config.image, FrameCodesConfig):
            raise ValueError("frames that are read as cached ids cannot be moved; use move=0")
        if move and config.record.future:
            raise ValueError(
                f"the future frame is predicted as cached ids of a crop that stays, so the context cannot be moved by "
                f"{move} px; use move=0, which only fields 'la' need not"
            )
        self.config, self.encode, self.move = config, encode, move

    def __call__(self, batch: RawSamples, generator: torch.Generator) -> PretrainingInput:
        config, images = self.config, batch.images
        if images.shape[1]:
            images = random_crop(
                images, corner=config.crop, size=config.image.size, pixels=self.move, generator=generator
            )
        text = self.encode(batch.instructions)
        return PretrainingInput(images, batch.frames, batch.future, batch.latents, text)
