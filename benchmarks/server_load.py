"""Throughput and latency of the policy server with simulated clients, batched against one by one.

    python benchmarks/server_load.py --clients 8 --seconds 20 --out server_load.json

Each client is a thread that sends a 224 x 224 picture and a state, waits for its chunk and sends the next.
The policy is a transformer on the CPU (`--policy torch`) or a clock whose call costs
`--call` + `--each` * batch seconds (`--policy clock`), which is what a GPU policy looks like from outside.
Fuzzed messages and a long steady load: `server_abuse.py`.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import numpy as np

from headrace.contracts import ActionChunk, ActionSpec, Observation
from headrace.robot.client import RemotePolicy
from headrace.robot.server import ServerConfig, background

SPEC = ActionSpec(names=tuple("abcdefg"), frame="joint", rotation="none", gripper="none", rate=30.0)


class Clock:
    """Costs a fixed time per call and a little per observation."""

    spec = SPEC

    def __init__(self, call: float, each: float) -> None:
        self.call, self.each = call, each

    def reset(self, slot: int, *, seed: int) -> None:
        """Keeps nothing."""

    def act(self, observations, slots) -> ActionChunk:
        time.sleep(self.call + self.each * len(slots))
        return ActionChunk(np.zeros((len(slots), 16, 7), np.float32), 0.0)


class Network:
    """Eight transformer layers of width 512 over 64 tokens, random weights, one thread."""

    spec = SPEC

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 8).eval()
        self.into, self.out = torch.nn.Conv2d(3, 512, 28, 28), torch.nn.Linear(512, 7)

    def reset(self, slot: int, *, seed: int) -> None:
        """Keeps nothing."""

    def act(self, observations, slots) -> ActionChunk:
        import torch

        pictures = np.stack([next(iter(o.images.values())) for o in observations])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            x = self.into(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
            actions = self.out(self.body(x.flatten(2).mT))[:, :16]
        return ActionChunk(actions.float().numpy(), 0.0)


def client(url: str, stop: threading.Event, latencies: list[float]) -> None:
    policy = RemotePolicy(url)
    policy.reset(0, seed=0)
    rng = np.random.default_rng(0)
    look = Observation(
        images={"cam": rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)}, state=np.zeros(7, np.float32)
    )
    while not stop.is_set():
        start = time.perf_counter()
        policy.act([look], [0])
        latencies.append(time.perf_counter() - start)
    policy.close()


def measure(policy, clients: int, seconds: float, max_batch: int) -> dict[str, float]:
    stop, latencies = threading.Event(), []
    with background(policy, ServerConfig(port=0, max_batch=max_batch)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        threads = [threading.Thread(target=client, args=(url, stop, latencies)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(2.0)  # warm up
        latencies.clear()
        before, start = resident_mib(), time.perf_counter()
        time.sleep(seconds)
        count, passed, after = len(latencies), time.perf_counter() - start, resident_mib()
        stop.set()
        for thread in threads:
            thread.join()
        batch = server.metrics.counts["batched"] / max(server.metrics.counts["answers"], 1)
    q = np.quantile(latencies[:count], (0.5, 0.99)) * 1e3
    return {
        "answers_per_second": round(count / passed, 1),
        "p50_ms": round(float(q[0]), 1),
        "p99_ms": round(float(q[1]), 1),
        "mean_batch": round(batch, 2),
        "answers": count,
        "resident_growth_mib": round(after - before, 1),
    }


def resident_mib() -> float:
    """Memory of this process [MiB]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--policy", choices=("clock", "torch"), default="clock")
    parser.add_argument("--call", type=float, default=0.05)
    parser.add_argument("--each", type=float, default=0.002)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policy = Network() if args.policy == "torch" else Clock(args.call, args.each)
    one = measure(policy, args.clients, args.seconds, max_batch=1)
    many = measure(policy, args.clients, args.seconds, max_batch=16)
    result = {
        "policy": args.policy,
        "clients": args.clients,
        "one_by_one": one,
        "batched": many,
        "ratio": round(many["answers_per_second"] / one["answers_per_second"], 2),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
