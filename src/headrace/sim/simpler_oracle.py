"""Scripted experts for the SIMPLER tasks: they see the poses of the objects and act through the policies' controller.

They prove an environment, its action convention and its success rule end to end, and make demonstrations. The plan is
re-made at every step from where things are: above the object, down, close, lift, over the target, lower, open, up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from headrace.sim.simpler_scene import SimplerScene

LONGEST_STEP = 0.030  # [m] per control step
LARGEST_TURN = 0.20  # [rad] per control step
PHASES = ("above", "down", "close", "lift", "over", "lower", "open", "up", "done")


@dataclass(frozen=True, kw_only=True)
class Heights:
    """Heights of the gripper over the origin of an object [m], in the robot's base frame."""

    hover: float = 0.07
    grasp: float = 0.0
    lift: float = 0.09
    release: float = 0.04


HEIGHTS = {
    "simpler/carrot-on-plate": Heights(grasp=-0.002, release=0.045),
    "simpler/spoon-on-towel": Heights(),
    "simpler/stack-cube": Heights(lift=0.08, release=0.035),
    "simpler/eggplant-in-basket": Heights(hover=0.09, grasp=0.006, lift=0.12, release=0.075),
}


class Arrival(NamedTuple):
    """When a phase is over: gripper this near its goal [m], or this many steps spent."""

    distance: float
    steps: int


ARRIVALS = {
    "above": Arrival(0.015, 16),
    "down": Arrival(0.006, 9),
    "close": Arrival(0.0, 4),
    "lift": Arrival(0.03, 7),
    "over": Arrival(0.015, 14),
    "lower": Arrival(0.01, 8),
    "open": Arrival(0.0, 3),
    "up": Arrival(0.02, 6),
    "done": Arrival(-1.0, 10**9),
}


class SimplerOracle:
    """Solves the episode that `scene` has just started; call `act` once per step.

    Everything is in the robot's base frame, as the controller is. Translation closes the gap to the pose last
    *commanded*, since the controller adds deltas to that one.
    """

    def __init__(self, scene: SimplerScene) -> None:
        self.scene, self.heights = scene, HEIGHTS[scene.task.name]
        objects, task = scene.simulation.objs, scene.task
        self.source, self.target = objects[task.source], objects[task.target]
        self.base = scene.simulation.agent.robot.pose.sp
        self.phase, self.steps = "above", 0
        self.hold = np.zeros(3)
        self.rotation = Rotation.from_rotvec([0, 0, self._grasp_yaw()]) * self._straight_down()

    @property
    def finished(self) -> bool:
        """Whether the object is placed and the gripper has withdrawn."""
        return self.phase == "done"

    def act(self) -> np.ndarray:
        """The next action, float32 (7,), in the convention of `scene.spec`."""
        self.steps += 1
        hand, commanded = self._hand(), self._commanded()
        goal, rotation = self._goal(), self.rotation
        if self.phase == "done":
            goal, rotation = commanded.p, _rotation(commanded.q)
        turn = _shortened((rotation * _rotation(commanded.q).inv()).as_rotvec(), LARGEST_TURN)
        move = _shortened(goal - commanded.p, LONGEST_STEP)
        gripper = -1.0 if self.phase in ("close", "lift", "over", "lower") else 1.0
        action = self._encode(move, turn, hand.p, commanded.p)
        self._advance(float(np.linalg.norm(goal - hand.p)), float((rotation * _rotation(hand.q).inv()).magnitude()))
        return np.concatenate([action, [gripper]]).astype(np.float32)

    def _encode(self, move: np.ndarray, turn: np.ndarray, hand: np.ndarray, commanded: np.ndarray) -> np.ndarray:
        """Six numbers that move the commanded pose by `move` and `turn` under the scene's controller."""
        if self.scene.spec.rotation == "euler_xyz":
            return np.concatenate([move, Rotation.from_rotvec(turn).as_euler("XYZ")])
        arm = commanded - hand  # the restored controller turns about the hand, which carries the commanded point along
        return np.concatenate([move + arm - Rotation.from_rotvec(turn).apply(arm), turn])

    def _goal(self) -> np.ndarray:
        centre, source = self._centre_of_mass(), self._in_base(self.source).p
        if self.phase in ("above", "down"):
            height = self.heights.hover if self.phase == "above" else self.heights.grasp
            return np.array([centre[0], centre[1], source[2] + height])
        if self.phase == "lift":
            return self.hold + np.array([0, 0, self.heights.lift])
        if self.phase in ("over", "lower"):
            target, carried = self._in_base(self.target).p, centre[:2] - self._hand().p[:2]
            height = self.heights.release + (0.05 if self.phase == "over" else 0.0)
            return np.array([*(target[:2] - carried), target[2] + height])
        return self.hold + np.array([0, 0, 0.08 if self.phase == "up" else 0.0])

    def _advance(self, distance: float, angle: float) -> None:
        arrival = ARRIVALS[self.phase]
        near = distance < arrival.distance and (self.phase != "above" or angle < 0.12)
        waits = self.phase in ("close", "open")
        if near or self.steps > arrival.steps or (waits and self.steps >= arrival.steps):
            self.phase, self.steps = PHASES[PHASES.index(self.phase) + 1], 0
            self.hold = np.array(self._hand().p if self.phase == "lift" else self._commanded().p)

    def _hand(self):
        """Pose of the gripper in the base frame."""
        return self.base.inv() * self.scene.simulation.agent.robot.links_map["ee_gripper_link"].pose.sp

    def _commanded(self):
        """Pose that the controller steers to."""
        return self.scene.simulation.agent.controller.controllers["arm"]._target_pose.sp

    def _in_base(self, actor):
        return self.base.inv() * actor.pose.sp

    def _centre_of_mass(self) -> np.ndarray:
        body = self.source._bodies[0]
        return (self.base.inv() * (body.entity_pose * body.cmass_local_pose)).p

    def _straight_down(self) -> Rotation:
        """The present hand rotation, tilted by the least angle so that the gripper points down."""
        start = _rotation(self._hand().q)
        pointing = start.apply([1.0, 0.0, 0.0])
        axis = np.cross(pointing, [0.0, 0.0, -1.0])
        size = float(np.linalg.norm(axis))
        return Rotation.from_rotvec(axis / max(size, 1e-9) * np.arcsin(min(size, 1.0))) * start

    def _grasp_yaw(self) -> float:
        """Turn about the vertical [rad] after which the fingers close across the object's long axis.

        The fingers look alike, so half a turn changes nothing; for the cube a quarter turn does not either.
        """
        long_axis = _rotation(self._in_base(self.source).q).apply([1.0, 0.0, 0.0])
        closing = self._straight_down().apply([0.0, 1.0, 0.0])
        wanted = np.arctan2(long_axis[1], long_axis[0]) + np.pi / 2
        period = np.pi / 2 if self.scene.task.source.startswith("baked") else np.pi
        return (wanted - np.arctan2(closing[1], closing[0]) + period / 2) % period - period / 2


def _rotation(wxyz: np.ndarray) -> Rotation:
    return Rotation.from_quat(np.roll(wxyz, -1))


def _shortened(vector: np.ndarray, longest: float) -> np.ndarray:
    return vector * min(1.0, longest / max(float(np.linalg.norm(vector)), 1e-9))


def run_oracle(scene: SimplerScene, seed: int, *, to_the_end: bool = True):
    """Play one episode; returns the scene's `Outcome`.

    Args:
        scene: The environment.
        seed: As for `scene.reset`.
        to_the_end: Keep still after placing until the official length; otherwise stop three steps after placing.
    """
    scene.reset(seed)
    oracle = SimplerOracle(scene)
    for _ in range(scene.max_steps):
        scene.step(oracle.act())
        if oracle.finished and oracle.steps > 2 and not to_the_end:
            break
    return scene.outcome
