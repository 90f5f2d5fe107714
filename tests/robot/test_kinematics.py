"""Kinematics: a planar arm with known answers, and inverse against forward on a real description."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from headrace.contracts import ActionSpec, SpecMismatch
from headrace.robot.kinematics import Chain, Unreachable
from headrace.robot.targets import ArmGeometry, joint_targets

URDF = """<robot name="planar"><link name="base"/><link name="one"/><link name="two"/><link name="tip"/>
<joint name="a" type="revolute"><parent link="base"/><child link="one"/><axis xyz="0 0 1"/>
<limit lower="-2" upper="2" effort="1" velocity="1"/></joint>
<joint name="b" type="revolute"><parent link="one"/><child link="two"/><origin xyz="1 0 0"/><axis xyz="0 0 1"/>
<limit lower="-2.5" upper="2.5" effort="1" velocity="1"/></joint>
<joint name="t" type="fixed"><parent link="two"/><child link="tip"/><origin xyz="0.5 0 0"/></joint></robot>"""


@pytest.fixture
def planar(tmp_path):
    path = tmp_path / "planar.urdf"
    path.write_text(URDF)
    return Chain.from_urdf(path, "tip")


def wx250s():
    path = Path(__file__).parents[3] / "shared/simpler_assets/data/robots/widowx/wx250s.urdf"
    if not path.is_file():
        pytest.skip("the WidowX description is not here")
    return Chain.from_urdf(path, "ee_gripper_link")


def test_planar_arm_is_where_trigonometry_says(planar):
    a, b = 0.4, -1.1
    want = [np.cos(a) + 0.5 * np.cos(a + b), np.sin(a) + 0.5 * np.sin(a + b), 0]
    np.testing.assert_allclose(planar.forward(np.array([a, b]))[:3, 3], want, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_is_the_derivative(seed):
    chain, rng, h = wx250s(), np.random.default_rng(seed), 1e-6
    q = rng.uniform(-0.8, 0.8, 6)
    for i, column in enumerate(chain.jacobian(q).T):
        step = np.eye(6)[i] * h
        before, after = chain.forward(q - step), chain.forward(q + step)
        np.testing.assert_allclose((after - before)[:3, 3] / (2 * h), column[:3], atol=1e-6)
        turn = Rotation.from_matrix(after[:3, :3] @ before[:3, :3].T).as_rotvec() / (2 * h)
        np.testing.assert_allclose(turn, column[3:], atol=1e-6)


def test_inverse_reaches_what_forward_made_and_keeps_the_ranges():
    chain, rng = wx250s(), np.random.default_rng(0)
    low, high = np.array([j.low for j in chain.joints]), np.array([j.high for j in chain.joints])
    home = np.array([0.0, 0.04, 0.22, 0.0, 1.37, 0.0])
    for _ in range(30):
        pose = chain.forward(np.clip(home + rng.uniform(-0.35, 0.35, 6), low, high))
        q = chain.inverse(pose, home)
        assert (q >= low).all() and (q <= high).all()
        np.testing.assert_allclose(chain.forward(q)[:3, 3], pose[:3, 3], atol=2e-3)


def test_what_cannot_be_reached_is_said(planar):
    far = np.eye(4)
    far[0, 3] = 3.0
    with pytest.raises(Unreachable, match="mm are left"):
        planar.inverse(far, np.zeros(2), rotation_weight=0.0)
    behind = np.eye(4)
    behind[:3, 3] = [-1.5, 0.0, 0.0]  # only with a joint beyond its range
    with pytest.raises(Unreachable):
        planar.inverse(behind, np.array([1.0, 0.1]), rotation_weight=0.0)


def test_an_unknown_link_is_named_with_the_known_ones(tmp_path, planar):
    with pytest.raises(ValueError, match=r"'hand'.*tip"):
        Chain.from_urdf(tmp_path / "planar.urdf", "hand")


def test_gripper_deltas_become_joint_targets_in_the_arms_units(planar):
    spec = ActionSpec(names=("x", "y", "z", "g"), frame="base_delta", rotation="none", gripper="close_is_1", rate=5.0)
    geometry = ArmGeometry(
        chain=planar, arm_joints=(1, 0), gripper=2, scale=(np.pi / 180,) * 2, offset=(0.0, 0.1), gripper_open=80.0
    )
    start = np.array([60.0, 20.0, 40.0])
    actions = np.array([[0.01, 0.02, 0, -1], [0.01, 0.02, 0, 1], [0, -0.03, 0, 0]])
    rows = joint_targets(actions, spec, start, geometry)
    begin = geometry.gripper_at(start)
    for row, moved in zip(rows, np.cumsum(actions[:, :3], axis=0), strict=True):
        np.testing.assert_allclose(geometry.gripper_at(row), begin + moved, atol=4e-3)
    assert rows[:, 2].tolist() == [80.0, 0.0, 40.0]
    with pytest.raises(SpecMismatch, match="URDF"):
        joint_targets(actions, spec, start)


def test_joint_deltas_build_on_each_other():
    spec = ActionSpec(names=("a", "b"), frame="joint_delta", rotation="none", gripper="none", rate=5.0)
    rows = joint_targets(np.array([[1, 0], [1, 2]]), spec, np.array([10.0, 20.0]))
    np.testing.assert_array_equal(rows, [[11, 20], [12, 22]])
