import itertools

import torch

from headrace.nn.quantizers.finite_scalar import FiniteScalar, FiniteScalarConfig


def test_every_code_can_be_met_and_looked_up():
    torch.manual_seed(0)
    levels = (4, 3, 5)
    fsq = FiniteScalar(FiniteScalarConfig(levels=levels, width=3)).train()
    fsq.inp.weight.data.copy_(torch.eye(3))
    fsq.inp.bias.data.zero_()
    grid = torch.tensor(list(itertools.product(*[torch.linspace(-4, 4, 41).tolist()] * 3)))
    result = fsq(grid)
    assert fsq.codes == 60 and set(result.codes.tolist()) == set(range(60))
    torch.testing.assert_close(result.rows, fsq.lookup(result.codes))
    assert fsq.usage.sum() == len(grid)


def test_the_gradient_reaches_the_rows():
    torch.manual_seed(0)
    fsq = FiniteScalar(FiniteScalarConfig(levels=(5, 5), width=6))
    rows = torch.randn(7, 6, requires_grad=True)
    fsq(rows).rows.sum().backward()
    assert (rows.grad.abs().sum(1) > 0).all()
