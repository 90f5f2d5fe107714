"""`headrace drive`: run a policy on an arm, on the mock arm, or on a recorded episode without moving."""

import json
import os
import sys
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
    units: Literal["degrees", "radians"] = "degrees",
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
        units: What the robot's driver gives turning joints in; read with URDF only.
        solver_steps: Equal solver steps of a policy that is loaded here; without this, as saved with the checkpoint,
            else 10.
        out: Folder for summary.json and ticks.jsonl; runs/drive-DATE by default.
        rerun: Also write drive.rrd for the rerun viewer.
        realtime: Real-time priority for the control thread (Linux, needs the right to it).
    """
    from headrace.robot.arm import ArmFault
    from headrace.robot.client import ServerRefused
    from headrace.robot.drive import DriveConfig
    from headrace.robot.drive import drive as run
    from headrace.robot.drive_log import require_new, require_rerun, summary, write_log, write_rerun

    folder = out or Path("runs") / f"drive-{time.strftime('%Y%m%d-%H%M%S')}"
    require_new(folder)
    if rerun:
        require_rerun()
    arm = make_arm(robot, options, rehearse, episode, rate, gripper)
    if rehearse:
        rate, seconds = arm.rate, arm.seconds
    bounds = make_limits(limits, arm, real=robot != "mock" and not rehearse)
    config = DriveConfig(
        rate=rate, seconds=seconds, instruction=instruction, execute=execute, stall=stall, realtime=realtime
    )
    geometry = make_geometry(urdf, end_link, arm, bounds if limits is not None else None, units)
    try:
        report = run(arm, make_policy(policy, solver_steps), bounds, config, geometry)
    except (ArmFault, ServerRefused) as error:
        if os.environ.get("HEADRACE_TRACEBACK"):
            raise
        print(f"headrace drive: {error}", file=sys.stderr)
        return 1
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


def make_geometry(urdf: Path | None, end_link: str, arm: Any, bounds: Any = None, units: str = "degrees") -> Any:
    """Kinematics for an arm from a URDF.

    The chain's joints are the arm's of the same names; where the names differ, those in the same order, with a remark.
    The gripper is shut and open at the ends of its range, which end is open being what the arm's spec says.

    Args:
        urdf: The description, or None for no kinematics.
        end_link: The link that policies move.
        arm: The arm; its gripper is the joint `gripper`.
        bounds: Its limits; None takes 0 to 100 for the gripper.
        units: What the arm has turning joints in, "degrees" or "radians"; sliding ones are in metres.

    Raises:
        ValueError: The chain has another number of joints than the arm without its gripper.
    """
    if urdf is None:
        return None
    import numpy as np

    from headrace.robot.kinematics import Chain
    from headrace.robot.targets import ArmGeometry

    chain = Chain.from_urdf(urdf, end_link)
    movers, wanted = [name for name in arm.joints if name != "gripper"], [joint.name for joint in chain.joints]
    if len(movers) != len(wanted) or "gripper" not in arm.joints:
        raise ValueError(
            f"the chain to {end_link!r} has the joints {', '.join(wanted)}; the arm has {', '.join(arm.joints)}"
        )
    if set(movers) != set(wanted):
        pairs = ", ".join(f"{one} is {other}" for one, other in zip(wanted, movers, strict=True))
        print(f"headrace drive: joints are matched by their order: {pairs}", file=sys.stderr)
        wanted = movers
    turn = np.pi / 180 if units == "degrees" else 1.0
    gripper = arm.joints.index("gripper")
    ends = (bounds.low[gripper], bounds.high[gripper]) if bounds is not None else (0.0, 100.0)
    shut, wide = ends[::-1] if arm.spec.gripper == "close_is_1" else ends
    return ArmGeometry(
        chain=chain,
        arm_joints=tuple(arm.joints.index(name) for name in wanted),
        gripper=gripper,
        scale=tuple(1.0 if joint.slides else turn for joint in chain.joints),
        offset=(0.0,) * len(wanted),
        gripper_shut=shut,
        gripper_open=wide,
    )


def make_policy(name: str, steps: int | None) -> Any:
    """A policy server's policy, or one loaded here."""
    from headrace.robot.client import RemotePolicy

    if name.startswith(("ws://", "wss://")):
        return RemotePolicy(name, token=os.environ.get("HEADRACE_TOKEN", ""))
    from headrace.flow.solver import SolverSettings
    from headrace.robot.policy import load_policy

    return load_policy(name, solver=None if steps is None else SolverSettings(method="euler", steps=steps))
