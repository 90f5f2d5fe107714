"""From a policy's actions to joint targets of an arm, whatever frame the policy speaks."""

import logging
import re
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from headrace.contracts import ActionSpec, Needs, SpecMismatch
from headrace.robot.arm import Arm
from headrace.robot.kinematics import Chain

log = logging.getLogger(__name__)
UNNAMED = re.compile(r"(s|state_)\d+")


@dataclass(frozen=True, kw_only=True)
class ArmGeometry:
    """Kinematics of an arm whose driver does not speak radians.

    Attributes:
        chain: From the base to the gripper.
        arm_joints: Position, in the arm's joint vector, of each of the chain's joints.
        gripper: Position of the gripper's joint.
        scale, offset: Radians = scale * units + offset, per joint of the chain.
        gripper_shut, gripper_open: The gripper's joint position when shut and open [units].
    """

    chain: Chain
    arm_joints: tuple[int, ...]
    gripper: int
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    gripper_shut: float = 0.0
    gripper_open: float = 100.0

    def __post_init__(self) -> None:
        wanted = len(self.chain.joints)
        if not len(self.arm_joints) == len(self.scale) == len(self.offset) == wanted:
            raise ValueError(f"arm_joints, scale and offset need {wanted} entries, one per joint of the chain")
        if 0.0 in self.scale:
            raise ValueError("scale must not be 0")

    def radians(self, joints: np.ndarray) -> np.ndarray:
        """The chain's joint positions from the arm's."""
        return np.asarray(joints)[list(self.arm_joints)] * np.array(self.scale) + np.array(self.offset)

    def gripper_at(self, joints: np.ndarray) -> np.ndarray:
        """Position of the gripper, shape (3,) [m], at the arm's joint positions."""
        return self.chain.forward(self.radians(joints))[:3, 3]


def joint_targets(
    actions: np.ndarray, spec: ActionSpec, start: np.ndarray, geometry: ArmGeometry | None = None
) -> np.ndarray:
    """Absolute joint targets of a chunk.

    Args:
        actions: Shape (H, A), in the convention of `spec`. Deltas build on each other.
        spec: The policy's convention.
        start: Joint targets in force when the observation was taken, shape (J,).
        geometry: Needed for policies that move the gripper in space.

    Returns:
        Shape (H, J), in the arm's units.

    Raises:
        SpecMismatch: The policy moves the gripper and there is no geometry, or its rotation is not understood.
        Unreachable: A pose of the chunk cannot be reached; nothing of the chunk should be executed.
    """
    actions = np.asarray(actions, dtype=float)
    if spec.frame == "joint":
        return actions.copy()
    if spec.frame == "joint_delta":
        return start + np.cumsum(actions, axis=0)
    if geometry is None:
        raise SpecMismatch(
            f"the policy's actions are in the frame {spec.frame!r}: to drive joints give the arm's URDF and end link"
        )
    return _through_space(actions, spec, np.array(start, dtype=float), geometry)


def _through_space(actions: np.ndarray, spec: ActionSpec, joints: np.ndarray, geometry: ArmGeometry) -> np.ndarray:
    q = geometry.radians(joints)
    pose, rows = geometry.chain.forward(q), []
    turns = {"axis_angle": 3, "euler_xyz": 3, "quat_wxyz": 4, "none": 0}[spec.rotation]
    for action in actions:
        turn = _rotation(action[3 : 3 + turns], spec.rotation)
        wanted = np.eye(4)
        if spec.frame == "base_delta":
            wanted[:3, 3] = pose[:3, 3] + action[:3]
            wanted[:3, :3] = turn.as_matrix() @ pose[:3, :3]
        else:
            wanted[:3, 3] = action[:3]
            wanted[:3, :3] = turn.as_matrix() if turns else pose[:3, :3]
        few = len(geometry.chain.joints) < 6
        q = geometry.chain.inverse(wanted, q, rotation_weight=0.0 if few or not turns else 1.0)
        pose = wanted
        joints = joints.copy()
        joints[list(geometry.arm_joints)] = (q - np.array(geometry.offset)) / np.array(geometry.scale)
        if spec.gripper != "none":
            opening = action[-1] if spec.gripper == "open_is_1" else -action[-1]
            shut, wide = geometry.gripper_shut, geometry.gripper_open
            joints[geometry.gripper] = shut + (wide - shut) * np.clip((opening + 1) / 2, 0, 1)
        rows.append(joints)
    return np.stack(rows)


def _rotation(numbers: np.ndarray, kind: str) -> Rotation:
    if kind == "axis_angle":
        return Rotation.from_rotvec(numbers)
    if kind == "euler_xyz":
        return Rotation.from_euler("XYZ", numbers)
    if kind == "quat_wxyz":
        return Rotation.from_quat(np.roll(numbers, -1))
    return Rotation.identity()


def plain(names: tuple[str, ...]) -> tuple[str, ...]:
    """Joint names without the `.pos` that LeRobot's recordings end them in."""
    return tuple(name.removesuffix(".pos") for name in names)


def require_arm_fits(policy: ActionSpec, arm: ActionSpec, geometry: ArmGeometry | None) -> None:
    """Refuse a policy that this arm must not be given, before the first motion.

    A policy in joint numbers that calls its gripper `none`, as one trained on LeRobot's recordings does, gives the same
    number that the arm takes.

    Raises:
        SpecMismatch: The gripper conventions differ, the names of joints do, or the policy needs kinematics.
    """
    problems = []
    in_joints = policy.frame in ("joint", "joint_delta")
    if in_joints and plain(policy.names) != plain(arm.names):
        problems.append(f"joints: policy {policy.names}, arm {arm.names}")
    if in_joints and policy.gripper not in ("none", arm.gripper):
        problems.append(f"gripper: policy {policy.gripper!r}, arm {arm.gripper!r}")
    if not in_joints and policy.gripper != "none" and arm.gripper == "none":
        problems.append(f"gripper: policy {policy.gripper!r}; which end of the arm's number is open is not known")
    if policy.frame in ("base_delta", "base_absolute") and geometry is None:
        problems.append(f"frame {policy.frame!r} needs the arm's URDF and end link")
    if problems:
        raise SpecMismatch("this policy does not fit this arm: " + "; ".join(problems))


def require_arm_shows(needs: Needs, arm: Arm) -> None:
    """Refuse a policy that wants to see what this arm does not show: pictures of its cameras, its joints as the state.

    A state whose numbers have no names but numbers, as in datasets without names, is taken to be the joints.

    Raises:
        SpecMismatch: A camera is absent, or the state is not the arm's joints.
    """
    wanted = replace(needs, state_names=plain(needs.state_names))
    remark = wanted.require(arm.cameras, plain(arm.joints))
    if not remark:
        return
    if not all(UNNAMED.fullmatch(name) for name in wanted.state_names):
        raise SpecMismatch(f"an arm shows its joints as the state, and {remark}")
    log.warning("the policy's state has no names; it is given the joints %s", ", ".join(arm.joints))
