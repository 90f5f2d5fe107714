"""Latent-action chunks of whole videos: for every frame, the codes of the transitions that follow it.

Source: ViPRA, stage 2 data (arXiv 2511.07732; sroutray/vipra@d5d8c0d): windows of 16 frames around each frame, the
encoder and hard quantiser, transitions 1 to 14.
"""
# Shape letters: L frames of a video, R rows, W frames of a window, H transitions of a chunk, N codes of a transition.

import json
from dataclasses import asdict
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch

from headrace.robot.latent_action import LatentActionModel


def model_hash(model: LatentActionModel) -> str:
    """Hash of a model's config and of the weights that make labels, 16 hexadecimal digits; the decoder is left out."""
    config = asdict(model.config)
    del config["features"]["frozen"]  # says how the weights came about, not what they are
    digest = sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("decoder.") and name != "quantizer.usage":
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class VideoLabels(NamedTuple):
    """Labels of one video, a row for each frame that has a next one.

    Attributes:
        codes: int16, shape (R, H, N); entry h is the transition from frame + h * stride to frame + (h + 1) * stride.
        frame: Present frame, int64, shape (R,).
        past: Context frame before it, at least 0, int64, shape (R,).
        future: End of the chunk, at most L - 1, int64, shape (R,).
        transitions: How many of the H transitions lie within the video, int64, shape (R,).
    """

    codes: np.ndarray
    frame: np.ndarray
    past: np.ndarray
    future: np.ndarray
    transitions: np.ndarray


class LatentActionLabeler:
    """Labels videos with a trained model, in eval mode.

    The features of single frames are computed once and shared by all windows that a frame lies in.

    Args:
        model: Put into eval mode and left there.
        horizon: Transitions per row, H; 14 in the paper.
        history: Frames of the window before the present one; 1 in the paper. The encoder sees them, their transitions
            are not kept.
        batch_size: Windows at a time.
        every: Label each frame whose number this divides.
        rate: Steps a second that the model knows [Hz]; when a corpus is labelled, videos that differ from it by more
            than 2 % are left out. None takes all.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        model: LatentActionModel,
        *,
        horizon: int = 14,
        history: int = 1,
        batch_size: int = 160,
        every: int = 1,
        rate: float | None = None,
    ) -> None:
        if horizon < 1 or history < 0 or batch_size < 1 or every < 1:
            raise ValueError(
                "horizon, batch_size and every must be at least 1 and history at least 0, "
                f"got {horizon}, {batch_size}, {every} and {history}"
            )
        self.model = model.eval()
        self.horizon, self.history, self.batch_size, self.every, self.rate = horizon, history, batch_size, every, rate

    def windows(self, length: int, stride: int) -> np.ndarray:
        """Frame numbers of the windows of a video, clamped to it, int64, shape (R, W), W = history + 1 + H."""
        present = np.arange(0, length - stride, self.every)
        steps = np.arange(-self.history, self.horizon + 1) * stride
        return np.clip(present[:, None] + steps, 0, length - 1)

    @torch.inference_mode()
    def label(self, frames: np.ndarray, *, stride: int = 1) -> VideoLabels:
        """Label a video.

        Args:
            frames: uint8 RGB at the model's picture size, shape (L, S, S, 3).
            stride: Frames between neighbouring frames of a window.

        Raises:
            ValueError: Another shape, or too few frames for one transition.
        """
        side = self.model.config.image_size
        if frames.ndim != 4 or frames.shape[1:] != (side, side, 3):
            raise ValueError(f"frames must have shape (L, {side}, {side}, 3), got {frames.shape}")
        if len(frames) <= stride:
            raise ValueError(f"a transition at stride {stride} needs {stride + 1} frames, got {len(frames)}")
        windows = self.windows(len(frames), stride)
        encoder, device = self.model.encoder, self.model.device
        features = torch.cat(
            [
                encoder.frame_features(
                    torch.tensor(frames[k : k + self.batch_size]).to(device).permute(0, 3, 1, 2)[None] / 255
                )[0]
                for k in range(0, len(frames), self.batch_size)
            ]
        )
        codes = []
        for k in range(0, len(windows), self.batch_size):
            rows = encoder.from_features(features[torch.from_numpy(windows[k : k + self.batch_size])])
            codes.append(self.model.quantize(rows).codes[:, self.history :].to("cpu", torch.int16).numpy())
        present = np.arange(0, len(frames) - stride, self.every)
        left = (len(frames) - 1 - present) // stride
        return VideoLabels(
            codes=np.concatenate(codes),
            frame=present,
            past=np.maximum(present - max(self.history, 1) * stride, 0),
            future=windows[:, -1],
            transitions=np.minimum(left, self.horizon),
        )
