"""Serve a policy over websockets in openpi's protocol, so that `openpi_client` works unchanged; vla-eval's client too.

On connecting a client gets the server's metadata; then each observation it sends is answered by
`{"actions": (H, A), ...}`, or by a text message that says what was wrong. Source of the protocol: openpi_client 0.1.2
(websocket_client_policy.py) and vla_eval 0.8 (protocol/messages.py); the metadata is at the same time a valid greeting
of the latter.
"""

import asyncio
import contextlib
import errno
import hmac
import http
import ipaddress
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from headrace.contracts import Policy, SpecMismatch, can_continue, look_back, needs_of
from headrace.robot.batching import Answer, Batcher, PolicyFailed
from headrace.robot.server_metrics import ServerMetrics
from headrace.robot.wire import Continuation, Limits, WireError, observation_from, pack, split_continuation, unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a policy is served.

    Attributes:
        host: Address to listen on; anything but loopback needs a token.
        port: 0 takes a free one.
        token: Clients must send `Authorization: Api-Key TOKEN` (as `openpi_client` does) or `Bearer TOKEN`.
        name: What the server says it serves.
        checkpoint: Fingerprint of what it serves, told to clients; empty if unknown.
        settings: What it samples with, told to clients, so that a run does not mix two servers' answers.
        max_batch, wait: See `Batcher`; `wait` in seconds.
        max_slots: Parallel episodes of one connection, and its messages in flight.
        max_pending: Size of one connection's messages in flight, together [bytes]; more are not read until earlier ones
            are answered. One message is always read, whatever its size.
        max_clients: Connections at a time; more are turned away with status 503.
        max_bad: Malformed messages after which a connection is closed.
        send_timeout: A client that does not take its answer for so long is cut off [s].
        limits: What a message may hold.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    name: str = "policy"
    checkpoint: str = ""
    settings: dict[str, str | int | float] = field(default_factory=dict)
    max_batch: int = 16
    wait: float = 0.004
    max_slots: int = 64
    max_pending: int = 64 << 20
    max_clients: int = 64
    max_bad: int = 1000
    send_timeout: float = 10.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in 0..65535, got {self.port}")
        if not self.token and not is_loopback(self.host):
            raise ValueError(
                f"serving on {self.host} opens the policy to the network: give a token, or listen on 127.0.0.1 and "
                "forward the port over ssh"
            )
        counts = (self.max_batch, self.max_slots, self.max_pending, self.max_clients, self.max_bad)
        if min(counts) < 1 or self.send_timeout <= 0:
            raise ValueError("max_batch, max_slots, max_pending, max_clients, max_bad and send_timeout must be above 0")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class PolicyServer:
    """A running server; `async with` it, or use `background` from code that is not asynchronous.

    Attributes:
        port: The port it listens on, once started.
        metrics: Its counters.
    """

    def __init__(self, policy: Policy, config: ServerConfig) -> None:
        self.policy, self.config = policy, config
        self.metrics = ServerMetrics()
        self.port = config.port
        self._free = list(range(config.max_clients * config.max_slots))  # slots of the policy, lowest first

    async def __aenter__(self) -> "PolicyServer":
        config = self.config
        self._batcher = Batcher(self.policy, max_batch=config.max_batch, wait=config.wait)
        self._worker = asyncio.create_task(self._batcher.run())
        try:
            self._server = await serve(
                self._connected,
                config.host,
                config.port,
                process_request=self._http,
                compression=None,
                origins=[None],  # no browser page may talk to a robot's policy
                max_size=config.limits.message_bytes,
                max_queue=2,
                write_limit=1 << 20,
                ping_interval=20,
                ping_timeout=60,
            )
        except OSError as error:
            self._worker.cancel()
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"port {config.port} on {config.host} is taken, perhaps by another server; choose another --port"
                ) from error
            raise
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    def metadata(self) -> dict[str, Any]:
        """What a client is told first: the policy's action convention, what it must see, and this server's limits."""
        spec = self.policy.spec.to_dict()
        return {
            "server": "headrace",
            "policy": self.config.name,
            "checkpoint": self.config.checkpoint,
            "settings": self.config.settings,
            "action_spec": spec,
            "look_back": look_back(self.policy),
            "needs": needs_of(self.policy).to_dict(),
            "continues": can_continue(self.policy),
            "max_slots": self.config.max_slots,
            "type": "hello",
            "payload": {"harness_version": "headrace", "protocol_version": 1, "model_server": self.config.name},
            "seq": 0,
            "timestamp": time.time(),
        }

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Plain requests, and who may connect."""
        path = request.path.split("?")[0]
        if path == "/healthz":
            alive = not self._worker.done()
            status = http.HTTPStatus.OK if alive else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ok\n" if alive else "the policy's worker has stopped\n")
        if not self._may_enter(request):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Api-Key TOKEN\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.text())
        if self.metrics.clients >= self.config.max_clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    def _may_enter(self, request: Request) -> bool:
        if not self.config.token:
            return True
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        return kind in ("Api-Key", "Bearer") and hmac.compare_digest(given.encode(), self.config.token.encode())

    async def _connected(self, connection: ServerConnection) -> None:
        if self.metrics.clients >= self.config.max_clients:  # several can have passed `_http` at the same time
            await connection.close(1013, "too many clients")
            return
        self.metrics.clients += 1
        session = _Session(self)
        answers: asyncio.Queue[asyncio.Task] = asyncio.Queue(self.config.max_slots)
        writer = asyncio.create_task(self._write(connection, answers))
        pending = _Pending(self.config.max_pending)
        try:
            await connection.send(pack(self.metadata()))
            async for message in connection:
                task = asyncio.create_task(session.answer(message))
                await answers.put(task)
                await pending.add(task, len(message))
                if session.bad > self.config.max_bad:
                    await connection.close(1008, "too many malformed messages")
                    break
        except ConnectionClosed:
            log.info("a client went away without closing")
        finally:
            writer.cancel()
            while not answers.empty():
                answers.get_nowait().cancel()
            session.close()
            self.metrics.clients -= 1

    async def _write(self, connection: ServerConnection, answers: asyncio.Queue[asyncio.Task]) -> None:
        """Send answers in the order of the questions; cut off a client that does not read them.

        After the connection is gone, answers are still taken off the queue, so that the reader never waits for room.
        """
        gone = False
        while True:
            task = await answers.get()
            if gone:
                task.cancel()
                continue
            try:
                answer = await task
                if answer is not None:
                    await asyncio.wait_for(connection.send(answer), self.config.send_timeout)
            except TimeoutError:
                self.metrics.failed("slow reader")
                connection.transport.abort()
                gone = True
            except ConnectionClosed:
                gone = True
            except Exception:
                self.metrics.failed("internal")
                log.exception("an answer was lost; its client is cut off")
                connection.transport.abort()
                gone = True


class _Pending:
    """Messages of one connection that are not answered yet, by their size."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._answered = asyncio.Event()

    async def add(self, task: asyncio.Task, size: int) -> None:
        """Count a message until `task` has answered it; returns when there is room for another one."""
        self.size += size
        task.add_done_callback(lambda _: self._done(size))
        while self.size > self.limit:
            self._answered.clear()
            await self._answered.wait()

    def _done(self, size: int) -> None:
        self.size -= size
        self._answered.set()


class _Session:
    """One connection: its slots, and vla-eval's chunk if it speaks that protocol."""

    def __init__(self, server: PolicyServer) -> None:
        self.server, self.bad = server, 0
        self.slots: dict[int, int] = {}
        self.pending: list[np.ndarray] = []  # actions that a vla-eval client has still to be given, last first

    def close(self) -> None:
        """Give the slots back."""
        for slot in self.slots.values():
            self.server._batcher.forget(slot)
            self.server._free.append(slot)
        self.server._free.sort()
        self.slots.clear()

    async def answer(self, message: bytes | str) -> bytes | str | None:
        """The reply to one message; None where the protocol wants none."""
        start, metrics = time.perf_counter(), self.server.metrics
        harness = None
        try:
            if isinstance(message, str):
                raise WireError("observations are binary messages (msgpack), got text")
            content = unpack(message, self.server.config.limits)
            if isinstance(content, dict) and {"type", "payload", "seq"} <= set(content):
                if not isinstance(content["seq"], int):  # it is sent back, so it must be something that can be
                    raise WireError(f"seq must be a whole number, got {type(content['seq']).__name__}")
                harness = content
                return await self._harness(content, start)
            content, after = self._continuation(content)
            return pack(self._reply(await self._infer(content, content, after), start))
        except WireError as error:
            self.bad += 1
            metrics.failed("malformed")
            return _refusal(harness, str(error))
        except PolicyFailed as error:
            metrics.failed("policy")
            log.warning("the policy failed on an observation: %s", error)
            return _refusal(harness, f"the policy failed: {error}")
        except Exception:
            metrics.failed("internal")
            log.exception("answering a message failed")
            return _refusal(harness, "the server failed on this message; its log says why")

    def _continuation(self, content: Any) -> tuple[Any, Continuation | None]:
        """An openpi message without what it says about the chunk being executed, and that."""
        policy = self.server.policy
        if isinstance(content, dict) and "continue" in content and not can_continue(policy):
            raise PolicyFailed("it cannot continue a chunk that is being executed; ask without `continue`")
        return split_continuation(content, policy.spec.dim)

    async def _infer(self, content: Any, control: Any, after: Continuation | None = None) -> Answer:
        """Answer an observation; `control` may name its `slot` and say that an episode `start`s with a seed."""
        observation = observation_from(content)
        given, start = control.get("slot", 0), control.get("start")
        if not isinstance(given, int) or not (start is None or isinstance(start, int)):
            raise WireError("slot must be a whole number, start the seed of the episode that begins here, or absent")
        new = given not in self.slots
        slot = self._slot(given)
        if new or start is not None:
            await self.server._batcher.reset(slot, abs(start or 0) % 2**63)
        try:  # here, not in the shared call, which would fail for others too
            needs_of(self.server.policy).require_shown(observation)
        except SpecMismatch as error:
            raise PolicyFailed(str(error)) from error
        return await self.server._batcher.act(observation, slot, after)

    def _slot(self, given: int) -> int:
        if given not in self.slots:
            if len(self.slots) >= self.server.config.max_slots:
                raise WireError(f"at most {self.server.config.max_slots} slots per connection")
            self.slots[given] = self.server._free.pop(0)
        return self.slots[given]

    def _reply(self, answer: Answer, start: float) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        self.server.metrics.answered(seconds, answer.batch)
        return {
            "actions": answer.actions,
            "policy_timing": {"infer_ms": answer.infer_ms, "batch": answer.batch},
            "server_timing": {"infer_ms": seconds * 1e3, "queue_ms": answer.queue_ms},
        }

    async def _harness(self, content: dict[str, Any], start: float) -> bytes | None:
        """A message of vla-eval, whose client is given one action at a time."""
        kind, payload = content["type"], content["payload"]
        if kind == "episode_start":
            self.pending = []
            await self.server._batcher.reset(self._slot(0), 0)
        if kind != "observation":
            return None
        if not self.pending:
            answer = await self._infer(payload, {"slot": 0})
            self._reply(answer, start)
            self.pending = list(answer.actions[::-1])
        return _harness_message("action", {"actions": self.pending.pop()}, content["seq"])


def _refusal(harness: dict[str, Any] | None, why: str) -> bytes | str:
    return why if harness is None else _harness_message("error", {"error": why}, harness["seq"])


def _harness_message(kind: str, payload: dict[str, Any], seq: Any) -> bytes:
    import msgpack

    def plain(array: np.ndarray) -> dict[str, Any]:
        return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}

    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}, default=plain)


@contextlib.contextmanager
def background(policy: Policy, config: ServerConfig) -> Iterator[PolicyServer]:
    """Serve from a thread for as long as the `with` block lasts.

    Raises:
        ValueError: The port is taken.
    """
    server, ready, failure = PolicyServer(policy, config), threading.Event(), []
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        async with server:
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(main())
        except Exception as error:
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="policy server", daemon=True)
    thread.start()
    ready.wait()
    if failure:
        raise failure[0]
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
