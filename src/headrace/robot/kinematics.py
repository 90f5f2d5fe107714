"""Forward and inverse kinematics of a serial arm from its URDF, in numpy; the inverse keeps the joint ranges."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation


class Unreachable(ValueError):
    """No joint positions within their ranges bring the gripper to the wanted pose."""


class Joint(NamedTuple):
    """One moving joint and the fixed transform before it.

    Attributes:
        name: Its name in the URDF.
        offset: Transform from the joint before, shape (4, 4) [m].
        axis: Unit axis in its own frame, shape (3,).
        slides: Prismatic rather than turning.
        low, high: Range [rad or m].
    """

    name: str
    offset: np.ndarray
    axis: np.ndarray
    slides: bool
    low: float
    high: float


@dataclass(frozen=True)
class Chain:
    """The moving joints between base and end link; all poses are in the base frame.

    Attributes:
        joints: Moving joints, base first.
        tip: Fixed transform from the last joint to the end link, shape (4, 4).
    """

    joints: tuple[Joint, ...]
    tip: np.ndarray

    @classmethod
    def from_urdf(cls, path: Path, end_link: str) -> "Chain":
        """Read the chain that ends in `end_link`.

        Raises:
            ValueError: No such link (the message lists them), or a joint on the way that is neither fixed nor revolute,
                continuous or prismatic.
        """
        root = ElementTree.parse(path).getroot()
        parents = {_attribute(joint, "child", "link"): joint for joint in root.findall("joint")}
        if end_link not in parents:
            raise ValueError(f"{path} has no link {end_link!r} with a joint above it; it has: {', '.join(parents)}")
        way, link = [], end_link
        while link in parents:
            way.append(parents[link])
            link = _attribute(parents[link], "parent", "link")
        joints, offset = [], np.eye(4)
        for joint in reversed(way):
            offset = offset @ _origin(joint)
            if joint.get("type") == "fixed":
                continue
            joints.append(_moving(joint, offset))
            offset = np.eye(4)
        return cls(tuple(joints), offset)

    def forward(self, q: np.ndarray) -> np.ndarray:
        """Pose of the end link at joint positions `q`, shape (J,) [rad or m]; returns (4, 4)."""
        return self._frames(q)[-1]

    def _frames(self, q: np.ndarray) -> list[np.ndarray]:
        """Pose of each joint before it moves, then of the end link."""
        if np.shape(q) != (len(self.joints),):
            raise ValueError(f"wanted {len(self.joints)} joint positions, got shape {np.shape(q)}")
        pose, frames = np.eye(4), []
        for joint, value in zip(self.joints, q, strict=True):
            pose = pose @ joint.offset
            frames.append(pose)
            motion = np.eye(4)
            if joint.slides:
                motion[:3, 3] = joint.axis * value
            else:
                motion[:3, :3] = Rotation.from_rotvec(joint.axis * value).as_matrix()
            pose = pose @ motion
        return [*frames, pose @ self.tip]

    def jacobian(self, q: np.ndarray) -> np.ndarray:
        """Velocity of the end link (3 linear, 3 angular) per joint velocity, shape (6, J)."""
        *frames, end = self._frames(q)
        columns = []
        for joint, frame in zip(self.joints, frames, strict=True):
            axis = frame[:3, :3] @ joint.axis
            linear = axis if joint.slides else np.cross(axis, end[:3, 3] - frame[:3, 3])
            columns.append(np.concatenate([linear, np.zeros(3) if joint.slides else axis]))
        return np.stack(columns, axis=1)

    def inverse(
        self,
        pose: np.ndarray,
        start: np.ndarray,
        *,
        rotation_weight: float = 1.0,
        tolerance: float = 2e-3,
        steps: int = 100,
    ) -> np.ndarray:
        """Joint positions near `start` that bring the end link to `pose`, by damped least squares.

        Args:
            pose: Wanted pose, shape (4, 4).
            start: Present joint positions, shape (J,); they choose among solutions.
            rotation_weight: A radian of rotation error counts as a tenth of this in metres; 0 for position only, as
                arms with fewer than six joints need it.
            tolerance: Position error that is accepted [m]; ten times as many radians of weighted rotation error.
            steps: Most iterations.

        Raises:
            Unreachable: Not reached within the ranges; the message gives the error that is left.
        """
        low, high = np.array([j.low for j in self.joints]), np.array([j.high for j in self.joints])
        q, weights = np.clip(start, low, high), np.array([1.0] * 3 + [0.1 * rotation_weight] * 3)
        error = self._error(pose, q) * weights
        damping = 1e-4
        for _ in range(steps):
            if self._reached(error, tolerance):
                return q
            j = self.jacobian(q) * weights[:, None]
            free = ~((q <= low) & (j.T @ error < 0) | (q >= high) & (j.T @ error > 0))  # joints not pushed at their end
            j = j * free
            move = j.T @ np.linalg.solve(j @ j.T + damping * np.eye(6), error)
            trial = np.clip(q + np.clip(move, -0.3, 0.3), low, high)
            new = self._error(pose, trial) * weights
            if np.linalg.norm(new) < np.linalg.norm(error):
                q, error, damping = trial, new, max(damping / 4, 1e-9)
            else:
                damping *= 8
        if self._reached(error, tolerance):
            return q
        raise Unreachable(
            f"no joint positions within their ranges reach {np.round(pose[:3, 3], 3).tolist()}: "
            f"{np.linalg.norm(error[:3]) * 1e3:.1f} mm are left"
        )

    @staticmethod
    def _reached(error: np.ndarray, tolerance: float) -> bool:
        return bool(np.linalg.norm(error[:3]) < tolerance and np.linalg.norm(error[3:]) < tolerance)

    def _error(self, pose: np.ndarray, q: np.ndarray) -> np.ndarray:
        """What is missing to `pose`: translation [m] and rotation vector [rad], shape (6,)."""
        here = self.forward(q)
        turn = Rotation.from_matrix(pose[:3, :3] @ here[:3, :3].T).as_rotvec()
        return np.concatenate([pose[:3, 3] - here[:3, 3], turn])


def _attribute(joint: ElementTree.Element, child: str, name: str, default: str = "") -> str:
    """Attribute `name` of the joint's child element, `default` where either is absent."""
    found = joint.find(child)
    return default if found is None else found.get(name, default)


def _origin(joint: ElementTree.Element) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, 3] = [float(v) for v in _attribute(joint, "origin", "xyz", "0 0 0").split()]
    angles = [float(v) for v in _attribute(joint, "origin", "rpy", "0 0 0").split()]
    pose[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix()
    return pose


def _moving(joint: ElementTree.Element, offset: np.ndarray) -> Joint:
    kind, name = joint.get("type", ""), joint.get("name", "")
    if kind not in ("revolute", "continuous", "prismatic"):
        raise ValueError(f"joint {name!r} is of kind {kind!r}; fixed, revolute, continuous and prismatic are known")
    axis = np.array([float(v) for v in _attribute(joint, "axis", "xyz", "1 0 0").split()])
    low, high = -np.inf, np.inf
    if kind != "continuous" and joint.find("limit") is not None:
        low, high = (float(_attribute(joint, "limit", end, "0")) for end in ("lower", "upper"))
    return Joint(name, offset, axis / np.linalg.norm(axis), kind == "prismatic", low, high)
