"""Scripted Panda experts: waypoints through the policy's own controller, re-planned at every step.

They see the simulator's true state, which policies do not. Re-planning makes them recover when noise is added to their
actions. Motion planning by mplib is not used: its wheels crash under numpy 2, and straight lines never failed here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from headrace.sim.maniskill import ManiSkillEnvironment

METRES_PER_UNIT = 0.1
RADIANS_PER_UNIT = -0.1  # ManiSkill multiplies a normalised rotation by its lower bound, which is negative
OPEN, CLOSED = 1.0, -1.0


class Waypoint(NamedTuple):
    """One phase of an expert.

    Attributes:
        goal: Returns where the tool centre point should be now [m], shape (3,), world frame.
        gripper: 1 open, -1 closed.
        tolerance: Distance [m] at which the phase is done.
        speed: Largest step [m].
        patience: Steps after which the phase is done anyway.
        hold: Steps to stay after arriving.
        holding: Whether the object must be in the gripper; if it is not, the expert starts again.
    """

    goal: Callable[[], np.ndarray]
    gripper: float
    tolerance: float = 0.01
    speed: float = 0.09
    patience: int = 30
    hold: int = 0
    holding: bool = False


class WaypointExpert:
    """Moves through `plan()`; subclasses name the objects and the waypoints."""

    def __init__(self, environment: ManiSkillEnvironment) -> None:
        self.base = environment.base
        self.reset()

    def reset(self) -> None:
        """Start the plan from its first waypoint; call after each reset of the environment."""
        self.phase, self.waited, self.held = 0, 0, 0
        self.yaw = 0.0
        self.plan = self.make_plan()

    def make_plan(self) -> list[Waypoint]:
        """The waypoints of the episode that was just reset."""
        raise TypeError(f"{type(self).__name__} is abstract: name a task's expert, such as PickCube")

    def grasped(self) -> bool:
        """Whether the object to be carried is in the gripper."""
        return True

    def act(self) -> np.ndarray:
        """The next action, shape (7,), each in [-1, 1]."""
        waypoint = self.plan[self.phase]
        if waypoint.holding and self.waited > 2 and not self.grasped():
            self.reset()
            waypoint = self.plan[0]
        tcp = self.base.agent.tcp.pose
        offset = waypoint.goal() - tcp.p[0].numpy()
        distance = float(np.linalg.norm(offset))
        turn = self._turn(tcp.q[0].numpy())
        action = np.zeros(7, np.float32)
        action[:3] = offset * min(1.0, waypoint.speed / max(distance, 1e-9)) / METRES_PER_UNIT
        action[5] = np.clip(turn / RADIANS_PER_UNIT, -1, 1)
        action[6] = waypoint.gripper
        self._advance(waypoint, distance < waypoint.tolerance and abs(turn) < 0.05)
        return np.clip(action, -1, 1)

    def _advance(self, waypoint: Waypoint, arrived: bool) -> None:
        self.waited += 1
        if arrived or self.waited >= waypoint.patience:
            self.held += 1
            if self.held > waypoint.hold and self.phase + 1 < len(self.plan):
                self.phase, self.waited, self.held = self.phase + 1, 0, 0

    def _turn(self, tcp_quaternion: np.ndarray) -> float:
        """Angle [rad] from the fingers' closing direction to the nearest side of the object, within 45 degrees."""
        closing = yaw_of(tcp_quaternion) + np.pi / 2
        return float((self.yaw - closing + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def yaw_of(quaternion: np.ndarray) -> float:
    """Heading [rad] of the rotated x axis in the ground plane; quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return float(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))


def position(actor: Any) -> np.ndarray:
    """World position [m] of an actor, shape (3,)."""
    return actor.pose.p[0].numpy()


class PickCube(WaypointExpert):
    """Grasp the cube and hold it at the goal."""

    def make_plan(self) -> list[Waypoint]:
        cube, goal = self.base.cube, self.base.goal_site
        self.yaw = yaw_of(cube.pose.q[0].numpy())
        return [
            Waypoint(lambda: position(cube) + [0, 0, 0.06], OPEN, tolerance=0.015),
            Waypoint(lambda: position(cube), OPEN, tolerance=0.006, speed=0.06),
            Waypoint(lambda: position(cube), CLOSED, hold=2, patience=3),
            Waypoint(lambda: position(goal), CLOSED, tolerance=0.008, holding=True, patience=60),
            Waypoint(lambda: position(goal), CLOSED, tolerance=0.008, holding=True, patience=10_000),
        ]

    def grasped(self) -> bool:
        return bool(self.base.agent.is_grasping(self.base.cube)[0])


class StackCube(WaypointExpert):
    """Grasp cube A, put it on cube B, let go and rise."""

    def make_plan(self) -> list[Waypoint]:
        upper, lower = self.base.cubeA, self.base.cubeB
        self.yaw = yaw_of(upper.pose.q[0].numpy())

        def over(height: float) -> np.ndarray:
            shift = self.base.agent.tcp.pose.p[0].numpy() - position(upper)
            return position(lower) + shift + [0, 0, height]

        return [
            Waypoint(lambda: position(upper) + [0, 0, 0.06], OPEN, tolerance=0.015),
            Waypoint(lambda: position(upper), OPEN, tolerance=0.006, speed=0.06),
            Waypoint(lambda: position(upper), CLOSED, hold=2, patience=3),
            Waypoint(
                lambda: np.array([*position(upper)[:2], position(lower)[2] + 0.09]),
                CLOSED,
                tolerance=0.03,
                holding=True,
            ),
            Waypoint(lambda: over(0.07), CLOSED, tolerance=0.008, holding=True),
            Waypoint(lambda: over(0.043), CLOSED, tolerance=0.004, speed=0.03, holding=True),
            Waypoint(lambda: over(0.041), OPEN, hold=2, patience=3),
            Waypoint(lambda: position(upper) + [0, 0, 0.12], OPEN, patience=10_000),
        ]

    def grasped(self) -> bool:
        return bool(self.base.agent.is_grasping(self.base.cubeA)[0])


class PushCube(WaypointExpert):
    """Go behind the cube, fingers closed, and push it forward onto the target."""

    direction = 1.0

    def make_plan(self) -> list[Waypoint]:
        cube, target = self.base.obj, self.base.goal_region
        behind = np.array([-0.10 * self.direction, 0, 0])
        return [
            Waypoint(lambda: position(cube) + behind + [0, 0, 0.06], CLOSED, tolerance=0.02),
            Waypoint(lambda: np.array([*(position(cube) + behind)[:2], 0.02]), CLOSED, tolerance=0.01),
            Waypoint(
                lambda: np.array([position(target)[0] - 0.02 * self.direction, position(cube)[1], 0.02]),
                CLOSED,
                speed=0.05,
                patience=10_000,
                holding=True,
            ),
        ]

    def grasped(self) -> bool:
        """Whether the cube is still in front of the fingers."""
        ahead = position(self.base.obj) - self.base.agent.tcp.pose.p[0].numpy()
        return bool(self.direction * ahead[0] > 0.01 and abs(ahead[1]) < 0.035)

    def _turn(self, tcp_quaternion: np.ndarray) -> float:
        return 0.0


class PullCube(PushCube):
    """Go beyond the cube, fingers closed, and draw it back onto the target."""

    direction = -1.0


class PlaceSphere(WaypointExpert):
    """Grasp the sphere, carry it over the bin and let go."""

    def make_plan(self) -> list[Waypoint]:
        sphere, basket = self.base.obj, self.base.bin
        return [
            Waypoint(lambda: position(sphere) + [0, 0, 0.06], OPEN, tolerance=0.015),
            Waypoint(lambda: position(sphere), OPEN, tolerance=0.006, speed=0.06),
            Waypoint(lambda: position(sphere), CLOSED, hold=3, patience=3),
            Waypoint(lambda: position(basket) + [0, 0, 0.12], CLOSED, tolerance=0.01, holding=True),
            Waypoint(lambda: position(basket) + [0, 0, 0.045], CLOSED, tolerance=0.008, speed=0.04, patience=15),
            Waypoint(lambda: position(basket) + [0, 0, 0.05], OPEN, hold=3, patience=3),
            Waypoint(lambda: position(basket) + [0, 0, 0.15], OPEN, patience=10_000),
        ]

    def grasped(self) -> bool:
        return bool(self.base.agent.is_grasping(self.base.obj)[0])

    def _turn(self, tcp_quaternion: np.ndarray) -> float:
        return 0.0
