import torch

from headrace.nn.quantizers.vector import Vector, VectorConfig

CENTRES = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])


def rows_around_centres(count):
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return CENTRES[torch.arange(count) % 2] + 0.1 * noise


def vq(decay):
    torch.manual_seed(0)
    book = Vector(VectorConfig(codes=2, width=2, decay=decay)).train()
    book.codebook.data.copy_(torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))
    book.moved(torch.arange(2))
    return book


def test_running_means_find_the_centres():
    book, rows = vq(0.8), rows_around_centres(64)
    for _ in range(60):
        book(rows)
    assert (book.codebook - CENTRES).abs().max() < 0.1
    assert not book.codebook.requires_grad


def test_gradient_finds_the_centres_too():
    book, rows = vq(None), rows_around_centres(64)
    optimizer = torch.optim.SGD(book.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        book(rows).loss.backward()
        optimizer.step()
    assert (book.codebook - CENTRES).abs().max() < 0.1


def test_the_gradient_passes_straight_through_and_commitment_pulls():
    book, rows = vq(0.99), rows_around_centres(8).requires_grad_()
    weight = torch.randn(8, 2)
    before = book.codebook.clone()
    result = book(rows)
    torch.testing.assert_close(result.rows, before[result.codes])
    (result.rows * weight).sum().backward()
    torch.testing.assert_close(rows.grad, weight)
    rows.grad = None
    chosen = book.codebook[result.codes].clone()
    book(rows).loss.backward()
    torch.testing.assert_close(rows.grad, 0.25 * 2 * (rows - chosen).detach() / rows.numel())
