"""Arms through LeRobot, rehearsal on recorded frames, and the log of a run; the robot is a stand-in for a driver."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from headrace.contracts import ActionChunk, ActionSpec, SpecMismatch
from headrace.robot.arm import ArmFault
from headrace.robot.drive import DriveConfig, drive
from headrace.robot.drive_log import write_log, write_rerun
from headrace.robot.lerobot_arm import LeRobotArm
from headrace.robot.rehearsal import RecordedArm, recorded_arm
from headrace.robot.safety import SafetyLimits

JOINTS = ("shoulder", "gripper")
LIMITS = SafetyLimits(joints=JOINTS, low=(-90.0, 0.0), high=(90.0, 100.0), speed=(90.0,) * 2, acceleration=(900.0,) * 2)


class Driver:
    """A LeRobot robot as far as the arm uses it: features, dictionaries, its own clamp, errors of the bus."""

    def __init__(self, port="/dev/null0", calibrated=True, fails=False):
        self.action_features = {"shoulder.pos": float, "gripper.pos": float}
        self.observation_features = {**self.action_features, "front": (8, 8, 3)}
        self.config, self.is_calibrated, self.fails = SimpleNamespace(port=port), calibrated, fails
        self.is_connected, self.position, self.sent = False, {"shoulder.pos": 5.0, "gripper.pos": 50.0}, []

    def connect(self, calibrate=True):
        assert not calibrate, "a policy run must not start a calibration"
        if self.fails:
            raise OSError("no such device")
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        return {**self.position, "front": np.full((8, 8, 3), 9, np.uint8)}

    def send_action(self, action):
        self.position = {key: min(value, 60.0) for key, value in action.items()}
        self.sent.append(action)
        return self.position


class Still:
    """Wants the joints at one place."""

    def __init__(self, place=(20.0, 80.0)):
        self.spec = ActionSpec(names=JOINTS, frame="joint", rotation="none", gripper="open_is_1", rate=30.0)
        self.place, self.seen = place, []

    def reset(self, slot, *, seed):
        pass

    def act(self, observations, slots):
        self.seen.append(observations[0])
        return ActionChunk(np.tile(np.array(self.place, np.float32), (1, 20, 1)), 0.0)


def test_joints_and_pictures_come_from_the_driver_and_commands_go_to_it():
    driver, policy = Driver(), Still()
    arm = LeRobotArm(driver, rate=30.0)
    assert arm.joints == JOINTS and arm.cameras == ("front",)
    report = drive(arm, policy, LIMITS, DriveConfig(seconds=1.2))
    assert report.reason == "done" and not driver.is_connected
    assert set(driver.sent[0]) == set(driver.action_features)
    assert policy.seen[0].images["front"].shape == (8, 8, 3)
    assert driver.position["shoulder.pos"] == pytest.approx(20.0, abs=2)
    assert max(tick.sent[1] for tick in report.ticks) == 60.0  # what the driver really sent, after its own clamp


def test_two_drivers_on_one_port_are_refused_and_the_lock_is_given_back():
    first, second = LeRobotArm(Driver("/dev/ttyX")), LeRobotArm(Driver("/dev/ttyX"))
    first.connect()
    with pytest.raises(ArmFault, match="another process drives /dev/ttyX"):
        second.connect()
    LeRobotArm(Driver("/dev/ttyY")).connect()
    first.close()
    second.connect()
    second.close()


def test_a_link_to_a_port_is_that_port_and_anothers_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "ttyZ").touch()
    (tmp_path / "by-id").symlink_to(tmp_path / "ttyZ")
    first, second = LeRobotArm(Driver(str(tmp_path / "ttyZ"))), LeRobotArm(Driver(str(tmp_path / "by-id")))
    first.connect()
    with pytest.raises(ArmFault, match="another process drives"):
        second.connect()
    first.close()

    def refused(path, mode):
        raise PermissionError(13, "not yours")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(ArmFault, match="belongs to another user"):
        second.connect()


def test_a_cable_pulled_at_the_end_costs_neither_report_nor_lock():
    driver = Driver("/dev/ttyPulled")

    def gone():
        raise ConnectionError("no status packet")

    driver.disconnect = gone
    report = drive(LeRobotArm(driver), Still(), LIMITS, DriveConfig(seconds=0.3))
    assert report.reason == "done" and len(report.ticks) > 1
    other = LeRobotArm(Driver("/dev/ttyPulled"))
    other.connect()
    other.close()


class Part:
    """A bus or a camera that notes how it was closed; `weak` motors do not answer when their torque is to end."""

    def __init__(self, connected, weak=False):
        self.is_connected, self.weak, self.closed = connected, weak, []

    def disconnect(self, *torque_off):
        self.closed.append(torque_off)
        if not self.is_connected or (self.weak and torque_off == (True,)):
            raise ConnectionError("gone")
        self.is_connected = False


@pytest.mark.parametrize(("weak", "told"), [(False, [(True,)]), (True, [(True,), (False,)])])
def test_a_pulled_camera_leaves_neither_the_bus_open_nor_the_other_camera(weak, told):
    """As in LeRobot's robots, whose `disconnect` wants bus and all cameras connected."""

    class Guarded(Driver):
        def disconnect(self):
            raise ConnectionError("Guarded is not connected")

    driver = Guarded("/dev/ttyGuarded")
    driver.bus = Part(True, weak)
    driver.cameras = {"front": Part(False), "wrist": Part(True)}
    arm = LeRobotArm(driver)
    arm.connect()
    arm.close()
    assert driver.bus.closed == told and not driver.bus.is_connected and not driver.cameras["wrist"].is_connected
    driver.bus.is_connected = True
    arm.close()  # the lock is given back: another process may have the bus now
    assert driver.bus.closed == told


def test_a_driver_that_leaves_a_joint_out_is_a_fault():
    driver = Driver()
    arm = LeRobotArm(driver)
    del driver.position["gripper.pos"]
    with pytest.raises(ArmFault, match=r"gave no gripper\.pos; it gave shoulder\.pos, front"):
        arm.read()
    driver.send_action = lambda action: {}
    with pytest.raises(ArmFault, match=r"shoulder\.pos, gripper\.pos"):
        arm.send(np.zeros(2))


def test_every_robot_of_lerobot_is_known_whatever_the_others_lack():
    from headrace.robot.lerobot_arm import make_lerobot_arm

    with pytest.raises(ValueError, match=r"(?s)no LeRobot robot 'no_such'.*lekiwi.*so101_follower"):
        make_lerobot_arm("no_such", {}, rate=30.0)


def test_what_goes_wrong_on_the_bus_is_a_fault_with_the_port():
    for driver, why in ((Driver(fails=True), "no such device"), (Driver(calibrated=False), "lerobot-calibrate")):
        arm = LeRobotArm(driver)
        with pytest.raises(ArmFault, match=why):
            arm.connect()
        assert arm._lock is None
    arm = LeRobotArm(Driver())
    arm.robot.get_observation = lambda: 1 / 0
    with pytest.raises(ArmFault, match="does not answer"):
        arm.read()
    driver = Driver()
    driver.action_features = {"x.vel": float}
    with pytest.raises(ValueError, match=r"x\.vel"):
        LeRobotArm(driver)


def recording():
    states = np.stack([np.linspace(0, 10, 30), np.full(30, 50.0)], axis=1)
    return RecordedArm(joints=JOINTS, states=states, actions=states + 1.0, images={}, rate=30.0)


def test_a_rehearsal_shows_the_recording_and_moves_nothing():
    arm, policy = recording(), Still(place=(5.0, 50.0))
    report = drive(arm, policy, LIMITS, DriveConfig(seconds=arm.seconds + 1))
    assert report.reason == "the recording is over" and len(report.ticks) == 30
    np.testing.assert_array_equal([tick.measured for tick in report.ticks], arm.states)
    sent = np.array(arm.sent[:30])
    np.testing.assert_allclose(arm.difference(), np.abs(sent - arm.actions).mean(axis=0))


@pytest.mark.slow
def test_an_episode_of_a_dataset_is_read_frame_by_frame(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = {"dtype": "float32", "shape": (2,), "names": ["shoulder.pos", "gripper.pos"]}
    picture = {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channels"]}
    features = {"observation.images.front": picture, "observation.state": joints, "action": joints}
    made = LeRobotDataset.create("local/d", fps=10, features=features, root=tmp_path / "d", use_videos=False)
    for step in range(3):
        state = np.array([step, 10 * step], np.float32)
        shown = np.full((16, 24, 3), 50 + step, np.uint8)
        made.add_frame(
            {"observation.images.front": shown, "observation.state": state, "action": state + 1, "task": "go"}
        )
    made.save_episode()
    made.finalize()
    arm = recorded_arm(tmp_path / "d", 0)
    assert arm.joints == JOINTS and arm.cameras == ("front",) and arm.rate == 10.0
    np.testing.assert_array_equal(arm.actions - arm.states, np.ones((3, 2)))
    assert [(one.shape, one.dtype, int(one[0, 0, 0])) for one in arm.images["front"]] == [
        ((16, 24, 3), np.uint8, 50 + step) for step in range(3)
    ]


def test_recordings_that_cannot_be_played_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(T, 2\)"):
        RecordedArm(joints=JOINTS, states=np.zeros((3, 2)), actions=np.zeros((3, 4)))
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset"):
        recorded_arm(tmp_path, 0)


def test_the_log_says_what_happened_tick_by_tick(tmp_path):
    arm = recording()
    report = drive(arm, Still(), LIMITS, DriveConfig(seconds=0.5))
    told = json.loads(write_log(report, arm.joints, tmp_path / "log").read_text())
    rows = [json.loads(line) for line in (tmp_path / "log" / "ticks.jsonl").read_text().splitlines()]
    assert told["ticks"] == len(rows) == len(report.ticks) and told["joints"] == list(JOINTS)
    assert rows[-1]["sent"] == pytest.approx(report.ticks[-1].sent, abs=1e-4)
    with pytest.raises(FileExistsError, match="--out"):
        write_log(report, arm.joints, tmp_path / "log")


URDF = """<robot name="r"><link name="base"/><link name="mid"/><link name="tip"/>
<joint name="lift" type="revolute"><parent link="base"/><child link="mid"/><origin xyz="0 0 0"/><axis xyz="0 0 1"/>
<limit lower="-2" upper="2" effort="1" velocity="1"/></joint>
<joint name="pan" type="revolute"><parent link="mid"/><child link="tip"/><origin xyz="1 0 0"/><axis xyz="0 0 1"/>
<limit lower="-2" upper="2" effort="1" velocity="1"/></joint></robot>"""


def test_kinematics_go_by_joint_names_and_the_grippers_own_range(tmp_path, capsys):
    from headrace.cli.drive import make_geometry
    from headrace.robot.targets import require_arm_fits

    (tmp_path / "arm.urdf").write_text(URDF)
    joints = ("pan", "lift", "gripper")
    limits = SafetyLimits(
        joints=joints, low=(-2.0, -2.0, 5.0), high=(2.0, 2.0, 60.0), speed=(1.0,) * 3, acceleration=(1.0,) * 3
    )

    def arm(gripper, names=joints):
        spec = ActionSpec(names=names, frame="joint", rotation="none", gripper=gripper, rate=30.0)
        return SimpleNamespace(joints=names, spec=spec)

    open_is_1 = make_geometry(tmp_path / "arm.urdf", "tip", arm("open_is_1"), limits, "radians")
    assert open_is_1.arm_joints == (1, 0) and open_is_1.scale == (1.0, 1.0)
    assert (open_is_1.gripper_shut, open_is_1.gripper_open) == (5.0, 60.0) and capsys.readouterr().err == ""
    close_is_1 = make_geometry(tmp_path / "arm.urdf", "tip", arm("close_is_1"))
    assert (close_is_1.gripper_shut, close_is_1.gripper_open) == (100.0, 0.0)
    assert close_is_1.scale == pytest.approx((np.pi / 180,) * 2)
    by_order = make_geometry(tmp_path / "arm.urdf", "tip", arm("open_is_1", ("a", "b", "gripper")))
    assert by_order.arm_joints == (0, 1) and "lift is a, pan is b" in capsys.readouterr().err
    spec = ActionSpec(names=("x", "y", "z", "g"), frame="base_delta", rotation="none", gripper="open_is_1", rate=5.0)
    with pytest.raises(SpecMismatch, match="which end of the arm's number is open is not known"):
        require_arm_fits(spec, arm("none").spec, open_is_1)


def test_what_would_spoil_the_log_is_said_before_anything_moves(tmp_path, monkeypatch, capsys):
    import headrace.cli.drive
    from headrace.cli.main import main

    monkeypatch.setattr(headrace.cli.drive, "make_policy", lambda name, steps: pytest.fail("too late"))
    (tmp_path / "summary.json").write_text("{}")
    assert main(["drive", "x", "--out", str(tmp_path)]) == 2
    assert "already holds a log" in capsys.readouterr().err
    monkeypatch.setattr("headrace.robot.drive_log.find_spec", lambda name: None)
    assert main(["drive", "x", "--out", str(tmp_path / "new"), "--rerun"]) == 2
    assert "rerun-sdk" in capsys.readouterr().err


def test_an_arm_that_is_in_use_is_a_sentence_not_a_traceback(tmp_path, monkeypatch, capsys):
    import headrace.cli.drive
    from headrace.cli.main import main

    held, arm = LeRobotArm(Driver("/dev/ttyHeld")), LeRobotArm(Driver("/dev/ttyHeld"))
    held.connect()
    monkeypatch.setattr(headrace.cli.drive, "make_policy", lambda name, steps: Still())
    monkeypatch.setattr(headrace.cli.drive, "make_arm", lambda *given: arm)
    monkeypatch.setattr(headrace.cli.drive, "make_limits", lambda *given, real: LIMITS)
    assert main(["drive", "x", "--out", str(tmp_path / "log")]) == 1
    assert "another process drives /dev/ttyHeld" in capsys.readouterr().err
    held.close()


@pytest.mark.slow
def test_the_recording_can_be_opened_by_rerun(tmp_path):
    pytest.importorskip("rerun")
    arm = recording()
    report = drive(arm, Still(), LIMITS, DriveConfig(seconds=0.5))
    assert write_rerun(report, arm.joints, tmp_path / "drive.rrd").read_bytes()[:4] == b"RRF2"
