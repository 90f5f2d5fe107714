"""The policy server: openpi's and vla-eval's clients, batching, and everything a bad client can do to it."""

import asyncio
import json
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from headrace.contracts import ActionChunk, ActionSpec, Needs, Observation, can_continue
from headrace.robot.batching import Batcher
from headrace.robot.client import RemotePolicy, ServerRefused
from headrace.robot.server import ServerConfig, _Pending, background
from headrace.robot.wire import Limits, pack, unpack

SPEC = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=5.0)
PICTURE = np.zeros((16, 16, 3), np.uint8)


class Echo:
    """Answers with the observation's own state and the calls since the slot's reset; one call costs `seconds`."""

    spec = SPEC

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.batches, self.seeds, self.steps = seconds, [], {}, {}

    def reset(self, slot, *, seed):
        self.seeds[slot], self.steps[slot] = seed, 0

    def act(self, observations, slots):
        self.batches.append(len(slots))
        assert len(set(slots)) == len(slots)
        time.sleep(self.seconds)
        rows = []
        for observation, slot in zip(observations, slots, strict=True):
            if observation.instruction == "fail":
                raise ValueError("asked to fail")
            self.steps[slot] += 1
            value = np.nan if observation.instruction == "nan" else float(observation.state[0])
            rows.append([[value, self.steps[slot], 1.0]] * 4)
        return ActionChunk(np.array(rows, np.float32), 0.0)


def observation(value: float, instruction: str = "") -> Observation:
    return Observation(images={"cam": PICTURE}, state=np.array([value], np.float32), instruction=instruction)


class Primed(Echo):
    """Answers in the second number with the mean of the chunk it continues, in the third with the delay."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(seconds)
        self.calls = []

    def act(self, observations, slots):
        self.calls.append((len(slots), None, None))
        return super().act(observations, slots)

    def act_after(self, observations, slots, *, prefix, delay):
        self.calls.append((len(slots), prefix.shape[1], delay))
        chunk = super().act(observations, slots)
        chunk.actions[..., 1] = prefix.mean((1, 2))[:, None]
        chunk.actions[..., 2] = delay
        return chunk


@pytest.fixture
def served():
    policy = Echo()
    with background(policy, ServerConfig(port=0, wait=0.02)) as server:
        yield policy, server, f"ws://127.0.0.1:{server.port}"


def fetch(url, **headers):
    return (
        urllib.request.urlopen(urllib.request.Request(url.replace("ws", "http"), headers=headers), timeout=5)
        .read()
        .decode()
    )


def still_serves(url):
    client = RemotePolicy(url)
    client.reset(0, seed=1)
    assert client.act([observation(5.0)], [0]).actions[0, 0, 0] == 5.0
    client.close()
    return True


def test_openpis_own_client_works_unchanged(served):
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    _, server, _ = served
    client = openpi.WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata()["action_spec"]["names"] == ["x", "y", "gripper"]
    for step in (1, 2):
        message = {"observation/image": PICTURE, "observation/state": np.array([3.0]), "prompt": "go"}
        answer = client.infer(message)
        np.testing.assert_array_equal(answer["actions"], [[3.0, step, 1.0]] * 4)
        assert answer["actions"].dtype == np.float32 and answer["server_timing"]["infer_ms"] > 0


def test_vla_evals_client_gets_one_action_at_a_time(served):
    vla_eval = pytest.importorskip("vla_eval.connection")
    policy, _, url = served

    async def play():
        async with vla_eval.Connection(url) as connection:
            await connection.start_episode({"task": {"name": "t"}})
            seen = []
            for value in range(8):
                message = {"images": {"primary": PICTURE}, "task_description": "go", "states": np.array([value])}
                seen.append((await connection.act(message))["actions"])
            with pytest.raises(RuntimeError, match="uint8"):
                await connection.act({"images": {"a": np.zeros((9, 9, 3), np.float32)}})
            return np.stack(seen)

    actions = asyncio.run(play())
    np.testing.assert_array_equal(
        actions[:, 0], [0, 0, 0, 0, 4, 4, 4, 4]
    )  # a chunk of 4 is played before the next is asked
    assert actions.shape == (8, 3) and len(policy.batches) == 2


def test_parallel_clients_share_calls_and_get_their_own_answers():
    policy = Echo(seconds=0.03)
    with background(policy, ServerConfig(port=0, wait=0.1)) as server:
        answers = {}

        def play(number):
            client = RemotePolicy(f"ws://127.0.0.1:{server.port}")
            client.reset(0, seed=number)
            answers[number] = [client.act([observation(number)], [0]).actions[0, 0] for _ in range(10)]
            client.close()

        threads = [threading.Thread(target=play, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, rows in answers.items():
        np.testing.assert_array_equal([row[:2] for row in rows], [[number, step] for step in range(1, 11)])
    assert sum(policy.batches) == 60 and np.mean(policy.batches) > 3


def test_one_clients_slots_are_episodes_of_their_own(served):
    policy, _, url = served
    client = RemotePolicy(url)
    assert client.spec == SPEC
    for slot in (0, 7):
        client.reset(slot, seed=10 + slot)
    chunk = client.act([observation(1.0), observation(2.0)], [0, 7])
    np.testing.assert_array_equal(chunk.actions[:, 0, :2], [[1, 1], [2, 1]])
    client.reset(7, seed=99)
    np.testing.assert_array_equal(client.act([observation(1.0), observation(2.0)], [0, 7]).actions[:, 0, 1], [2, 1])
    assert sorted(policy.seeds.values()) == [10, 99]


def test_slots_are_used_again_so_the_policys_memory_does_not_grow(served):
    policy, _, url = served
    for _ in range(5):
        assert still_serves(url)
        time.sleep(0.05)
    assert set(policy.seeds) == {0}


@pytest.mark.parametrize(("instruction", "why"), [("fail", "asked to fail"), ("nan", "not finite")])
def test_a_bad_observation_fails_alone(served, instruction, why):
    url = served[2]
    good, bad = connect(url, compression=None), connect(url, compression=None)
    for socket_ in (good, bad):
        socket_.recv()
    bad.send(pack({"state": np.ones(1), "prompt": instruction}))
    good.send(pack({"state": np.full(1, 4.0)}))
    assert why in bad.recv(timeout=5)
    assert unpack(good.recv(timeout=5))["actions"][0, 0] == 4.0
    bad.send(pack({"state": np.ones(1)}))
    assert unpack(bad.recv(timeout=5))["actions"][0, 0] == 1.0


def test_an_observation_that_lacks_what_the_policy_needs_never_reaches_it():
    policy = Echo()
    policy.needs = Needs(cameras=("cam",), state_names=("x",))
    with background(policy, ServerConfig(port=0, wait=0.5)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        good, bad = RemotePolicy(url), RemotePolicy(url)
        for client in (good, bad):
            client.reset(0, seed=0)
        for wrong, why in (
            (Observation(images={}, state=np.ones(1, np.float32)), "camera cam"),
            (Observation(images={"cam": PICTURE}, state=np.ones(2, np.float32)), "a state of 1 numbers"),
            (
                Observation(images={"cam": PICTURE}, state=np.ones(1, np.float32), past=({"eye": PICTURE},)),
                "camera cam",
            ),
        ):
            with pytest.raises(ServerRefused, match=why):
                bad.act([wrong], [0])
        assert policy.batches == [] and good.act([observation(3.0)], [0]).actions[0, 0, 1] == 1
        bad.act([observation(3.0)], [0])


def test_a_chunk_being_executed_goes_over_the_wire():
    with background(Primed(), ServerConfig(port=0)) as server:
        client = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        assert client.continues and can_continue(client)
        for slot in (0, 1):
            client.reset(slot, seed=slot)
        looks, prefix = [observation(1.0), observation(2.0)], np.stack([np.full((5, 3), 7.0), np.full((5, 3), 8.0)])
        both = client.act_after(looks, [0, 1], prefix=prefix, delay=2).actions
        np.testing.assert_array_equal(both[:, 0], [[1, 7, 2], [2, 8, 2]])
        shared = client.act_after(looks, [0, 1], prefix=prefix[0], delay=0).actions
        np.testing.assert_array_equal(shared[:, 0], [[1, 7, 0], [2, 7, 0]])
        with pytest.raises(ValueError, match=r"\(P, 3\) or \(2, P, 3\), got \(5, 2\)"):
            client.act_after(looks, [0, 1], prefix=np.zeros((5, 2)), delay=0)
        np.testing.assert_array_equal(client.act(looks, [0, 1]).actions[:, 0], [[1, 3, 1], [2, 3, 1]])


def test_primed_and_unprimed_observations_do_not_share_a_call_and_keep_their_order():
    policy = Primed(seconds=0.05)
    with background(policy, ServerConfig(port=0, wait=0.3)) as server:
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as client:
            client.recv()
            wanted = []
            for slot in range(8):
                message = {"state": np.full(1, float(slot)), "slot": slot}
                if slot % 4:
                    rows, delay = 2 + (slot % 4 == 3), slot % 4 % 3
                    message["continue"] = {"prefix": np.full((rows, 3), slot, np.float32), "delay": delay}
                wanted.append([slot, slot, delay] if slot % 4 else [slot, 1, 1])
                client.send(pack(message))
            got = [unpack(client.recv(timeout=5))["actions"][0].tolist() for _ in range(8)]
        assert got == wanted
    kinds = {(rows, delay) for _, rows, delay in policy.calls}
    assert kinds == {(None, None), (2, 1), (2, 2), (3, 0)} and len(policy.calls) < 8


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (3, "a map of prefix"),
        ({"prefix": np.zeros((2, 3))}, "a map of prefix"),
        ({"prefix": np.zeros((2, 3)), "delay": -1}, "0..1024, got -1"),
        ({"prefix": np.zeros((2, 3)), "delay": True}, "whole number"),
        ({"prefix": np.zeros((2, 3)), "delay": 1.0}, "whole number"),
        ({"prefix": np.zeros((2, 4)), "delay": 0}, r"3\), got \(2, 4\)"),
        ({"prefix": np.zeros(3), "delay": 0}, r"got \(3,\)"),
        ({"prefix": np.zeros((1025, 3)), "delay": 0}, r"got \(1025, 3\)"),
        ({"prefix": np.zeros((2, 3), np.int32), "delay": 0}, "floating-point numbers, got int32"),
        ({"prefix": [[0.0, 0.0, 0.0]], "delay": 0}, "floating-point numbers, got list"),
        ({"prefix": np.full((2, 3), np.nan), "delay": 0}, "finite"),
        ({"prefix": np.full((2, 3), 1e300), "delay": 0}, "finite"),
    ],
)
def test_a_malformed_prefix_is_refused_to_its_client_alone(told, why):
    policy = Primed()
    with background(policy, ServerConfig(port=0)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with connect(url, compression=None) as bad:
            bad.recv()
            bad.send(pack({"state": np.ones(1), "continue": told}))
            answer = bad.recv(timeout=5)
            assert isinstance(answer, str) and re.search(why, answer) and policy.calls == []
            assert still_serves(url)
            bad.send(pack({"state": np.ones(1)}))
            assert unpack(bad.recv(timeout=5))["actions"].shape == (4, 3)


def test_a_policy_that_cannot_continue_a_chunk_says_so(served):
    policy, server, url = served
    client = RemotePolicy(url)
    client.reset(0, seed=0)
    assert not can_continue(client) and server.metadata()["continues"] is False
    with pytest.raises(ServerRefused, match="cannot continue a chunk"):
        client.act_after([observation(1.0)], [0], prefix=np.zeros((2, 3)), delay=0)
    client.metadata["continues"] = True  # a client that does not care
    with pytest.raises(ServerRefused, match="ask without `continue`"):
        client.act_after([observation(1.0)], [0], prefix=np.zeros((2, 3)), delay=0)
    assert policy.batches == [] and client.act([observation(1.0)], [0]).actions.shape == (1, 4, 3)


def test_a_sequence_number_that_cannot_be_sent_back_is_refused_and_the_connection_goes_on(served):
    good = pack({"type": "observation", "payload": {"state": np.ones(1)}, "seq": 7})
    deep = b"\x91" * 800 + b"\x90"  # more than msgpack writes, less than it reads
    with connect(served[2], compression=None) as client:
        client.recv()
        client.send(good.replace(b"seq\x07", b"seq" + deep))
        assert "whole number" in client.recv(timeout=5)
        client.send(good)
        assert unpack(client.recv(timeout=5))["type"] == "action"


@pytest.mark.parametrize("chunk", [None, ActionChunk("nonsense", 0.0), ActionChunk(np.zeros((1, 0, 3)), 0.0)])
def test_whatever_a_policy_answers_the_server_goes_on(served, chunk):
    policy, _, url = served
    policy.act = lambda observations, slots: chunk
    client = RemotePolicy(url, timeout=5)
    client.reset(0, seed=0)
    with pytest.raises(ServerRefused, match="policy failed"):
        client.act([observation(1.0)], [0])
    del policy.act
    assert still_serves(url)


def test_an_observation_whose_client_went_during_a_failed_call_is_not_tried_again():
    async def play():
        policy, waits = Echo(), threading.Event()

        def act(observations, slots, original=policy.act):
            if len(slots) > 1:
                waits.wait(5)
                raise ValueError("one of them is bad")
            return original(observations, slots)

        policy.act = act
        batcher = Batcher(policy, wait=0.05)
        worker = asyncio.create_task(batcher.run())
        for slot in (0, 1):
            await batcher.reset(slot, 0)
        gone, stays = (asyncio.create_task(batcher.act(observation(1.0), slot)) for slot in (0, 1))
        await asyncio.sleep(0.2)
        gone.cancel()
        await asyncio.sleep(0)
        waits.set()
        await stays
        worker.cancel()
        return policy.steps

    assert asyncio.run(play()) == {0: 0, 1: 1}  # slot 0 may be another client's by then


def test_messages_beyond_what_may_wait_are_not_read_until_others_are_answered():
    async def fill():
        pending, slow = _Pending(100), asyncio.create_task(asyncio.sleep(0.05))
        await pending.add(slow, 90)
        second = asyncio.create_task(asyncio.sleep(10))
        await asyncio.wait_for(pending.add(second, 90), 5)  # waits for the first
        assert slow.done() and pending.size == 90
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pending.add(asyncio.create_task(asyncio.sleep(10)), 90), 0.05)

    asyncio.run(fill())
    with background(Echo(seconds=0.01), ServerConfig(port=0, max_pending=2000)) as server:
        client = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        for slot in range(12):
            client.reset(slot, seed=slot)
        chunk = client.act([observation(float(slot)) for slot in range(12)], list(range(12)))
        assert chunk.actions[:, 0, 0].tolist() == list(range(12))


def test_malformed_messages_are_answered_and_counted(served):
    _, server, url = served
    rng = np.random.default_rng(3)
    good = pack({"images": {"cam": PICTURE}, "state": np.ones(1, np.float32)})
    with connect(url, compression=None) as client:
        client.recv()
        for turn in range(400):
            message = bytearray(good)
            for position in rng.integers(0, 60, 4):
                message[position] = rng.integers(0, 256)
            client.send(rng.bytes(30) if turn % 3 else bytes(message))
            client.recv(timeout=5)
        client.send("text")
        assert "msgpack" in client.recv(timeout=5)
    assert server.metrics.errors["malformed"] > 200
    assert still_serves(url)


def test_too_many_bad_messages_end_the_connection_not_the_server():
    with background(Echo(), ServerConfig(port=0, max_bad=5)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with connect(url) as client, pytest.raises(WebSocketException):
            client.recv()
            for _ in range(200):
                client.send(b"bad")
                client.recv(timeout=5)
        assert still_serves(url)


def test_a_message_over_the_limit_is_cut_off_unread():
    with background(Echo(), ServerConfig(port=0, limits=Limits(message_bytes=10_000))) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with connect(url, compression=None) as client:
            client.recv()
            client.send(b"\0" * 50_000)
            with pytest.raises(WebSocketException):
                client.recv(timeout=5)
        assert still_serves(url)


def test_killed_clients_leave_it_serving():
    policy = Echo(seconds=0.05)
    with background(policy, ServerConfig(port=0)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        for _ in range(10):
            client = connect(url, compression=None)
            client.recv()
            for _ in range(3):
                client.send(pack({"state": np.ones(1)}))
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()  # a reset, not a goodbye
        assert still_serves(url)
        deadline = time.time() + 5
        while server.metrics.clients and time.time() < deadline:
            time.sleep(0.05)
        assert server.metrics.clients == 0
        assert len(server._free) == server.config.max_clients * server.config.max_slots


def test_a_reader_that_does_not_read_is_cut_off_and_holds_up_nobody():
    class Wordy(Echo):
        def act(self, observations, slots):
            return ActionChunk(np.zeros((len(slots), 100_000, 3), np.float32), 0.0)

    with background(Wordy(), ServerConfig(port=0, send_timeout=0.5)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            body = pack({"state": np.ones(1)})
            frame = b"\x82" + bytes([0x80 | len(body)]) + b"\0\0\0\0" + body  # masked with zeros
            for _ in range(20):
                raw.sendall(frame)
            client = RemotePolicy(url)
            client.reset(0, seed=0)
            assert client.act([observation(1.0)], [0]).actions.shape == (1, 100_000, 3)
            deadline = time.time() + 8
            while not server.metrics.errors["slow reader"] and time.time() < deadline:
                time.sleep(0.05)
        assert server.metrics.errors["slow reader"] == 1


def test_health_and_metrics(served):
    _, _, url = served
    assert fetch(f"{url}/healthz") == "ok\n"
    assert still_serves(url)
    page = fetch(f"{url}/metrics")
    assert "headrace_answers_total 1" in page and 'quantile="0.99"' in page


def test_off_loopback_a_token_is_needed():
    with pytest.raises(ValueError, match="token"):
        ServerConfig(host="0.0.0.0")
    with background(Echo(), ServerConfig(port=0, token="s3cret")) as server:
        url = f"ws://127.0.0.1:{server.port}"
        assert fetch(f"{url}/healthz") == "ok\n"
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Basic s3cret"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                fetch(f"{url}/metrics", **headers)
            with pytest.raises(WebSocketException):
                connect(url, additional_headers=headers)
        assert "headrace_clients" in fetch(f"{url}/metrics", Authorization="Bearer s3cret")
        client = RemotePolicy(url, token="s3cret")
        assert client.metadata["server"] == "headrace"


def test_a_browser_page_may_not_connect(served):
    with pytest.raises(WebSocketException):
        connect(served[2], origin="http://evil.example")


def test_more_clients_than_allowed_are_turned_away():
    with background(Echo(), ServerConfig(port=0, max_clients=1)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with connect(url) as first:
            first.recv()
            with pytest.raises(WebSocketException):
                connect(url)
            first.send(pack({"state": np.ones(1)}))
            assert unpack(first.recv(timeout=5))["actions"].shape == (4, 3)


def test_a_taken_port_is_named(served):
    with pytest.raises(ValueError, match="is taken"), background(Echo(), ServerConfig(port=served[1].port)):
        pass


def test_metadata_is_plain_data(served):
    assert json.dumps(served[1].metadata())


def test_configuration_is_checked():
    for bad in ({"port": 70_000}, {"max_batch": 0}, {"send_timeout": 0}):
        with pytest.raises(ValueError):
            ServerConfig(**bad)
