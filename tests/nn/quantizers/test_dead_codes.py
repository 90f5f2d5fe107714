import pytest
import torch

from headrace.nn.quantizers.dead_codes import PAPER_JITTER, DeadCodeSchedule, replace_dead_codes
from headrace.nn.quantizers.noise_substitution import NoiseSubstitution, NoiseSubstitutionConfig
from headrace.nn.quantizers.vector import Vector, VectorConfig


def twins():
    torch.manual_seed(0)
    nsvq = NoiseSubstitution(NoiseSubstitutionConfig(codes=4, width=3)).train()
    nsvq.codebook.data[1] = nsvq.codebook.data[0]
    nsvq(torch.randn(400, 3), generator=torch.Generator().manual_seed(0))
    return nsvq


def test_the_published_schedule_has_56_events():
    schedule = DeadCodeSchedule()
    assert schedule.events(300_000) == 56
    assert schedule.due(100) and schedule.due(12_000) and not schedule.due(1_100) and not schedule.due(120_000)


def test_a_short_run_stops_at_two_fifths():
    due = [step for step in range(1, 1001) if DeadCodeSchedule.for_run(1000).due(step)]
    assert due[0] == 10 and due[9] == 100 and due[10] == 150 and due[-1] == 400


def test_twins_part_but_not_at_the_papers_noise():
    nsvq = twins()
    assert nsvq.usage[1] == 0  # the second twin is never chosen
    replace_dead_codes(nsvq, DeadCodeSchedule(), generator=torch.Generator().manual_seed(0))
    assert torch.pdist(nsvq.codebook.data).min() > 0
    nsvq(torch.randn(4000, 3))
    assert (nsvq.usage > 0).all()

    paper = twins()
    replace_dead_codes(paper, DeadCodeSchedule(jitter=PAPER_JITTER), generator=torch.Generator().manual_seed(0))
    assert torch.pdist(paper.codebook.data).min() < 1e-6


def test_moved_codes_lose_their_momentum_and_counting_starts_anew():
    nsvq = twins()
    optimizer = torch.optim.Adam(nsvq.parameters())
    nsvq.codebook.grad = torch.ones_like(nsvq.codebook)
    optimizer.step()
    done = replace_dead_codes(nsvq, DeadCodeSchedule(), optimizer=optimizer)
    assert done.dead.tolist() == [1]
    momentum = optimizer.state[nsvq.codebook]["exp_avg"]
    assert momentum[1].abs().sum() == 0 and (momentum[0] > 0).all()
    assert nsvq.usage.sum() == 0


def test_running_means_of_moved_codes_start_at_the_new_place():
    torch.manual_seed(0)
    book = Vector(VectorConfig(codes=3, width=2)).train()
    book.codebook.data.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0], [60.0, 60.0]]))
    book.moved(torch.arange(3))
    book(torch.randn(100, 2))
    replace_dead_codes(book, DeadCodeSchedule(jitter=0.5))
    assert book.codebook[1:].abs().max() < 10
    torch.testing.assert_close(book.sums[1:], book.codebook[1:].data)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="phases"):
        DeadCodeSchedule(phases=((10, 5, 1),))
