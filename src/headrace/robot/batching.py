"""Many clients, one policy: observations that wait at the same time share a call."""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from headrace.contracts import Observation, Policy, can_continue
from headrace.robot.wire import Continuation


class PolicyFailed(RuntimeError):
    """The policy raised, or answered with something that must not reach a robot."""


class Answer(NamedTuple):
    """What one client gets.

    Attributes:
        actions: float32, shape (H, A).
        infer_ms: Wall-clock time of the shared call [ms].
        queue_ms: Time this observation waited for its turn [ms].
        batch: Number of observations in the call.
    """

    actions: np.ndarray
    infer_ms: float
    queue_ms: float
    batch: int


class _Waiting(NamedTuple):
    observation: Observation
    slot: int
    after: Continuation | None
    since: float
    answer: asyncio.Future

    @property
    def kind(self) -> tuple[int, int] | None:
        """What must be equal within a call: rows of the prefix and delay; None without a chunk to continue."""
        return None if self.after is None else (len(self.after.prefix), self.after.delay)


class Batcher:
    """Runs a policy in one thread, on as many waiting observations as there are.

    A call starts at once when every client that is known to be active has an observation waiting, and otherwise
    `wait` seconds after the first one. A slot is at most once in a call. Observations that continue a chunk share a
    call only with those whose chunk has as many rows left and the same delay, since a call has one of either. When a
    shared call fails, its observations are tried one by one, so that a client with a bad one does not fail the others.

    Args:
        policy: Called from one thread only.
        max_batch: Most observations in a call.
        wait: Longest time to wait for more [s].
    """

    def __init__(self, policy: Policy, *, max_batch: int = 16, wait: float = 0.004) -> None:
        if max_batch < 1 or wait < 0:
            raise ValueError(f"max_batch must be at least 1 and wait at least 0, got {max_batch} and {wait}")
        self.policy, self.max_batch, self.wait = policy, max_batch, wait
        self.active: set[int] = set()
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def reset(self, slot: int, seed: int) -> None:
        """Start an episode in `slot`.

        Raises:
            PolicyFailed: The policy raised.
        """
        self.active.add(slot)
        try:
            await self._in_thread(partial(self.policy.reset, slot, seed=seed))
        except Exception as error:
            raise PolicyFailed(f"reset: {type(error).__name__}: {error}") from error

    async def act(self, observation: Observation, slot: int, after: Continuation | None = None) -> Answer:
        """Actions for one observation, continuing a chunk that is being executed where there is one.

        Raises:
            PolicyFailed: The policy raised on it, or its actions have a wrong shape or are not finite.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(observation, slot, after, time.perf_counter(), answer))
        self._arrived.set()
        return await answer

    def forget(self, slot: int) -> None:
        """No more observations will come from `slot`."""
        self.active.discard(slot)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            while True:
                await self._gather()
                batch = self._take()
                if batch:
                    await self._answer(batch)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> None:
        """Return when a call is worth starting."""
        if not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = self._waiting[0].since + self.wait
        while len(self._waiting) < min(self.max_batch, len(self.active)):
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        later: list[_Waiting] = []
        slots: set[int] = set()
        while self._waiting and len(batch) < self.max_batch:
            one = self._waiting.popleft()
            if one.answer.done():  # its client is gone
                continue
            fits = not batch or one.kind == batch[0].kind
            (batch if fits and one.slot not in slots else later).append(one)
            slots.add(one.slot)  # what comes later in a slot may not overtake
        self._waiting.extendleft(reversed(later))
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._call(batch)
        except PolicyFailed as error:
            if len(batch) > 1:
                for one in batch:
                    if not one.answer.done():  # its client may be gone, and its slot another's
                        await self._answer([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for one, answer in zip(batch, answers, strict=True):
            if one.answer.done():
                continue
            if np.isfinite(answer.actions).all():
                one.answer.set_result(answer)
            else:
                one.answer.set_exception(PolicyFailed("the policy answered with numbers that are not finite"))

    async def _call(self, batch: list[_Waiting]) -> list[Answer]:
        start = time.perf_counter()
        try:
            actions = await self._in_thread(self._actions, batch)
        except Exception as error:
            raise PolicyFailed(f"{type(error).__name__}: {error}") from error
        spent = (time.perf_counter() - start) * 1e3
        if actions.ndim != 3 or 0 in actions.shape or actions.shape[::2] != (len(batch), self.policy.spec.dim):
            wanted = f"({len(batch)}, H, {self.policy.spec.dim})"
            raise PolicyFailed(f"the policy answered with shape {actions.shape}, wanted {wanted}")
        waited = [(start - one.since) * 1e3 for one in batch]
        return [Answer(a, spent, w, len(batch)) for a, w in zip(actions, waited, strict=True)]

    def _actions(self, batch: list[_Waiting]) -> np.ndarray:
        """What the policy answers, float32 and not checked."""
        observations, slots = [one.observation for one in batch], [one.slot for one in batch]
        prefixes = [one.after.prefix for one in batch if one.after is not None]
        if not prefixes:
            chunk = self.policy.act(observations, slots)
        elif can_continue(self.policy) and batch[0].after is not None:
            chunk = self.policy.act_after(observations, slots, prefix=np.stack(prefixes), delay=batch[0].after.delay)
        else:
            raise ValueError("the policy cannot continue a chunk")
        return np.asarray(chunk.actions, dtype=np.float32)

    async def _in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
