"""The SIMPLER scenes themselves; skipped where the assets are absent."""

import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "simpler_assets"
if SHARED.is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(SHARED))  # before anything imports mani_skill

from headrace.sim.simpler import CAMERA, TASKS, Layout, simpler_task  # noqa: E402
from headrace.sim.simpler_assets import missing_files  # noqa: E402
from headrace.sim.simpler_oracle import SimplerOracle, run_oracle  # noqa: E402
from headrace.sim.simpler_scene import Outcome, SimplerScene  # noqa: E402

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(any(missing_files(task) for task in TASKS.values()), reason="SIMPLER's scenes are not here"),
]
STILL = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)


@pytest.fixture(scope="module")
def stack():
    scene = SimplerScene("stack-cube", render=False)
    yield scene
    scene.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_succeeds_on_official_and_random_layouts(name):
    scene = SimplerScene(name, render=False)
    for episode in (13,):
        outcome = run_oracle(scene, episode)
        assert outcome.last and outcome.ever and outcome.grasped and outcome.consecutive_grasp, (name, episode, outcome)
        assert outcome.steps == scene.max_steps and 0 < outcome.first_step < 45 and outcome.moved_correct
    scene.layouts = "random"
    assert run_oracle(scene, 5, to_the_end=False).last
    scene.close()


def test_standing_still_succeeds_nowhere(stack):
    stack.reset(0)
    for _ in range(5):
        assert not stack.step(STILL).success
    assert stack.outcome == Outcome(steps=5)


def test_same_episode_and_actions_give_the_same_numbers(stack):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.02, 0.02, (8, 7))

    def play():
        stack.reset(3)
        return [stack.step(action).observation.state for action in actions], stack.simulation.objs

    first, objects = play()
    poses = [actor.pose.raw_pose.clone() for actor in objects.values()]
    second, objects = play()
    np.testing.assert_array_equal(first, second)
    for before, actor in zip(poses, objects.values(), strict=True):
        np.testing.assert_array_equal(before, actor.pose.raw_pose)


def test_objects_rest_where_the_original_records_them(stack):
    """The port's spawn heights are resting poses of the original; objects that we drop must come to them."""
    stack.reset(0)
    heights = [float(actor.pose.p[0, 2]) for actor in stack.simulation.objs.values()]
    assert heights == pytest.approx([0.8845, 0.8845], abs=1e-3)  # 0.87 table with its 0.5 mm, plus half a cube
    place = stack.simulation.objs[stack.task.source].pose.p[0, :2].numpy()
    np.testing.assert_allclose(place, stack.layout.source, atol=1e-3)


def test_a_turn_is_an_axis_angle_about_the_hand(stack):
    from scipy.spatial.transform import Rotation

    stack.reset(0)
    stack.step(np.array([0.03, 0, 0.03, 0, 0, 0, 1]))  # the arm now lags behind its target
    arm = stack.simulation.agent.controller.controllers["arm"]
    hand, before = arm.ee_pose_at_base.sp, arm._target_pose.sp
    turn = Rotation.from_rotvec([0.3, -0.2, 0.4])
    stack.step(np.array([0, 0, 0, 0.3, -0.2, 0.4, 1]))
    after = arm._target_pose.sp
    np.testing.assert_allclose(after.p, hand.p + turn.apply(before.p - hand.p), atol=1e-5)
    rotated = turn * Rotation.from_quat(np.roll(before.q, -1))
    assert (rotated * Rotation.from_quat(np.roll(after.q, -1)).inv()).magnitude() < 1e-4


@pytest.mark.parametrize(("port", "friction"), [("restored", 2.0), ("stock", 0.3)])
def test_each_port_has_its_finger_friction_and_says_so(port, friction):
    scene = SimplerScene("stack-cube", render=False, port=port)
    finger = scene.simulation.agent.finger1_link._objs[0]
    assert {round(shape.physical_material.static_friction, 3) for shape in finger.collision_shapes} == {friction}
    assert scene.describe()["finger_friction"] == friction and port in scene.describe()["environment"]
    scene.reset(2)
    assert not scene.step(STILL).success
    scene.close()


def test_the_state_is_the_controllers_pose_in_bridges_convention(stack):
    from scipy.spatial.transform import Rotation

    from headrace.sim.simpler_scene import DOWN

    stack.reset(2)
    stack.step(np.array([0.02, 0.01, 0.0, 0.2, -0.1, 0.3, 1]))
    arm = stack.simulation.agent.controller.controllers["arm"]
    pose = arm.ee_pose_at_base.sp
    turn = Rotation.from_quat(np.roll(pose.q, -1)).as_matrix() @ DOWN.T
    np.testing.assert_allclose(stack.state()[:3], pose.p, atol=1e-6)
    np.testing.assert_allclose(stack.state()[3:6], Rotation.from_matrix(turn).as_euler("xyz"), atol=1e-5)
    np.testing.assert_allclose(arm._hand(), arm.ee_pose_at_base.p, atol=1e-6)


@pytest.mark.slow
def test_what_a_gpu_would_ask_agrees_with_the_contact_list(stack):
    """Impulse that target and fingers do not explain is there exactly when the list shows another contact."""
    stack.reset(1)
    oracle, seen = SimplerOracle(stack), set()
    for _ in range(stack.max_steps):
        stack.step(oracle.act())
        exact = bool(stack.simulation.touches_others()[0])
        assert exact == bool(stack.simulation._residual_impulse()[0] > 1e-4)
        seen.add(exact)
    assert seen == {True, False}


def test_the_gripper_rate_and_place_follow_the_action(stack):
    start = stack.reset(0).state
    for _ in range(4):
        state = stack.step(np.array([0.02, 0, 0, 0, 0, 0, -1])).observation.state
    assert state[0] - start[0] == pytest.approx(0.08, abs=0.012)
    assert start[6] == pytest.approx(1.0) and state[6] < 0.05


def test_bad_actions_are_refused_before_they_reach_the_arm(stack):
    stack.reset(0)
    with pytest.raises(ValueError, match=r"\(7\).*\(6,\)|\(7,\)|\(7\)"):
        stack.step(np.zeros(6))
    with pytest.raises(ValueError, match="finite"):
        stack.step(np.full(7, np.nan))
    assert stack.outcome.steps == 0


def test_an_episode_has_its_official_length_and_no_step_more(stack):
    stack.reset(0)
    steps = [stack.step(STILL) for _ in range(60)]
    assert [step.truncated for step in steps] == [False] * 59 + [True]
    with pytest.raises(RuntimeError, match="reset"):
        stack.step(STILL)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="recorded layouts"):
        SimplerScene("stack-cube", port="stock", layouts="random")
    with pytest.raises(ValueError, match="multiple of 4"):
        SimplerScene("stack-cube", width=30)


def test_the_readings_of_an_episode_follow_their_definitions():
    quiet = dict.fromkeys(("is_src_obj_grasped", "consecutive_grasp", "moved_correct_obj", "moved_wrong_obj"), False)
    outcome = Outcome()
    for success in (False, True, True, False):
        outcome = outcome.after({**quiet, "success": success, "is_src_obj_grasped": success})
    assert outcome == Outcome(last=False, ever=True, first_step=2, grasped=True, steps=4)


@pytest.mark.render
def test_two_scenes_of_one_process_keep_their_own_backgrounds():
    """The port shares pictures and segment lists between environments; ours must not."""
    alone = SimplerScene("stack-cube", width=160)
    before = alone.reset(0).images[CAMERA]
    other = SimplerScene("eggplant-in-basket", width=160)
    sink = other.reset(0).images[CAMERA]
    again = alone.reset(0).images[CAMERA]
    np.testing.assert_array_equal(before, again)
    assert before.shape == sink.shape == (120, 160, 3) and before.dtype == np.uint8
    assert np.abs(before.astype(int) - sink).mean() > 20
    alone.close()
    other.close()


@pytest.mark.render
@pytest.mark.parametrize(("name", "picture"), [("stack-cube", "stack_cube"), ("spoon-on-towel", "spoon_on_towel")])
def test_first_frames_are_the_published_ones(name, picture):
    """Set HEADRACE_SIMPLER_PICTURES to SimplerEnv's images/example_visualization."""
    import cv2

    path = Path(os.environ.get("HEADRACE_SIMPLER_PICTURES", "absent")) / f"widowx_{picture}_visual_matching.png"
    if not path.is_file():
        pytest.skip("SimplerEnv's example pictures are not here")
    scene = SimplerScene(name)
    ours = scene.reset(0).images[CAMERA].astype(float)
    assert np.abs(ours - cv2.imread(str(path))[..., ::-1]).mean() < 2.0
    scene.close()


def test_a_layout_of_ones_own_can_be_started(stack):
    layout = Layout(source=(-0.2, 0.0), target=(-0.1, 0.05), yaw=0.3)
    stack.start(layout)
    np.testing.assert_allclose(
        stack.simulation.objs[simpler_task("stack-cube").target].pose.p[0, :2], (-0.1, 0.05), atol=1e-3
    )
