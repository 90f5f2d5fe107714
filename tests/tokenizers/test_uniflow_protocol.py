import pytest
import torch

from headrace.tokenizers.uniflow_protocol import psnr, seam_ratio


def test_psnr_of_a_known_offset():
    grey = torch.full((1, 3, 8, 8), 100 / 255)
    assert psnr(grey, grey + 10 / 255).item() == pytest.approx(28.1308, abs=1e-3)


def test_seam_ratio_is_one_on_noise_and_large_on_blocks():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam_ratio(noise, 8).tolist() == pytest.approx([1, 1], abs=0.05)
    blocks = torch.rand(1, 3, 8, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert seam_ratio(blocks + 0.01 * noise[:1], 8).item() > 10
