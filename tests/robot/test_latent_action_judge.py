"""The verdict's parts, on videos whose motion is drawn by hand."""

import numpy as np
import pytest
import torch

from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.latent_action_judge import encode_corpus, judge, motion_error


class Corpus:
    """Squares that wander over a texture, held in memory; the part of `VideoClips` that the judge needs."""

    def __init__(self, count, length=12, seed=0, name="squares"):
        from headrace.datasets.video_source import Video, VideoSource

        random = np.random.default_rng(seed)
        self.sources = [
            VideoSource(
                name=name,
                folder=None,
                videos=tuple(
                    Video(name=str(k), path=None, column=None, first=0, length=length, fps=1.0, instruction="")
                    for k in range(count)
                ),
                strides=(1,) * count,
                scans={},
            )
        ]
        self.lengths, self.strides = np.full(count, length), np.ones(count, np.int64)
        steps = random.integers(-3, 4, (count, length - 1, 2))
        self.places = np.clip(np.cumsum(np.concatenate([np.full((count, 1, 2), 12), steps], 1), 1), 0, 20)
        self.pictures = np.full((count, length, 32, 32, 3), 60, np.uint8)
        for video, frame in np.ndindex(count, length):
            x, y = self.places[video, frame]
            self.pictures[video, frame, y : y + 12, x : x + 12] = (np.indices((12, 12)).sum(0) * 8 + 60)[..., None]

    def __len__(self):
        return len(self.lengths)

    def video(self, number):
        return self.sources[0], self.sources[0].videos[number]

    def clips(self, videos, starts, frames):
        from headrace.datasets.video_clips import ClipBatch

        at = np.asarray(starts)[:, None] + np.arange(frames)
        pictures = self.pictures[np.asarray(videos)[:, None], np.minimum(at, self.pictures.shape[1] - 1)]
        return ClipBatch(
            torch.from_numpy(pictures).permute(0, 1, 4, 2, 3),
            torch.from_numpy(at < self.pictures.shape[1]),
            torch.as_tensor(videos),
            torch.as_tensor(starts),
        )

    def positions(self):
        return {(self.sources[0].name, str(k)): self.places[k].astype(np.float64) for k in range(len(self))}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    from dataclasses import replace

    return LatentActionModel(replace(LatentActionConfig.tiny(image_size=32, patch=8), frames=5)).eval()


def test_every_transition_comes_once_with_its_motion(model):
    corpus = Corpus(3)
    encoded = encode_corpus(model, corpus, corpus.positions())
    expected = np.diff(corpus.places, axis=1).reshape(-1, 2)
    np.testing.assert_allclose(encoded.motion.numpy(), expected)
    assert encoded.codes.shape == (33, 4) and len(encoded.rows) == 33
    later = encode_corpus(model, corpus, corpus.positions(), offset=1)
    np.testing.assert_allclose(later.motion.numpy(), np.diff(corpus.places[:, 1:], axis=1).reshape(-1, 2))
    assert len(encode_corpus(model, corpus, corpus.positions(), at_most=2).codes) <= 8


def test_wrong_positions_are_refused(model):
    corpus = Corpus(2)
    wrong = {key: value[:-1] for key, value in corpus.positions().items()}
    with pytest.raises(ValueError, match="12 frames and 11 positions"):
        encode_corpus(model, corpus, wrong)
    with pytest.raises(ValueError, match="no positions of 0"):
        encode_corpus(model, corpus, {})


def test_codes_that_say_nothing_fail_the_probe(model):
    class Mute(LatentActionModel):
        def quantize(self, rows, *, generator=None):
            actions = super().quantize(rows, generator=generator)
            return actions._replace(codes=torch.zeros_like(actions.codes))

    training, held_out = Corpus(12), Corpus(4, name="others", seed=1)
    positions = training.positions() | held_out.positions()
    verdict = judge(Mute(model.config).eval(), training, held_out, positions)
    assert verdict.probe == pytest.approx(0, abs=0.05) and verdict.used == 1 / 8 and verdict.agreement == 1
    verdict = judge(model, training, held_out, positions)
    assert verdict.transitions == 44 and 0 <= verdict.agreement <= 1 and 1 / 8 <= verdict.used <= 1
    assert verdict.probe_random < 0.2 and verdict.copied > 0


def test_motion_error_of_a_copy_is_the_motion_and_of_the_truth_is_0(model):
    corpus = Corpus(3, seed=2)
    clip = corpus.clips([0, 1, 2], [0, 0, 0], 5).frames.float() / 255

    class Copy:
        def __init__(self, ahead):
            self.ahead = ahead

        def encode(self, frames):
            return type("Actions", (), {"vectors": frames})

        def decode(self, now, vectors):
            return vectors[:, 1:] if self.ahead else now

    copied, still = motion_error(Copy(False), clip)
    true, _ = motion_error(Copy(True), clip)
    assert true == 0 and copied == pytest.approx(still, rel=0.05) and still > 0.5


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_agreement_compares_the_same_transitions_at_every_stride(stride):
    from types import SimpleNamespace

    from headrace.robot.latent_action_judge import _agreement, _transitions

    corpus = SimpleNamespace(lengths=np.array([23, 31]), strides=np.array([stride, stride]))
    starts = [
        torch.tensor([[100 * i + s] for i, n in enumerate((23, 31)) for s in _transitions(n, stride, 4, offset)])
        for offset in (0, 1)
    ]
    assert starts[1][0] == stride  # one transition later
    assert _agreement(corpus, 4, *starts) == 1.0
    assert _agreement(corpus, 4, starts[0], starts[1] + 1) == 0.0
