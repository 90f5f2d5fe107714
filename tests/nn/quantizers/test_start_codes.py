import pytest
import torch

from headrace.nn.quantizers.noise_substitution import NoiseSubstitution, NoiseSubstitutionConfig
from headrace.nn.quantizers.start_codes import start_codes


def test_well_separated_clusters_each_get_a_code_at_their_mean():
    torch.manual_seed(0)
    centres = 10 * torch.eye(4)
    rows = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 4)
    quantizer = NoiseSubstitution(NoiseSubstitutionConfig(codes=4, width=4))
    quantizer.usage += 3
    with torch.autocast("cpu", torch.bfloat16):  # as in training; the means are not rounded
        start_codes(quantizer, rows, generator=torch.Generator().manual_seed(1))
    found = quantizer.codebook.detach()[quantizer.codebook.detach().argmax(1).argsort()]
    torch.testing.assert_close(found, torch.stack([rows[50 * k : 50 * k + 50].mean(0) for k in range(4)]))
    assert quantizer.usage.sum() == 0


def test_too_few_rows_are_refused():
    quantizer = NoiseSubstitution(NoiseSubstitutionConfig(codes=4, width=4))
    with pytest.raises(ValueError, match="4 codes need at least as many rows, got 3"):
        start_codes(quantizer, torch.randn(3, 4))
