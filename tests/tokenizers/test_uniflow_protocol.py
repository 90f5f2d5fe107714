import pytest
import torch

from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_protocol import psnr, reconstruct, seam_ratio


def test_protocols_compare_at_the_size_they_name():
    model = UniFlow(UniFlowConfig.tiny()).eval()
    reference, out = reconstruct(model, torch.rand(1, 3, 64, 64))
    assert out.shape == reference.shape == (1, 3, 64, 64)
    reference, out = reconstruct(model, torch.rand(1, 3, 96, 96), protocol="256", size=96)
    assert out.shape == reference.shape == (1, 3, 96, 96)
    assert out.min() >= 0 and out.max() <= 1
    with pytest.raises(ValueError, match=r"protocol 256 takes \(B, 3, 256, 256\)"):
        reconstruct(model, torch.rand(1, 3, 64, 64), protocol="256")


def test_a_perfect_model_would_lose_under_b_only_what_resizing_loses():
    class Perfect(UniFlow):
        def encode(self, images):
            self.seen = images
            return images

        def decode(self, tokens, **_):
            return self.seen

    model = Perfect(UniFlowConfig.tiny())
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), size=(32, 32), mode="bicubic").clamp(0, 1)
    native = torch.nn.functional.interpolate(smooth, size=(64, 64), mode="bicubic").clamp(0, 1)
    assert psnr(*reconstruct(model, native)).isinf().all()
    assert (psnr(*reconstruct(model, smooth, protocol="256", size=32)) > 35).all()


def test_psnr_of_a_known_offset():
    grey = torch.full((1, 3, 8, 8), 100 / 255)
    assert psnr(grey, grey + 10 / 255).item() == pytest.approx(28.1308, abs=1e-3)


def test_seam_ratio_is_one_on_noise_and_large_on_blocks():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam_ratio(noise, 8).tolist() == pytest.approx([1, 1], abs=0.05)
    blocks = torch.rand(1, 3, 8, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert seam_ratio(blocks + 0.01 * noise[:1], 8).item() > 10
