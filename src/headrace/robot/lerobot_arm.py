"""Any LeRobot robot as an arm of the drive loop; LeRobot is imported when it is connected, not before."""

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import IO, Any

import numpy as np

from headrace.contracts import ActionSpec, Gripper
from headrace.robot.arm import ArmFault, ArmState

log = logging.getLogger(__name__)


class LeRobotArm:
    """Joints and cameras of a LeRobot robot.

    Joint names are the robot's action features that end in `.pos`, without the ending; units are the driver's (degrees
    for the SO arms, 0..100 for their grippers). One process at a time: a lock per port keeps a second driver out.

    Args:
        robot: A LeRobot `Robot`, not yet connected.
        rate: Control rate [Hz].
        gripper: Which end of the gripper's number is open; SO arms count from 0, shut, to 100.
        port: Serial port or address, for the lock; by default `robot.config.port` where there is one.

    Raises:
        ValueError: The robot has no joint positions among its actions.
    """

    def __init__(self, robot: Any, *, rate: float = 30.0, gripper: Gripper = "open_is_1", port: str = "") -> None:
        self.robot = robot
        self.joints = tuple(key.removesuffix(".pos") for key in robot.action_features if key.endswith(".pos"))
        if not self.joints:
            raise ValueError(
                f"{type(robot).__name__} takes no joint positions; its actions are {', '.join(robot.action_features)}"
            )
        self.cameras = tuple(k for k, v in robot.observation_features.items() if isinstance(v, tuple) and len(v) == 3)
        self.spec = ActionSpec(names=self.joints, frame="joint", rotation="none", gripper=gripper, rate=rate)
        self._port = port or str(getattr(robot.config, "port", "") or getattr(robot.config, "id", "") or "robot")
        self._lock: IO[str] | None = None

    def connect(self) -> None:
        """Take the port's lock and open the bus.

        Raises:
            ArmFault: Another process drives this port, the robot is not calibrated, or it does not answer.
        """
        self._lock = _take_lock(self._port)
        try:
            self.robot.connect(calibrate=False)
            if not self.robot.is_calibrated:
                raise ArmFault(f"{self.robot} is not calibrated; run lerobot-calibrate with the same robot id first")
        except ArmFault:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise ArmFault(f"cannot connect to {self._port}: {type(error).__name__}: {error}") from error

    def read(self) -> ArmState:
        """Joints and pictures, as the driver gives them."""
        try:
            seen = self.robot.get_observation()
        except Exception as error:
            raise ArmFault(f"{self._port} does not answer: {type(error).__name__}: {error}") from error
        absent = [key for key in (*(f"{name}.pos" for name in self.joints), *self.cameras) if key not in seen]
        if absent:
            raise ArmFault(f"{self._port} gave no {', '.join(absent)}; it gave {', '.join(map(str, seen))}")
        joints = np.array([seen[f"{name}.pos"] for name in self.joints], dtype=float)
        return ArmState(joints, {name: np.asarray(seen[name]) for name in self.cameras}, time.perf_counter())

    def send(self, target: np.ndarray) -> np.ndarray:
        """Command joint positions; returns what the driver sent after its own limits."""
        request = {f"{name}.pos": float(value) for name, value in zip(self.joints, target, strict=True)}
        try:
            sent = self.robot.send_action(request)
        except Exception as error:
            raise ArmFault(f"{self._port} took no command: {type(error).__name__}: {error}") from error
        absent = [key for key in request if key not in sent]
        if absent:
            raise ArmFault(f"{self._port} did not say what it sent to {', '.join(absent)}")
        return np.array([sent[key] for key in request], dtype=float)

    def close(self) -> None:
        """Close bus and cameras and give the lock back, whatever state they are in; what goes wrong is logged.

        LeRobot closes nothing where a single camera is missing or was pulled, and would leave the torque on; bus and
        cameras are then closed one by one.
        """
        try:  # also where the robot says that it is not connected: half of it may be
            self.robot.disconnect()
        except Exception as error:
            log.log(
                logging.WARNING if self._lock is not None else logging.DEBUG,
                "%s could not be closed: %s: %s",
                self._port,
                type(error).__name__,
                error,
            )
            if self._lock is not None:
                self._close_parts()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _close_parts(self) -> None:
        """Close each bus, its torque as the robot's config says, and each camera, of one arm or of a pair."""
        pair = (getattr(self.robot, side, None) for side in ("left_arm", "right_arm"))
        for arm in (self.robot, *(one for one in pair if one is not None)):
            config, bus = getattr(arm, "config", None), getattr(arm, "bus", None)
            if bus is not None and getattr(bus, "is_connected", False):
                torque_off = getattr(config, "disable_torque_on_disconnect", True)
                if not _attempt(partial(bus.disconnect, torque_off)) and torque_off:
                    log.warning("%s: the torque could not be switched off", self._port)
                    _attempt(partial(bus.disconnect, False))  # the port must be free all the same
            for camera in (getattr(arm, "cameras", None) or {}).values():
                _attempt(camera.disconnect)


def _attempt(close: Callable[[], None]) -> bool:
    """Whether a part could be closed; why not is logged."""
    try:
        close()
    except Exception as error:  # whatever a driver raises, the other parts must be closed
        log.debug("%s: %s", type(error).__name__, error)
        return False
    return True


def _take_lock(port: str) -> IO[str]:
    """Hold the port for this process; a link to a device is the device.

    Raises:
        ArmFault: Another process holds it, or the lock is another user's.
    """
    device = os.path.realpath(port) if os.path.exists(port) else port
    name = re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_")
    path = Path(tempfile.gettempdir()) / f"headrace-arm-{name}.lock"
    try:
        lock = path.open("a+")
    except PermissionError as error:
        raise ArmFault(
            f"the lock of {port}, {path}, belongs to another user, who drives the arm or has driven it; "
            "make sure that nobody does and have that file removed"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ArmFault(f"another process drives {port}; two drivers on one port would fight over the arm") from error
    return lock


def _import_all(package: str) -> list[str]:
    """Import every package below `package`, which registers its parts; returns those that cannot be, and why."""
    failed = []
    for found in iter_modules(import_module(package).__path__, f"{package}."):
        if not found.ispkg:
            continue
        try:
            import_module(found.name)
        except Exception as error:  # each needs packages of its own
            failed.append(f"{found.name} ({type(error).__name__}: {error})")
    return failed


def make_lerobot_arm(kind: str, options: dict[str, Any], *, rate: float, gripper: Gripper = "open_is_1") -> LeRobotArm:
    """Make an arm from LeRobot's name of a robot and the fields of its configuration, plugins included.

    Args:
        kind: Such as `so101_follower`.
        options: Fields of the robot's configuration, nested as in LeRobot's JSON.
        rate: Control rate [Hz].
        gripper: See `LeRobotArm`.

    Raises:
        ValueError: Unknown robot; lists the known ones.
    """
    import draccus
    from lerobot.robots import RobotConfig, make_robot_from_config
    from lerobot.utils.import_utils import register_third_party_plugins

    left_out = [*_import_all("lerobot.robots"), *_import_all("lerobot.cameras")]
    register_third_party_plugins()
    known = RobotConfig.get_known_choices()
    if kind not in known:
        more = f"; these could not be imported: {'; '.join(left_out)}" if left_out else ""
        raise ValueError(f"no LeRobot robot {kind!r} (known: {', '.join(sorted(known))}{more})")
    config = draccus.decode(RobotConfig, {"type": kind, **options})
    return LeRobotArm(make_robot_from_config(config), rate=rate, gripper=gripper)
