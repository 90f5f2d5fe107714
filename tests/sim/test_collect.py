"""From an expert to a dataset that LeRobot itself loads, to a rollout of the policy trained on it."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from headrace.sim.collect import CollectSettings, ExpertFails, collect
from headrace.sim.collect import demonstrations as demonstrations_of
from headrace.sim.run_folder import claim
from headrace.sim.tasks import Task, find_task
from headrace.sim.workers import Simulators

pytestmark = [pytest.mark.sim, pytest.mark.render]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos") / "push"
    task = find_task("PushCube-v1")
    small = replace(task, settings=(*task.settings, ("image_size", 64)))
    done = collect(small, CollectSettings(episodes=2, num_envs=1), folder)
    assert done.kept == 2
    return folder


def test_lerobot_loads_what_we_write(demonstrations):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/PushCube-v1", root=demonstrations)
    assert dataset.num_episodes == 2 and dataset.fps == 20 and dataset.meta.robot_type == "panda"
    sample = dataset[0]
    assert sample["observation.images.base_camera"].shape == (3, 64, 64)
    assert sample["action"].shape == (7,) and sample["task"] == "push the cube to the target"
    assert sample["observation.state"].shape == (15,)
    origin = json.loads((demonstrations / "meta" / "headrace.json").read_text())
    assert origin["spec"]["controller"] == "pd_ee_delta_pose" and origin["frames"] == len(dataset)


def test_our_reader_gives_the_same_numbers(demonstrations, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from headrace.datasets.lerobot_demos import LeRobotDemos

    theirs = LeRobotDataset("local/PushCube-v1", root=demonstrations)
    ours = LeRobotDemos(demonstrations, horizon=1, cache=tmp_path)
    batch = ours.batch(np.array([0, 5]))
    torch.testing.assert_close(batch.actions[1, 0], theirs[5]["action"])
    torch.testing.assert_close(batch.state[0], theirs[0]["observation.state"])
    picture = batch.images[1, 0, 0].permute(2, 0, 1).float() / 255
    assert (picture - theirs[5]["observation.images.base_camera"]).abs().mean() < 0.02


def test_an_existing_folder_is_refused(demonstrations):
    with pytest.raises(FileExistsError, match="exists already"):
        collect(find_task("PushCube-v1"), CollectSettings(episodes=1), demonstrations)


def test_a_checkpoint_of_other_cameras_or_actions_is_refused(demonstrations):
    from headrace.contracts import ActionSpec
    from headrace.robot.finetune import read_demonstrations
    from headrace.robot.vipra import VipraConfig

    spec = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)
    with pytest.raises(ValueError, match=r"(?s)base_camera.*wrist_camera|wrist_camera.*base_camera"):
        read_demonstrations([demonstrations], VipraConfig.tiny(spec, cameras=("wrist_camera",)))
    with pytest.raises(ValueError, match=r"7 action dimensions \(.*gripper.*\), wanted 3"):
        read_demonstrations([demonstrations], VipraConfig.tiny(spec))


def test_train_then_roll_out(demonstrations, tmp_path):
    """Two updates only: what is tested is that the parts fit, not that it learned."""
    from headrace.cli.main import main

    out = tmp_path / "policy"
    assert main(["finetune", "--dataset", str(demonstrations), "--out", str(out), "--size", "tiny", "--steps", "2",
                 "--batch-size", "2", "--precision", "fp32"]) == 0  # fmt: skip
    from headrace.robot.policy import load_policy
    from headrace.sim.rollout import RolloutSettings, roll_out

    task = find_task("PushCube-v1")
    small = replace(task, max_steps=6, settings=(*task.settings, ("image_size", 64)))
    policy = load_policy(str(out / "model"))
    results = roll_out([small], policy, RolloutSettings(episodes=1, videos=1), tmp_path / "run", policy_name="tiny")
    assert results["errors"] == 0 and results["env_steps"] == 6 and results["policy_ms_per_chunk"] > 0
    again = main(["finetune", "--dataset", str(demonstrations), "--out", str(tmp_path / "more"), "--init",
                  str(out / "model"), "--steps", "2", "--batch-size", "2", "--precision", "fp32"])  # fmt: skip
    assert again == 0


TOY = """
import os, time
import numpy as np
from headrace.contracts import ActionSpec, Observation
from headrace.sim.environment import Step

class Toy:
    spec = ActionSpec(names=("x",), frame="joint", rotation="none", gripper="none", rate=10.0)
    cameras, state_names, robot = ("eye",), ("x",), "stick"
    def __init__(self, task, **settings):
        self.reaches, self.share = settings.get("reaches", True), settings.get("share", 1)
    def observe(self):
        return Observation(images={"eye": np.zeros((64, 64, 3), np.uint8)}, state=np.zeros(1, np.float32))
    def reset(self, seed):
        self.seed = seed
        self.steps = 0
        if seed % 100 == 76: time.sleep(1000)
        if 76 < seed % 100 < 90: time.sleep(3)  # so that there is a while in which the hang can be noticed
        if seed % 100 == 96: os._exit(7)
        return self.observe()
    def step(self, action):
        self.steps += 1
        return Step(self.observe(), self.reaches and self.seed % self.share == 0 and self.steps > 2, {})
    def close(self): pass

class Expert:
    def __init__(self, environment): pass
    def reset(self): pass
    def act(self): return np.array([0.1], np.float32)

class Careful(Expert):
    acted = 0
    @property
    def finished(self): return self.acted >= 7
    def act(self):
        self.acted += 1
        return super().act()
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_to_collect.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"environment": "toy_to_collect:Toy", "expert": "toy_to_collect:Expert"}
    return Task(name="Toy", instruction="reach", max_steps=4, settings=(("reaches", True),), **names)


def test_an_expert_that_fails_ends_with_a_sentence_and_no_folder(toy, tmp_path, monkeypatch, capsys):
    import headrace.sim.tasks
    from headrace.cli.main import main

    never = replace(toy, settings=(("reaches", False),))
    monkeypatch.setattr(headrace.sim.tasks, "find_task", lambda name: never)
    assert main(["collect", "--task", "Toy", "--episodes", "5", "--out", str(tmp_path / "out"), "--num-envs", "1"]) == 1
    assert "only 0 of 25 demonstrations of Toy succeeded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_successes_too_rare_leave_nothing_half_written(toy, tmp_path):
    rare = replace(toy, settings=(("reaches", True), ("share", 10)))
    with pytest.raises(ExpertFails, match="only 3 of 25 demonstrations"):
        collect(rare, CollectSettings(episodes=5, seed=0), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_one_in_five_is_enough_and_the_last_one_counts(toy, tmp_path):
    rare = replace(toy, settings=(("reaches", True), ("share", 5)))
    kept = []
    with Simulators() as simulators:
        workers = simulators.assign(rare, None, 1)
        for episode, tried in demonstrations_of(rare, CollectSettings(episodes=5, seed=1), workers):
            kept.append((episode.seed, tried))
    assert kept == [(5, 5), (10, 10), (15, 15), (20, 20), (25, 25)]


def test_an_expert_that_has_more_to_do_after_success_does_it(toy):
    from headrace.sim.episode import EpisodeRunner, Perturbation

    for expert, steps in (("Expert", 5), ("Careful", 9)):  # success from step 3 on, finished at step 7
        task = replace(toy, max_steps=20, expert=f"toy_to_collect:{expert}")
        assert len(EpisodeRunner(task).demonstrate(1, Perturbation(), 2, 0).flags) == steps


def test_a_benchmarks_test_episodes_are_no_demonstrations(tmp_path):
    with pytest.raises(ValueError, match=r"seeds 0\.\.23 of simpler/stack-cube are its official test episodes.*got 5"):
        collect(find_task("simpler/stack-cube"), CollectSettings(episodes=1, seed=5), tmp_path / "out")


def test_a_full_disk_ends_with_a_sentence_and_no_folder(toy, tmp_path, monkeypatch, capsys):
    import headrace.sim.collect
    import headrace.sim.tasks
    from headrace.cli.main import main

    def full(dataset, episode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "episode.parquet")

    monkeypatch.setattr(headrace.sim.tasks, "find_task", lambda name: toy)
    arguments = ["collect", "--task", "Toy", "--episodes", "2", "--out", str(tmp_path / "out"), "--num-envs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(headrace.sim.collect, "_add", full)
        assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "free some space" in said
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0 and (tmp_path / "out" / "meta" / "info.json").exists()  # the next try is not in the way


def test_one_hung_simulator_of_two_is_noticed_and_costs_one_attempt(toy, tmp_path):
    done = collect(toy, CollectSettings(episodes=6, seed=75, num_envs=2, timeout=8.0), tmp_path / "out")
    assert done.kept == 6 and done.tried > 6
    info = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 6 and info["robot_type"] == "stick"


def test_a_simulator_that_dies_costs_one_attempt(toy, tmp_path):
    done = collect(toy, CollectSettings(episodes=3, seed=95, num_envs=1), tmp_path / "out")
    assert (done.kept, done.tried) == (3, 4)


def test_two_collects_into_one_folder_are_refused(toy, tmp_path):
    with claim(tmp_path / ".out.claim"), pytest.raises(FileExistsError, match="another run is writing"):
        collect(toy, CollectSettings(episodes=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
