import subprocess
import sys

import numpy as np
import pytest

from headrace.sim.environment import InvalidAction
from headrace.sim.tasks import find_task, make_environment

pytestmark = pytest.mark.sim


def test_no_vulkan_device_is_one_clear_error():
    code = "import sys; from headrace.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "rollout", "random", "--task", "PushCube-v1", "--episodes", "1"]
    nowhere = {"VK_DRIVER_FILES": "/dev/null", "VK_ICD_FILENAMES": "/dev/null"}
    import os

    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **nowhere})
    assert done.returncode == 2
    assert "no usable Vulkan device" in done.stderr and "scripts/setup.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_only_computes_leaves_drawing_to_the_processor(monkeypatch):
    from headrace.sim import maniskill

    tried, working, failure = [], ["gpu"], RuntimeError("failed to find a rendering device")

    def make(name, *, render_backend, **options):
        tried.append(render_backend)
        if render_backend not in working:
            raise failure
        return render_backend

    monkeypatch.setattr(maniskill.gym, "make", make)
    monkeypatch.setattr(maniskill, "render_backends", lambda: ("gpu", "cpu"))
    assert maniskill.build("PushCube-v1", render=True) == "gpu" and tried == ["gpu"]
    working[:] = ["cpu"]
    assert maniskill.build("PushCube-v1", render=True) == "cpu" and tried == ["gpu", "gpu", "cpu"]
    working.clear()
    with pytest.raises(maniskill.NoVulkanDevice, match=r"rendering device\).*doctor.*scripts/setup\.sh"):
        maniskill.build("PushCube-v1", render=True)
    failure = RuntimeError("out of memory")  # nothing that another device would mend
    with pytest.raises(RuntimeError, match="out of memory"):
        maniskill.build("PushCube-v1", render=True)
    assert tried[-3:] == ["gpu", "cpu", "gpu"]


def test_the_environment_declares_what_it_gives():
    task = find_task("PickCube-v1")
    from dataclasses import replace

    environment = make_environment(replace(task, settings=(*task.settings, ("render", False))))
    seen = environment.reset(3)
    assert len(seen.state) == len(environment.state_names) == 15 and seen.instruction == task.instruction
    goal = environment.base.goal_site.pose.p[0].numpy()
    assert environment.spec.rate == 20 and environment.spec.dim == 7
    assert np.abs(goal).max() > 0
    with pytest.raises(InvalidAction, match="roll is nan"):
        environment.step(np.array([0, 0, 0, np.nan, 0, 0, 1], np.float32))
    with pytest.raises(InvalidAction, match=r"x is 2, outside its bounds \[-1, 1\]"):
        environment.step(np.array([2, 0, 0, 0, 0, 0, 1], np.float32))
    with pytest.raises(InvalidAction, match="needs 7 numbers"):
        environment.step(np.zeros(3))
    environment.close()


@pytest.mark.render
def test_the_goal_is_handed_out_beside_the_picture():
    task = find_task("PickCube-v1")
    environment = make_environment(task)
    seen = environment.reset(3)
    np.testing.assert_allclose(seen.state[-3:], environment.base.goal_site.pose.p[0].numpy(), atol=1e-6)
    assert seen.images["base_camera"].shape == (224, 224, 3) and seen.images["base_camera"].std() > 10
    moved = environment.step(np.array([1, 0, 0, 0, 0, 0, 1], np.float32)).observation
    assert moved.state[9] > seen.state[9]  # +x moves the tool centre point along +x
    environment.close()


@pytest.mark.render
def test_leaving_pictures_out_changes_nothing_else():
    actions = np.linspace(-0.5, 0.5, 35, dtype=np.float32).reshape(5, 7)
    environment = make_environment(find_task("PickCube-v1"))
    environment.reset(3)
    drawn = [environment.step(action) for action in actions]
    environment.reset(3)
    environment.drawing = False
    blind = [environment.step(action) for action in actions[:-1]]
    environment.drawing = True
    last = environment.step(actions[-1])
    environment.close()
    assert not any(step.observation.images for step in blind)
    for one, other in zip(drawn, [*blind, last], strict=True):
        np.testing.assert_array_equal(one.observation.state, other.observation.state)
        assert one.readings == other.readings and one.success == other.success
    picture = drawn[-1].observation.images["base_camera"]
    np.testing.assert_array_equal(last.observation.images["base_camera"], picture)
