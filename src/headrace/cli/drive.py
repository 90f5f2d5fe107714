"""`headrace drive`: run a policy on an arm, on the mock arm, or on a recorded episode without moving."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def drive(
    policy: Annotated[str, tyro.conf.Positional],
    /,
    *,
    robot: str = "mock",
    options: str = "{}",
    limits: Path | None = None,
    rehearse: Path | None = None,
    episode: int = 0,
    instruction: str = "",
    rate: float = 30.0,
    seconds: float = 30.0,
    execute: int = 8,
    stall: float = 5.0,
    gripper: Literal["open_is_1", "close_is_1", "none"] = "open_is_1",
    urdf: Path | None = None,
    end_link: str = "",
    solver_steps: int | None = None,
    out: Path | None = None,
    rerun: bool = False,
    realtime: bool = False,
) -> int:
    """Drive an arm at a fixed rate while the policy thinks in another thread; every command keeps the limits.

    Returns 1 when something stopped the run before its time.

    Args:
        policy: Checkpoint folder, hub id, or ws://host:port of a policy server.
        robot: LeRobot's name of the robot, such as so101_follower, or `mock`.
        options: JSON with the fields of the robot's configuration, such as '{"port": "/dev/ttyACM0", "id": "me"}'.
        limits: JSON file with range, speed and acceleration of each joint (docs/arms.md); needed for a real robot.
        rehearse: Folder of a LeRobot dataset: play its episode to the policy and move nothing.
        episode: Episode to rehearse.
        instruction: The task in words.
        rate: Control rate [Hz].
        seconds: Length of the run [s].
        execute: Actions of a chunk after which the next is asked for.
        stall: Longest time without a target before the run is stopped [s].
        gripper: Which end of the robot's gripper number is open.
        urdf: Description of the arm, for policies that move the gripper in space.
        end_link: Link of the URDF that these policies move.
        solver_steps: Equal solver steps of a policy that is loaded here; without this, as saved with the checkpoint,
            else 10.
        out: Folder for summary.json and ticks.jsonl; runs/drive-DATE by default.
        rerun: Also write drive.rrd for the rerun viewer.
        realtime: Real-time priority for the control thread (Linux, needs the right to it).
    """
    from headrace.robot.drive import DriveConfig
    from headrace.robot.drive import drive as run
    from headrace.robot.drive_log import summary, write_log, write_rerun

    arm = make_arm(robot, options, rehearse, episode, rate, gripper)
    if rehearse:
        rate, seconds = arm.rate, arm.seconds
    bounds = make_limits(limits, arm, real=robot != "mock" and not rehearse)
    config = DriveConfig(
        rate=rate, seconds=seconds, instruction=instruction, execute=execute, stall=stall, realtime=realtime
    )
    report = run(arm, make_policy(policy, solver_steps), bounds, config, make_geometry(urdf, end_link, arm))
    folder = out or Path("runs") / f"drive-{time.strftime('%Y%m%d-%H%M%S')}"
    path = write_log(report, arm.joints, folder)
    print(json.dumps(summary(report, arm.joints), indent=2))
    if rehearse:
        apart = dict(zip(arm.joints, arm.difference().round(3).tolist(), strict=True))
        print(f"mean distance from the recorded actions: {apart}")
    if rerun:
        print(f"recording: {write_rerun(report, arm.joints, folder / 'drive.rrd')}")
    print(f"log: {path}")
    return int(report.reason not in ("done", "the recording is over"))


def make_arm(robot: str, options: str, rehearse: Path | None, episode: int, rate: float, gripper: Any) -> Any:
    """The arm that the options describe."""
    from headrace.robot.arm import MockArm
    from headrace.robot.lerobot_arm import make_lerobot_arm
    from headrace.robot.rehearsal import recorded_arm

    if rehearse:
        return recorded_arm(rehearse, episode, gripper=gripper)
    chosen = json.loads(options)
    if not isinstance(chosen, dict):
        raise ValueError(f"--options must be a JSON object, got {options!r}")
    if robot == "mock":
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items()}
        return MockArm(rate=rate, **settings)
    return make_lerobot_arm(robot, chosen, rate=rate, gripper=gripper)


def make_limits(path: Path | None, arm: Any, *, real: bool) -> Any:
    """The limits from a file; for the mock arm and rehearsals, wide ones when there is no file.

    Raises:
        ValueError: A real robot without limits.
    """
    from headrace.robot.safety import SafetyLimits

    if path is not None:
        return SafetyLimits.from_json(path)
    if real:
        names = ", ".join(arm.joints)
        raise ValueError(f"a real arm needs --limits FILE with range, speed and acceleration of: {names}")
    count = len(arm.joints)
    return SafetyLimits(
        joints=arm.joints,
        low=(-1000.0,) * count,
        high=(1000.0,) * count,
        speed=(300.0,) * count,
        acceleration=(6000.0,) * count,
        tolerance=1000.0 if not hasattr(arm, "top_speed") else 5.0,
    )


def make_geometry(urdf: Path | None, end_link: str, arm: Any) -> Any:
    """Kinematics for an arm whose joints carry the URDF's names or order, degrees where LeRobot's drivers have them."""
    if urdf is None:
        return None
    import numpy as np

    from headrace.robot.kinematics import Chain
    from headrace.robot.targets import ArmGeometry

    chain = Chain.from_urdf(urdf, end_link)
    movers = [index for index, name in enumerate(arm.joints) if name != "gripper"]
    if len(movers) != len(chain.joints) or "gripper" not in arm.joints:
        names = ", ".join(joint.name for joint in chain.joints)
        raise ValueError(f"the chain to {end_link!r} has the joints {names}; the arm has {', '.join(arm.joints)}")
    scale = tuple(1.0 if joint.slides else np.pi / 180 for joint in chain.joints)
    return ArmGeometry(
        chain=chain,
        arm_joints=tuple(movers),
        gripper=arm.joints.index("gripper"),
        scale=scale,
        offset=(0.0,) * len(movers),
    )


def make_policy(name: str, steps: int | None) -> Any:
    """A policy server's policy, or one loaded here."""
    import os

    from headrace.robot.client import RemotePolicy

    if name.startswith(("ws://", "wss://")):
        return RemotePolicy(name, token=os.environ.get("HEADRACE_TOKEN", ""))
    from headrace.flow.solver import SolverSettings
    from headrace.robot.policy import load_policy

    return load_policy(name, solver=None if steps is None else SolverSettings(method="euler", steps=steps))
