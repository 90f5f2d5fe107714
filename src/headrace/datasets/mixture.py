"""Several datasets as one, each with its share of the samples."""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch

from headrace.datasets.lerobot_demos import DemoBatch, LeRobotDemos
from headrace.datasets.normalize import Statistics


class Mixture:
    """Datasets with the same cameras, picture size, state and action, sampled in given proportions.

    One epoch is the shortest that holds every sample of every dataset at least once in these proportions; samples of a
    dataset with a large weight come several times. Takes the place of a `LeRobotDemos` in training.

    Args:
        datasets: At least one.
        weights: Share of each dataset, above 0, scaled to sum 1; None for shares by size.

    Raises:
        ValueError: No dataset, wrong weights, or datasets that do not fit together (names what differs and in which).
    """

    def __init__(self, datasets: Sequence[LeRobotDemos], weights: Sequence[float] | None = None) -> None:
        if not datasets:
            raise ValueError("a mixture needs at least one dataset")
        weights = [len(dataset) for dataset in datasets] if weights is None else weights
        if len(weights) != len(datasets) or min(weights) <= 0:
            raise ValueError(f"a mixture of {len(datasets)} needs as many weights, each above 0, got {list(weights)}")
        for other in datasets[1:]:
            _require_alike(datasets[0], other)
        self.datasets = tuple(datasets)
        self.weights = np.array(weights, dtype=np.float64) / np.sum(weights)
        sizes = np.array([len(dataset) for dataset in datasets])
        length = (sizes / self.weights).max()
        counts = np.maximum(sizes, np.round(self.weights * length).astype(np.int64))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        first = datasets[0]
        self.cameras, self.image_size, self.fps = first.cameras, first.image_size, first.fps
        self.action_names, self.state_names = first.action_names, first.state_names
        self.action_dim, self.state_dim, self.horizon = first.action_dim, first.state_dim, first.horizon

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: np.ndarray) -> DemoBatch:
        """Samples by number, as in `LeRobotDemos.batch`; `rows` count within their own dataset."""
        indices = np.asarray(indices)
        source = np.searchsorted(self._starts, indices, side="right") - 1
        parts = []
        for number in np.unique(source):
            dataset = self.datasets[number]
            parts.append(dataset.batch((indices[source == number] - self._starts[number]) % len(dataset)))
        back = np.argsort(np.argsort(source, kind="stable"), kind="stable")
        order = torch.from_numpy(back)
        words = [text for part in parts for text in part.instructions]
        return DemoBatch(
            images=torch.cat([part.images for part in parts])[order],
            state=torch.cat([part.state for part in parts])[order],
            actions=torch.cat([part.actions for part in parts])[order],
            action_is_pad=torch.cat([part.action_is_pad for part in parts])[order],
            instructions=[words[place] for place in back],
            rows=torch.cat([part.rows for part in parts])[order],
        )

    def looking_ahead(self, steps: int) -> "Mixture":
        """The same samples with a picture ahead, as in `LeRobotDemos.looking_ahead`."""
        other = copy(self)
        other.datasets = tuple(dataset.looking_ahead(steps) for dataset in self.datasets)
        return other

    @property
    def action_statistics(self) -> Statistics:
        """Of the actions, each dataset counting by its weight."""
        return self._statistics([dataset.actions[dataset.rows] for dataset in self.datasets])

    @property
    def state_statistics(self) -> Statistics:
        """Of the states, each dataset counting by its weight."""
        return self._statistics([dataset.states[dataset.rows] for dataset in self.datasets])

    def _statistics(self, values: list[np.ndarray]) -> Statistics:
        weights = [np.full(len(v), w / len(v)) for v, w in zip(values, self.weights, strict=True)]
        return Statistics.of(np.concatenate(values), np.concatenate(weights))


def _require_alike(first: LeRobotDemos, other: LeRobotDemos) -> None:
    differing = [
        f"{name}: {getattr(first, name)} in {first.folder}, {getattr(other, name)} in {other.folder}"
        for name in ("cameras", "image_size", "action_dim", "state_dim", "horizon", "history", "fps")
        if getattr(first, name) != getattr(other, name)
    ]
    if differing:
        raise ValueError("these datasets cannot be mixed; " + "; ".join(differing))
