"""Batch k depends on (seed, k) only, so a run is resumed by one integer; a thread loads ahead."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import numpy as np
import torch

Transform = Callable[[Any, torch.Generator], Any]


class Dataset(Protocol):
    """What `batches` needs from a dataset."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Any:
        """Samples `indices` (int64, shape (B,)) as one batch of tensors; a pure function."""


class Batches(Protocol):
    """What `fit` trains on."""

    def at(self, step: int) -> Any:
        """Batch number `step`: tensors in a dict, a tuple or a NamedTuple. The same at every call."""

    def shard(self, rank: int, world: int) -> Self:
        """The part of each batch that process `rank` of `world` computes."""


def seed_of(*parts: int) -> int:
    """Mix non-negative integers into one seed of 63 bits; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ShuffledBatches:
    """Batches in a new order every epoch; a batch may run over the end of an epoch, so no sample is dropped.

    Args:
        dataset: Gives its length and `batch(indices)`.
        batch_size: Samples per step over all processes.
        seed: Order and transforms follow from (seed, step).
        transform: Called as `transform(batch, generator)` on each batch in the loading thread; for augmentation. The
            CPU generator is seeded from (seed, step, rank).
        visits: Ask for sample i in epoch e as number i + e * len(dataset), for a dataset that shows a sample in
            another way at each visit. Otherwise its number is i in every epoch.
        rank, world: Which contiguous part of each batch to give; `fit` sets them through `shard`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        transform: Transform | None = None,
        visits: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of the {world} processes, got {batch_size}")
        if not len(dataset):
            raise ValueError("the dataset is empty: there is nothing to train on")
        self.dataset, self.batch_size, self.seed, self.transform = dataset, batch_size, seed, transform
        self.visits, self.rank, self.world = visits, rank, world
        self._order: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> np.ndarray:
        """Sample numbers of the whole batch `step`, over all processes; int64, shape (batch_size,)."""
        size = len(self.dataset)
        position = step * self.batch_size + np.arange(self.batch_size)
        epoch, place = np.divmod(position, size)
        numbers = np.concatenate([self._permutation(int(e))[place[epoch == e]] for e in np.unique(epoch)])
        return numbers + epoch * size if self.visits else numbers

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng(seed_of(self.seed, epoch))
            self._order = epoch, generator.permutation(len(self.dataset))
        return self._order[1]

    def at(self, step: int) -> Any:
        """This process's part of batch `step`."""
        share = self.batch_size // self.world
        batch = self.dataset.batch(self.indices(step)[self.rank * share : (self.rank + 1) * share])
        if self.transform is None:
            return batch
        return self.transform(batch, torch.Generator().manual_seed(seed_of(self.seed, step, self.rank, 1)))

    def shard(self, rank: int, world: int) -> "ShuffledBatches":
        """The same batches, cut into `world` equal parts, of which this is number `rank`."""
        return ShuffledBatches(
            self.dataset,
            self.batch_size,
            seed=self.seed,
            transform=self.transform,
            visits=self.visits,
            rank=rank,
            world=world,
        )


def batches(
    dataset: Dataset, batch_size: int, *, seed: int = 0, transform: Transform | None = None, visits: bool = False
) -> ShuffledBatches:
    """Shuffled training batches of a dataset; see `ShuffledBatches`."""
    return ShuffledBatches(dataset, batch_size, seed=seed, transform=transform, visits=visits)


class Prefetch:
    """Loads the next batches in a background thread while the model computes on the present one.

    Only `depth` batches wait at a time. An error in the thread is raised where the batch is asked for. Use as a context
    manager, so that the thread ends with the loop.
    """

    def __init__(self, batches: Batches, *, start: int, stop: int, depth: int = 3) -> None:
        self._batches, self._start, self._stop = batches, start, stop
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._load, name="headrace-batches", daemon=True)

    def _load(self) -> None:
        for step in range(self._start, self._stop):
            try:
                item: tuple[Any, BaseException | None] = self._batches.at(step), None
            except BaseException as error:
                item = None, error
            if not self._put(item) or item[1] is not None:
                return

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._start, self._stop):
            batch, error = self._queue.get()
            if error is not None:
                raise error
            yield batch

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
