import torch

from headrace.nn.quantizers.noise_substitution import NoiseSubstitution, NoiseSubstitutionConfig


def quantizer():
    torch.manual_seed(0)
    return NoiseSubstitution(NoiseSubstitutionConfig(codes=5, width=3))


def test_training_noise_is_as_long_as_the_error_and_the_codebook_learns():
    nsvq, rows = quantizer().train(), torch.randn(40, 3)
    result = nsvq(rows, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((result.rows - rows).norm(dim=1), (rows - nsvq.codebook[result.codes]).norm(dim=1))
    result.rows.square().sum().backward()
    assert nsvq.codebook.grad.abs().sum() > 0
    assert nsvq.usage.sum() == 40


def test_eval_gives_exact_codebook_rows_and_counts_nothing():
    nsvq, rows = quantizer().eval(), torch.randn(40, 3)
    result = nsvq(rows)
    nearest = torch.cdist(rows, nsvq.codebook).argmin(1)
    assert torch.equal(result.codes, nearest)
    assert torch.equal(result.rows, nsvq.codebook[nearest]) and torch.equal(result.rows, nsvq.lookup(result.codes))
    assert nsvq.usage.sum() == 0
