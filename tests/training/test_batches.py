import threading
import time

import numpy as np
import pytest
import torch

from headrace.training.batches import Prefetch, batches, seed_of


class Numbers:
    """Sample i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def batch(self, indices):
        return torch.from_numpy(indices)


def test_every_epoch_holds_every_sample_once_though_batches_cross_its_end():
    data = batches(Numbers(10), 4, seed=3)
    seen = np.concatenate([data.at(step).numpy() for step in range(10)]).reshape(4, 10)
    assert (np.sort(seen, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in seen}) == 4


def test_a_batch_depends_on_seed_and_step_only():
    forward, other = batches(Numbers(50), 8, seed=1), batches(Numbers(50), 8, seed=1)
    given = {step: forward.at(step).tolist() for step in range(9)}
    assert {step: other.at(step).tolist() for step in reversed(range(9))} == given
    assert batches(Numbers(50), 8, seed=2).at(0).tolist() != given[0]


def test_processes_share_the_batch_of_one_process():
    whole = batches(Numbers(30), 6, seed=5)
    parts = [whole.shard(rank, 3).at(4) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole.at(4))


def test_transform_gets_a_generator_of_the_step():
    noisy = batches(Numbers(9), 3, transform=lambda b, g: b + torch.rand(3, generator=g))
    assert torch.equal(noisy.at(7), noisy.at(7))
    assert not torch.equal(noisy.at(7) % 1, noisy.at(8) % 1)


def test_visits_are_numbered_on_from_epoch_to_epoch():
    plain, counted = batches(Numbers(10), 4, seed=3), batches(Numbers(10), 4, seed=3, visits=True)
    seen = np.concatenate([counted.at(step).numpy() for step in range(10)])
    assert (seen // 10 == np.arange(40) // 10).all()
    assert (seen % 10 == np.concatenate([plain.at(step).numpy() for step in range(10)])).all()
    assert torch.equal(torch.cat([counted.shard(rank, 2).at(5) for rank in range(2)]), counted.at(5))


@pytest.mark.parametrize("size, batch_size, world", [(0, 2, 1), (5, 0, 1), (5, 3, 2)])
def test_impossible_batches_are_refused(size, batch_size, world):
    with pytest.raises(ValueError, match=r"empty|multiple"):
        batches(Numbers(size), batch_size).shard(0, world)


def test_prefetch_gives_the_batches_in_order_and_ends_its_thread():
    data = batches(Numbers(20), 5)
    with Prefetch(data, start=2, stop=9) as ahead:
        got = list(ahead)
    assert [g.tolist() for g in got] == [data.at(step).tolist() for step in range(2, 9)]
    assert not [t for t in threading.enumerate() if t.name == "headrace-batches"]


def test_prefetch_loads_while_the_consumer_works():
    class Slow(Numbers):
        def batch(self, indices):
            time.sleep(0.05)
            return super().batch(indices)

    with Prefetch(batches(Slow(8), 2), start=0, stop=8) as ahead:
        start = time.perf_counter()
        for _ in ahead:
            time.sleep(0.05)
    assert time.perf_counter() - start < 0.7, "loading and computing took turns"


def test_an_error_in_the_thread_is_raised_in_the_loop():
    class Broken(Numbers):
        def batch(self, indices):
            raise ValueError("sample 3 is damaged")

    with pytest.raises(ValueError, match="sample 3"), Prefetch(batches(Broken(8), 2), start=0, stop=8) as ahead:
        next(iter(ahead))


def test_leaving_early_does_not_hang():
    with Prefetch(batches(Numbers(8), 2), start=0, stop=10_000) as ahead:
        next(iter(ahead))


def test_seeds_differ():
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900
