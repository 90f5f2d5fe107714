"""How chunks of actions are carried out: policies that wrap a policy."""

import time
from collections import defaultdict

import numpy as np

from headrace.contracts import ActionChunk, ActionSpec, Needs, Observation, Policy, look_back, needs_of


class Wrapped:
    """What a policy around another one passes on unchanged."""

    policy: Policy

    @property
    def spec(self) -> ActionSpec:
        """The wrapped policy's action convention."""
        return self.policy.spec

    @property
    def look_back(self) -> int:
        """As the wrapped policy's."""
        return look_back(self.policy)

    @property
    def needs(self) -> Needs:
        """As the wrapped policy's."""
        return needs_of(self.policy)


class RecedingHorizon(Wrapped):
    """Carries out the first `execute` actions of each chunk, then asks again.

    With `execute` equal to the horizon the whole chunk runs open-loop, as ViPRA's demo client does; the paper's notes
    say 7 of 14.

    Raises:
        ValueError: `execute` is below 1, or above the length of the policy's chunks where it tells that (`horizon`).
    """

    def __init__(self, policy: Policy, execute: int) -> None:
        if execute < 1:
            raise ValueError(f"execute must be at least 1, got {execute}")
        horizon = getattr(policy, "horizon", execute)
        if execute > horizon:
            raise ValueError(f"execute {execute} asks for more than the {horizon} actions of this policy's chunks")
        self.policy, self.execute = policy, execute

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode."""
        self.policy.reset(slot, seed=seed)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """The first actions of the wrapped policy's chunks.

        Raises:
            ValueError: The chunks are shorter than `execute`.
        """
        chunk = self.policy.act(observations, slots)
        if chunk.actions.shape[1] < self.execute:
            raise ValueError(f"cannot execute {self.execute} actions of a chunk of {chunk.actions.shape[1]}")
        return chunk._replace(actions=chunk.actions[:, : self.execute])


class TemporalEnsemble(Wrapped):
    """Asks at every step and averages what past chunks said about it, weights exp(-decay * i), i = 0 the oldest.

    Source: Zhao et al. 2023 (ACT), arXiv 2304.13705, sec. IV; `decay` 0.01 is theirs, 0 is a plain mean.
    """

    def __init__(self, policy: Policy, *, decay: float = 0.01) -> None:
        self.policy, self.decay = policy, decay
        self._chunks: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        self._step: dict[int, int] = defaultdict(int)

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode: earlier chunks are forgotten."""
        self._chunks[slot], self._step[slot] = [], 0
        self.policy.reset(slot, seed=seed)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """One action for each observation, shape (B, 1, A)."""
        started = time.perf_counter()
        fresh = self.policy.act(observations, slots).actions
        actions = np.stack([self._merge(slot, chunk) for slot, chunk in zip(slots, fresh, strict=True)])
        return ActionChunk(actions[:, None], (time.perf_counter() - started) * 1e3)

    def _merge(self, slot: int, chunk: np.ndarray) -> np.ndarray:
        now = self._step[slot]
        self._step[slot] = now + 1
        kept = [(start, old) for start, old in self._chunks[slot] if start + len(old) > now]
        self._chunks[slot] = [*kept, (now, chunk)]
        said = np.stack([old[now - start] for start, old in self._chunks[slot]])
        weights = np.exp(-self.decay * np.arange(len(said), dtype=np.float64))
        return (said * (weights / weights.sum())[:, None]).sum(0).astype(np.float32)
