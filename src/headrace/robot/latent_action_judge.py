"""One verdict on a trained latent action model, from videos whose true motion is known."""
# Shape letters: L frames of a video, A numbers of a position, R transitions, N codes of a transition, T frames.

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from headrace.datasets.video_clips import VideoClips
from headrace.nn.precision import mixed
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_metrics import (
    code_usage,
    label_agreement,
    linear_probe,
    one_hot_rows,
    steering,
)

FITTED_WINDOWS = 1500
Positions = Mapping[tuple[str, str], np.ndarray]
"""Where something is in each frame of a video, shape (L, A), by the names of the source and the video."""


class Verdict(NamedTuple):
    """What the codes are worth, on videos that were kept from training.

    Attributes:
        used: Share of the codes that occur.
        perplexity: Of the codes, as a share of its maximum.
        probe: R2 of a linear map from the codes (one-hot) to the motion, fitted on the training videos;
            it and the following three are None without positions.
        probe_vectors: The same from the encoder's rows before the quantiser.
        probe_random: The same from the codes in random order.
        probe_untrained: The same from the codes of an untrained model of this config.
        own, swapped, copied: Squared error of the next frame; see `Steering`. They and the following three are None
            for a model that predicts features.
        future_margin: See `Steering` [dB].
        flow_error: End-point error of the predicted motion where something moves, by Farneback's method, which no
            training term uses [px].
        flow_error_copied: The same if the present frame is given as the next one, the mean length of the motion [px].
        agreement: Share of equal codes of the same transitions in windows one transition apart.
        transitions: Held-out transitions behind these numbers.
    """

    used: float
    perplexity: float
    probe: float | None
    probe_vectors: float | None
    probe_random: float | None
    probe_untrained: float | None
    own: float | None
    swapped: float | None
    copied: float | None
    future_margin: float | None
    flow_error: float | None
    flow_error_copied: float | None
    agreement: float
    transitions: int


class Encoded(NamedTuple):
    """Transitions of a corpus: codes (R, N), rows before the quantiser (R, N * Q), motion (R, A)."""

    codes: Tensor
    rows: Tensor
    motion: Tensor


@torch.inference_mode()
def encode_corpus(
    model: LatentActionModel,
    corpus: VideoClips,
    positions: Positions | None,
    *,
    offset: int = 0,
    at_most: int | None = None,
    batch_size: int = 32,
) -> Encoded:
    """Codes and true motion of every transition, from windows of the training length that follow each other.

    Args:
        model: In eval mode.
        corpus: Videos at the model's picture size.
        positions: Of each video; None gives a motion of no numbers.
        offset: First transition of the first window.
        at_most: Windows to take, drawn at random but always the same ones; None for all.
        batch_size: Windows at a time.

    Raises:
        ValueError: A video without positions, or with another number of them than frames.
    """
    frames, codes, rows, motion = model.config.frames, [], [], []
    videos, starts = _windows(corpus, frames, offset)
    if at_most is not None and at_most < len(videos):
        some = np.sort(np.random.default_rng(0).permutation(len(videos))[:at_most])
        videos, starts = videos[some], starts[some]
    for k in range(0, len(videos), batch_size):
        batch = corpus.clips(videos[k : k + batch_size], starts[k : k + batch_size], frames)
        clip = batch.frames.to(model.device).float() / 255
        with mixed(model.device):
            encoded = model.encoder(clip)
        real = batch.mask[:, 1:]
        codes.append(model.quantize(encoded).codes.cpu()[real])
        rows.append(encoded.float().flatten(2).cpu()[real])
        for number, start, count in zip(
            batch.videos.tolist(), batch.starts.tolist(), real.sum(1).tolist(), strict=True
        ):
            motion.append(_motion(corpus, number, start, count, positions))
    return Encoded(torch.cat(codes), torch.cat(rows), torch.cat(motion))


def judge(model: LatentActionModel, training: VideoClips, held_out: VideoClips, positions: Positions | None) -> Verdict:
    """Measure a model; see `Verdict`.

    Args:
        model: Put into eval mode.
        training: Videos on which the probe is fitted.
        held_out: Videos that neither model nor probe has seen.
        positions: Of the videos of both; the motion is their difference from frame to frame. None leaves out
            the probes.
    """
    model.eval()
    size = model.quantizer.codes
    fitted = encode_corpus(model, training, positions, at_most=FITTED_WINDOWS)
    scored = encode_corpus(model, held_out, positions)
    shifted = encode_corpus(model, held_out, positions, offset=1)
    order = torch.Generator().manual_seed(0)
    untrained = type(model)(model.config).to(model.device).eval()
    strange_fitted = encode_corpus(untrained, training, positions, at_most=FITTED_WINDOWS)
    strange = encode_corpus(untrained, held_out, positions)

    def probe(a: Tensor, b: Tensor) -> float | None:
        return None if positions is None else linear_probe(a, fitted.motion, b, scored.motion).r2

    a, b = one_hot_rows(fitted.codes, size), one_hot_rows(scored.codes, size)
    usage = code_usage(scored.codes, size)
    videos, starts = _windows(held_out, model.config.frames, 0)
    some = np.random.default_rng(0).permutation(len(videos))[:64]
    clip = held_out.clips(videos[some], starts[some], model.config.frames).frames.to(model.device).float() / 255
    pixels = model.config.target == "pixels"
    steered = steering(model, clip) if pixels else None
    error, still = motion_error(model, clip) if pixels else (None, None)
    return Verdict(
        used=usage.share,
        perplexity=usage.perplexity / size,
        probe=probe(a, b),
        probe_vectors=probe(fitted.rows, scored.rows),
        probe_random=probe(
            a[torch.randperm(len(a), generator=order)],
            b[torch.randperm(len(b), generator=order)],
        ),
        probe_untrained=probe(one_hot_rows(strange_fitted.codes, size), one_hot_rows(strange.codes, size)),
        own=None if steered is None else steered.own,
        swapped=None if steered is None else steered.swapped,
        copied=None if steered is None else steered.copied,
        future_margin=None if steered is None else steered.future_margin,
        flow_error=error,
        flow_error_copied=still,
        agreement=_agreement(held_out, model.config.frames, scored.codes, shifted.codes),
        transitions=len(scored.codes),
    )


@torch.inference_mode()
def motion_error(model: LatentActionModel, clip: Tensor, *, moving: float = 0.5) -> tuple[float, float]:
    """End-point error of predicted motion, and of no motion, over pixels that move by more than `moving` px.

    Args:
        model: Predicts pixels.
        clip: Frames in [0, 1], shape (B, T, 3, S, S).
        moving: Least length of the true motion [px].
    """
    predicted = model.decode(clip[:, :-1], model.encode(clip).vectors).clamp(0, 1)
    now, then = clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1)
    true, drawn = _farneback(now, then), _farneback(now, predicted.flatten(0, 1))
    moves = torch.linalg.vector_norm(true, dim=1) > moving
    if not bool(moves.any()):
        raise ValueError(f"nothing in these clips moves by more than {moving} px")
    gap, length = (torch.linalg.vector_norm(flow, dim=1)[moves] for flow in (drawn - true, true))
    return float(gap.mean()), float(length.mean())


def _farneback(a: Tensor, b: Tensor) -> Tensor:
    """Optical flow from frames (M, 3, H, W) in [0, 1], shape (M, 2, H, W) [px]."""
    flows = []
    for first, second in zip(_grey(a), _grey(b), strict=True):
        start = np.zeros((*first.shape, 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(first, second, start, 0.5, 3, 9, 5, 5, 1.1, 0)
        flows.append(torch.from_numpy(flow).permute(2, 0, 1))
    return torch.stack(flows)


def _grey(frames: Tensor) -> list[np.ndarray]:
    grey = (frames.float().mean(1) * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return list(grey)


def _windows(corpus: VideoClips, frames: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Videos and first frames of windows that share one frame with the next, so that each transition comes once."""
    videos, starts = [], []
    for number in range(len(corpus)):
        step = (frames - 1) * int(corpus.strides[number])
        stride = int(corpus.strides[number])
        first = np.arange(offset * stride, int(corpus.lengths[number]) - stride, step)
        videos += [number] * len(first)
        starts += first.tolist()
    return np.array(videos), np.array(starts)


def _motion(corpus: VideoClips, number: int, start: int, count: int, positions: Positions | None) -> Tensor:
    if positions is None:
        return torch.zeros(count, 0)
    source, video = corpus.video(number)
    if (source.name, video.name) not in positions:
        raise ValueError(f"no positions of {video.name} in {source.name}")
    where = positions[source.name, video.name]
    if len(where) != video.length:
        raise ValueError(f"{video.name} in {source.name} has {video.length} frames and {len(where)} positions")
    at = start + np.arange(count + 1) * int(corpus.strides[number])
    return torch.from_numpy(np.diff(where[at], axis=0)).float()


def _agreement(corpus: VideoClips, frames: int, codes: Tensor, shifted: Tensor) -> float:
    """Of the codes of windows from the first and from the second transition; only what both have is compared."""
    first, second, at, also = [], [], 0, 0
    for length, stride in zip(corpus.lengths.tolist(), corpus.strides.tolist(), strict=True):
        count, fewer = (len(_transitions(length, stride, frames, offset)) for offset in (0, 1))
        own = {frame: at + k for k, frame in enumerate(_transitions(length, stride, frames, 0))}
        for k, frame in enumerate(_transitions(length, stride, frames, 1)):
            if frame in own:
                first.append(own[frame])
                second.append(also + k)
        at, also = at + count, also + fewer
    return label_agreement(codes[first], shifted[second])


def _transitions(length: int, stride: int, frames: int, offset: int) -> list[int]:
    """Frames from which the windows' transitions start, in order."""
    step = (frames - 1) * stride
    windows = range(offset * stride, length - stride, step)
    return [s for w in windows for s in range(w, min(w + step, length - stride), stride)]
