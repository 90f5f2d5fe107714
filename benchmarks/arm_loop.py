"""Does the control loop keep its rate while the policy thinks? A mock arm, a slow policy whose plans disagree.

    python benchmarks/arm_loop.py --seconds 300 --think 0.3 --out arm_loop.json

The policy is a thread that really waits (`--busy` makes it compute instead) and answers with chunks of a moving target,
each off by its own error, so that every take-over is a seam.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from headrace.contracts import ActionChunk, ActionSpec
from headrace.robot.arm import MockArm
from headrace.robot.drive import DriveConfig, drive
from headrace.robot.safety import SafetyLimits

JOINTS = MockArm().joints


class SlowWave:
    """Plans a sine; takes `think` seconds for it; each plan is off by up to `error` units."""

    def __init__(self, think: float, error: float, busy: bool) -> None:
        self.spec = ActionSpec(names=JOINTS, frame="joint", rotation="none", gripper="open_is_1", rate=30.0)
        self.think, self.error, self.busy = think, error, busy
        self.rng, self.begin = np.random.default_rng(0), 0.0

    def reset(self, slot: int, *, seed: int) -> None:
        self.begin = time.perf_counter()

    def act(self, observations, slots) -> ActionChunk:
        now = time.perf_counter()
        matrix = self.rng.normal(size=(256, 256)) if self.busy else None
        while (left := now + self.think - time.perf_counter()) > 0:
            if self.busy:
                matrix = np.tanh(matrix @ matrix / 16)
            else:
                time.sleep(left)
        times = now - self.begin + np.arange(50) / 30
        plan = 30 * (1 - np.cos(1.2 * times)) + self.rng.uniform(-self.error, self.error)
        return ActionChunk(np.repeat(plan[None, :, None], len(JOINTS), axis=2), self.think * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument("--think", type=float, default=0.3)
    parser.add_argument("--error", type=float, default=2.0)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count = len(JOINTS)
    limits = SafetyLimits(
        joints=JOINTS,
        low=(-100.0,) * count,
        high=(100.0,) * count,
        speed=(120.0,) * count,
        acceleration=(2000.0,) * count,
    )
    policy = SlowWave(args.think, args.error, args.busy)
    report = drive(MockArm(), policy, limits, DriveConfig(rate=args.rate, seconds=args.seconds, realtime=args.realtime))
    late = np.array([tick.late for tick in report.ticks])
    gaps = np.diff([tick.time for tick in report.ticks])
    at_seam, within = report.seams()
    result = {
        "reason": report.reason,
        "ticks": len(report.ticks),
        "expected": round(args.seconds * args.rate),
        "missed": report.missed,
        "latest_ms": round(float(late.max()) * 1e3, 2),
        "period_p50_ms": round(float(np.median(gaps)) * 1e3, 3),
        "period_p99_ms": round(float(np.quantile(gaps, 0.99)) * 1e3, 3),
        "period_max_ms": round(float(gaps.max()) * 1e3, 3),
        "held": report.held,
        "chunks": len(report.thinking),
        "think_p50_ms": round(float(np.median(report.thinking)) * 1e3, 1),
        "think_max_ms": round(max(report.thinking) * 1e3, 1),
        "largest_seam_step": round(at_seam, 3),
        "largest_step_within": round(within, 3),
        "seam_ratio": round(at_seam / within, 3),
        "load_average": os.getloadavg()[0],
        "nice": os.nice(0),
        "busy": args.busy,
        "realtime": args.realtime,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
