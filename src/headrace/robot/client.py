"""A policy that runs elsewhere: `ws://host:port` as a `headrace.contracts.Policy`. numpy and websockets, no torch."""

import time
from typing import Any

import numpy as np
from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect

from headrace.contracts import ActionChunk, ActionSpec, EpisodesLost, Needs, Observation, SpecMismatch
from headrace.robot.wire import Limits, WireError, pack, unpack


class ServerUnreachable(ConnectionError):
    """Nothing answers at the address, or it is no policy server."""


class ConnectionLost(EpisodesLost):
    """The server went away during episodes, which are lost: it remembers their history. `reset` connects again."""


class ServerRefused(RuntimeError):
    """The server answered with an error; the connection stays open."""


class RemotePolicy:
    """Policy behind a websocket server of this project or of openpi.

    All observations of one `act` are sent before the first answer is awaited, so the server can batch them.

    Args:
        url: `ws://host:port` or `wss://host:port`.
        token: Sent as `Authorization: Api-Key TOKEN`.
        timeout: Longest wait for one answer, and for the connection [s].
        patience: How long a lost server is looked for before `reset` gives up, for one that is started again [s].
        spec: Action convention, for a server that does not tell its own (openpi's does not).
        extra: Entries added to each observation's message.

    Raises:
        ServerUnreachable: Nobody there, wrong token, or no policy server.
        ValueError: `url` is no websocket address, or the server tells no action convention and none is given.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 60.0,
        patience: float = 60.0,
        spec: ActionSpec | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(f"a policy server's address starts with ws:// or wss://, got {url!r}")
        self.url, self.timeout, self.patience = url, timeout, patience
        self._token, self._extra = token, extra or {}
        self._limits = Limits(message_bytes=256 << 20, array_bytes=128 << 20)
        self._starts: dict[int, int] = {}
        self._running: set[int] = set()  # slots that this connection has seen
        self._lost: set[int] = set()
        self._connection: ClientConnection | None = None
        self.metadata: dict[str, Any] = {}
        self._connect()
        told = self.metadata.get("action_spec")
        if spec is None and told is None:
            self.close()
            raise ValueError(f"{url} does not tell its action convention; pass spec=ActionSpec(...)")
        try:
            self.spec = spec if spec is not None else ActionSpec.from_dict(dict(told or {}))
        except (TypeError, ValueError) as error:
            self.close()
            raise ValueError(f"{url} tells no valid action convention: {error}") from error

    @property
    def look_back(self) -> int:
        """Control steps before the present whose pictures the server wants too."""
        told = self.metadata.get("look_back", 0)
        return told if isinstance(told, int) and told > 0 else 0

    @property
    def needs(self) -> Needs:
        """What the server says that its policy must see; anything, for one that does not say."""
        told = self.metadata.get("needs")
        return Needs.from_dict(told) if isinstance(told, dict) else Needs()

    @property
    def continues(self) -> bool:
        """Whether the server's policy can continue a chunk that is being executed, as `act_after` asks it to."""
        return self.metadata.get("continues") is True

    def _connect(self) -> None:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        connection: ClientConnection | None = None
        try:
            connection = connect(
                self.url,
                compression=None,
                max_size=self._limits.message_bytes,
                additional_headers=headers,
                open_timeout=self.timeout,
                ping_timeout=None,  # a policy may think for longer than a ping waits
            ).__enter__()  # websockets after 17 gives the connection itself only so
            greeting = unpack(connection.recv(timeout=self.timeout, decode=False), self._limits)
            if not isinstance(greeting, dict):
                raise WireError(f"it greets with {type(greeting).__name__}, not with a policy's metadata")
        except InvalidHandshake as error:
            raise ServerUnreachable(f"{self.url} turned us away: {error}; is the token right?") from error
        except (OSError, TimeoutError, WebSocketException, WireError, TypeError) as error:
            if connection is not None:
                connection.close()
            raise ServerUnreachable(f"no policy server at {self.url}: {type(error).__name__}: {error}") from error
        self._connection, self.metadata = connection, greeting

    def reset(self, slot: int, *, seed: int) -> None:
        """The next observation of `slot` starts an episode; connects again after a lost connection.

        Raises:
            ServerUnreachable: The server did not come back within `patience`.
            SpecMismatch: It came back with another policy.
        """
        if self._connection is None:
            self._reconnect()
        self._lost.discard(slot)
        self._starts[slot] = seed

    def _reconnect(self) -> None:
        end, before = time.monotonic() + self.patience, self.metadata
        while True:
            try:
                self._connect()
                break
            except ServerUnreachable:
                if time.monotonic() >= end:
                    raise
                time.sleep(min(1.0, self.patience))
        fixed = ("action_spec", "needs", "look_back", "checkpoint", "settings")
        other = [key for key in fixed if self.metadata.get(key) != before.get(key)]
        if other:
            self.close()
            self.metadata = before
            raise SpecMismatch(
                f"{self.url} came back with another policy: it differs in {', '.join(other)}. Serve the old one again, "
                "or start anew"
            )

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """Actions for each observation.

        Raises:
            ConnectionLost: The server went away, or did not answer in time, now or since these episodes began.
            ServerRefused: It answered with an error.
        """
        return self._ask(observations, slots, [{}] * len(slots))

    def act_after(
        self, observations: list[Observation], slots: list[int], *, prefix: np.ndarray, delay: int
    ) -> ActionChunk:
        """Chunks that continue `prefix`, (B, P, A) or (P, A), of which `delay` rows are executed in any case.

        Raises:
            ConnectionLost: As `act`.
            ServerRefused: As `act`, or the server's policy cannot continue a chunk.
            ValueError: The prefix has another shape.
        """
        if not self.continues:
            raise ServerRefused(f"{self.url} serves a policy that cannot continue a chunk being executed; use act")
        rows = np.asarray(prefix, np.float32)
        if rows.ndim not in (2, 3) or rows.shape[-1] != self.spec.dim or (rows.ndim == 3 and len(rows) != len(slots)):
            wanted = f"(P, {self.spec.dim}) or ({len(slots)}, P, {self.spec.dim})"
            raise ValueError(f"the rows being executed must have shape {wanted}, got {rows.shape}")
        rows = np.broadcast_to(rows, (len(slots), *rows.shape[-2:]))
        return self._ask(observations, slots, [{"continue": {"prefix": one, "delay": int(delay)}} for one in rows])

    def _ask(self, observations: list[Observation], slots: list[int], more: list[dict[str, Any]]) -> ActionChunk:
        """Send each observation with `more` entries, and await the answers."""
        lost = frozenset(slots if self._connection is None else self._lost & set(slots))
        if lost or self._connection is None:
            raise ConnectionLost(f"the connection to {self.url} was lost in this episode; call reset first", lost)
        start = time.perf_counter()
        messages = [  # all before the first is sent: of one that cannot be packed no answer may be on its way
            pack(self._message(observation, slot) | entries)
            for observation, slot, entries in zip(observations, slots, more, strict=True)
        ]
        self._running.update(slots)
        try:
            for message in messages:
                self._connection.send(message)
            answers = [self._connection.recv(timeout=self.timeout) for _ in slots]
        except (OSError, TimeoutError, WebSocketException) as error:
            self._lose()
            text = f"lost {self.url} during an episode: {type(error).__name__}: {error}"
            raise ConnectionLost(text, frozenset(slots)) from error
        except BaseException:  # Ctrl-C: an answer left unread would be taken for that of the next question
            self._lose()
            raise
        actions = np.stack([self._actions(answer) for answer in answers])
        for slot in slots:
            self._starts.pop(slot, None)
        return ActionChunk(actions, (time.perf_counter() - start) * 1e3)

    def _lose(self) -> None:
        self.close()
        self._lost |= self._running
        self._running.clear()

    def _message(self, observation: Observation, slot: int) -> dict[str, Any]:
        message = {
            "images": observation.images,
            "state": np.asarray(observation.state, dtype=np.float32),
            "prompt": observation.instruction,
            "slot": slot,
            **self._extra,
        }
        if observation.past:
            message["past"] = {str(step): images for step, images in enumerate(observation.past, 1)}
        if slot in self._starts:
            message["start"] = self._starts[slot]
        return message

    def _actions(self, answer: bytes | str) -> np.ndarray:
        if isinstance(answer, str):
            raise ServerRefused(f"{self.url}: {answer[:500]}")
        content = unpack(answer, self._limits)
        actions = content.get("actions") if isinstance(content, dict) else None
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != self.spec.dim:
            shape = getattr(actions, "shape", type(actions).__name__)
            raise ServerRefused(f"{self.url} answered with actions {shape}, wanted (H, {self.spec.dim})")
        if not np.isfinite(actions).all():
            raise ServerRefused(f"{self.url} answered with actions that are not finite")
        return actions.astype(np.float32)

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
