"""A policy server in a process of its own under fuzzed messages, or under a steady load for long.

    python benchmarks/server_abuse.py --fuzz 10000 --out fuzz.json
    python benchmarks/server_abuse.py --soak 10 --clients 8 --rate 2 --out soak.json

`--fuzz` sends that many messages of nine kinds in random order and asks a good client every 100 of them; every message
must be answered, or its connection closed, within a minute. `--soak` samples the server's resident memory every
five seconds for that many minutes while each client asks `--rate` times a second.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from headrace.contracts import ActionChunk, ActionSpec, Observation
from headrace.robot.client import RemotePolicy
from headrace.robot.server import PolicyServer, ServerConfig
from headrace.robot.wire import pack, unpack

SPEC = ActionSpec(names=tuple("abcdefg"), frame="joint", rotation="none", gripper="none", rate=30.0)
PICTURE = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
KINDS = (
    "random bytes",
    "flipped bytes",
    "truncated",
    "huge declared sizes",
    "wrong dtypes and shapes",
    "deep nesting",
    "text",
    "killed connections",
    "slow readers",
)
PATIENCE = 60.0  # longest wait for an answer [s]
UNREAD = 100  # questions of one slow reader, whose answers of 140 kB fill every buffer on the way


class Adds:
    """Answers with the sum of the state, in a chunk of 16 rows, or of 5000 where the instruction is `long`."""

    spec = SPEC

    def reset(self, slot: int, *, seed: int) -> None:
        """Keeps nothing."""

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        rows = 5000 if any(one.instruction == "long" for one in observations) else 16
        sums = np.array([one.state.sum() for one in observations], np.float32)
        return ActionChunk(np.broadcast_to(sums[:, None, None], (len(slots), rows, 7)), 0.0)

    def act_after(self, observations: list[Observation], slots: list[int], *, prefix, delay: int) -> ActionChunk:
        return self.act(observations, slots)


async def serve() -> None:
    async with PolicyServer(Adds(), ServerConfig(port=0, send_timeout=1.0)) as server:
        print(f"ws://127.0.0.1:{server.port}", flush=True)
        await asyncio.Event().wait()


@contextlib.contextmanager
def server_process() -> Iterator[tuple[str, int]]:
    """A server's address and process id."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait(30)


def resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def metrics(url: str) -> str:
    return urllib.request.urlopen(url.replace("ws:", "http:") + "/metrics", timeout=PATIENCE).read().decode()


def good_message() -> bytes:
    return pack({"images": {"cam": PICTURE[:16, :16]}, "state": np.ones(7, np.float32), "prompt": "go"})


def fuzzed(kind: str, rng: np.random.Generator) -> bytes | str:
    """One message of a kind that travels as a whole message."""
    good = good_message()
    if kind == "random bytes":
        return rng.bytes(int(rng.integers(0, 2000)))
    if kind == "flipped bytes":
        body = bytearray(good)
        for position in rng.integers(0, 100, 4):
            body[position] = rng.integers(0, 256)
        return bytes(body)
    if kind == "truncated":
        return good[: int(rng.integers(0, len(good)))]
    if kind == "huge declared sizes":
        size = int(rng.integers(1 << 20, 1 << 32))
        shape = [int(n) for n in rng.integers(1 << 10, 1 << 31, int(rng.integers(1, 9)))]
        array = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": shape}
        headers = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")  # list, map, bytes, text, extension
        choice = int(rng.integers(len(headers) + 1))
        return pack({"state": array}) if choice == len(headers) else headers[choice] + struct.pack(">I", size) + b"\0"
    if kind == "wrong dtypes and shapes":
        dtype = str(rng.choice(["|O", "<c8", "<U4", ">f4", "<f8", "|u1", "<i8", "nonsense"]))
        shape = [int(n) for n in rng.integers(0, 9, int(rng.integers(0, 7)))]
        data = rng.bytes(int(np.prod(shape)) * 8 if rng.integers(2) else int(rng.integers(0, 99)))
        array = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
        asked = {"state": np.ones(7, np.float32), "prompt": "go"}
        return pack(
            (
                {"state": array},
                {"images": {"cam": array}},
                {**asked, "continue": {"prefix": array, "delay": int(rng.integers(-2, 5))}},
                {**asked, "slot": array},
                {**asked, "start": array},
                {"type": "observation", "payload": array, "seq": 1},
            )[int(rng.integers(6))]
        )
    if kind == "deep nesting":
        depth = int(rng.integers(5, 5000))
        deep = b"\x91" * depth + b"\xc0" if rng.integers(2) else b"\x81\xa1a" * depth + b"\xc0"
        return deep if rng.integers(2) else b"\x83\xa4type\xabobservation\xa7payload\x80\xa3seq" + deep
    return "".join(chr(int(n)) for n in rng.integers(32, 0xD000, int(rng.integers(0, 200))))


def raw_connection(url: str) -> socket.socket:
    """A connection that asked to be a websocket, with small buffers."""
    host, port = url.removeprefix("ws://").split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(PATIENCE)
    raw.connect((host, int(port)))
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return raw


def frame(body: bytes) -> bytes:
    """A short message as a client sends it, masked with zeros."""
    assert len(body) < 126
    return b"\x82" + bytes([0x80 | len(body)]) + b"\0\0\0\0" + body


def kill(url: str, rng: np.random.Generator) -> None:
    """Ask, and reset the connection without a goodbye; half of them in the middle of a frame of some claimed size."""
    raw = raw_connection(url)
    raw.recv(4096)
    unfinished = b"\x82\xff" + struct.pack(">Q", int(rng.integers(200, 1 << 60))) + b"\0" * 100
    raw.sendall(unfinished if rng.integers(2) else frame(pack({"state": np.ones(1, np.float32)})))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def slow_reader(url: str) -> socket.socket:
    """A connection on which `UNREAD` questions have been asked and no answer is ever read."""
    raw = raw_connection(url)
    with contextlib.suppress(OSError):  # cut off already
        for _ in range(UNREAD):
            raw.sendall(frame(pack({"state": np.ones(1, np.float32), "prompt": "long"})))
    return raw


def require_good_answer(url: str) -> None:
    with connect(url, compression=None) as client:
        client.recv(timeout=PATIENCE)
        client.send(good_message())
        actions = unpack(client.recv(timeout=PATIENCE))["actions"]
        if not (actions.shape[1] == 7 and (actions == 7).all()):
            raise RuntimeError(f"a good client got {actions}")


def fuzz(count: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    readers = count // 1000  # slow ones, of UNREAD messages each
    turns = [kind for kind in KINDS[:-1] for _ in range((count - readers * UNREAD) // len(KINDS[:-1]))]
    turns += ["random bytes"] * (count - readers * UNREAD - len(turns)) + ["slow readers"] * readers
    rng.shuffle(turns)
    sent: Counter[str] = Counter()
    fates: Counter[str] = Counter()
    begin = time.perf_counter()
    with server_process() as (url, process):
        require_good_answer(url)
        before, client, slow = resident_mib(process), None, []
        for turn, kind in enumerate(turns):
            sent[kind] += UNREAD if kind == "slow readers" else 1
            if kind == "killed connections":
                kill(url, rng)
            elif kind == "slow readers":
                slow.append(slow_reader(url))
            else:
                client = client or greeted(url)
                fate = ask(client, fuzzed(kind, rng))
                fates[fate] += 1
                client = None if fate == "closed" else client
            if turn % 100 == 99:
                require_good_answer(url)
        if client is not None:
            client.close()
        deadline = time.perf_counter() + 30
        while "headrace_clients 0" not in (page := metrics(url)) and time.perf_counter() < deadline:
            time.sleep(0.5)
        require_good_answer(url)
        for raw in slow:
            raw.close()
        return {
            "seed": seed,
            "messages": sum(sent.values()),
            "kinds": dict(sent),
            "fates": dict(fates),
            "server_errors": {kind: int(n) for kind, n in re.findall(r'errors_total{kind="(.*?)"} (\d+)', page)},
            "clients_left": int(re.search(r"headrace_clients (\d+)", page)[1]),
            "still_answers": True,
            "resident_mib_before_after": [round(before, 1), round(resident_mib(process), 1)],
            "seconds": round(time.perf_counter() - begin, 1),
        }


def greeted(url: str) -> ClientConnection:
    client = connect(url, compression=None).__enter__()  # websockets after 17 gives the connection itself only so
    client.recv(timeout=PATIENCE)
    return client


def ask(client: ClientConnection, message: bytes | str) -> str:
    """Send a message followed by a good one: some are rightly left without an answer, the good one never is."""
    mark = pack({"state": np.full(7, 2.0, np.float32), "slot": 1})
    fate = "no answer wanted"
    try:
        client.send(message)
        client.send(mark)
        for _ in range(2):
            answer = client.recv(timeout=PATIENCE)
            content = {} if isinstance(answer, str) else unpack(answer)
            if "actions" in content and (content["actions"] == 14).all():
                return fate
            fate = "answered" if "actions" in content else "refused"
    except ConnectionClosed:
        return "closed"
    raise RuntimeError("a good message got no answer")


def soak(minutes: float, clients: int, rate: float) -> dict:
    stop, latencies, samples = threading.Event(), [], []
    with server_process() as (url, process):
        threads = [threading.Thread(target=steady, args=(url, 1 / rate, stop, latencies)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(5.0)  # warm up
        begin, used = time.perf_counter(), processor_seconds(process) + time.process_time()
        while (now := time.perf_counter() - begin) < minutes * 60:
            samples.append((now, resident_mib(process)))
            time.sleep(5.0)
        used = processor_seconds(process) + time.process_time() - used
        stop.set()
        for thread in threads:
            thread.join()
    moments, resident = np.array(samples).T
    third = max(len(resident) // 3, 1)
    return {
        "minutes": minutes,
        "clients": clients,
        "rate_per_client": rate,
        "answers": len(latencies),
        "p50_ms": round(float(np.quantile(latencies, 0.5)) * 1e3, 1),
        "p99_ms": round(float(np.quantile(latencies, 0.99)) * 1e3, 1),
        "samples": len(resident),
        "resident_mib_first_third": round(float(np.median(resident[:third])), 2),
        "resident_mib_last_third": round(float(np.median(resident[-third:])), 2),
        "resident_mib_max": round(float(resident.max()), 2),
        "slope_mib_per_hour": round(float(np.polyfit(moments, resident, 1)[0]) * 3600, 2),
        "cores_used_by_server_and_clients": round(used / (time.perf_counter() - begin), 3),
    }


def steady(url: str, period: float, stop: threading.Event, latencies: list[float]) -> None:
    policy = RemotePolicy(url)
    policy.reset(0, seed=0)
    look = Observation(images={"cam": PICTURE}, state=np.ones(7, np.float32))
    while not stop.wait(period):
        start = time.perf_counter()
        policy.act([look], [0])
        latencies.append(time.perf_counter() - start)
    policy.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fuzz", type=int, metavar="MESSAGES")
    what.add_argument("--soak", type=float, metavar="MINUTES")
    what.add_argument("--serve", action="store_true", help="the server alone, as the other two start it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2.0, help="questions per second of each client of a soak")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    result = fuzz(args.fuzz, args.seed) if args.fuzz else soak(args.soak, args.clients, args.rate)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
