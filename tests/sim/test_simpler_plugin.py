"""SIMPLER as a LeRobot environment: found by LeRobot, both success rules, conventions converted."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "lerobot_env_simpler" / "src"))
if (ROOT.parent / "shared" / "simpler_assets").is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(ROOT.parent / "shared" / "simpler_assets"))

from lerobot_env_simpler import SimplerEnvConfig, environment  # noqa: E402

from headrace.contracts import Observation  # noqa: E402
from headrace.sim.simpler import CAMERA, TASKS, simpler_task  # noqa: E402
from headrace.sim.simpler_assets import missing_files  # noqa: E402
from headrace.sim.simpler_scene import Outcome, SimplerStep  # noqa: E402


class Script:
    """A scene whose success follows a script, and that remembers what it was sent."""

    def __init__(self, successes):
        self.successes, self.actions, self.seeds = successes, [], []

    def _look(self):
        return Observation(images={CAMERA: np.zeros((48, 64, 3), np.uint8)}, state=np.zeros(7, np.float32))

    def reset(self, seed):
        self.seeds.append(seed)
        self.outcome = Outcome()
        return self._look()

    def step(self, action):
        self.actions.append(action)
        success = self.successes[self.outcome.steps]
        names = ("is_src_obj_grasped", "consecutive_grasp", "moved_correct_obj", "moved_wrong_obj")
        self.outcome = self.outcome.after({**dict.fromkeys(names, False), "success": success})
        done = self.outcome.steps == len(self.successes)
        return SimplerStep(self._look(), success, done, {"outcome": self.outcome})


def scripted(monkeypatch, successes, **options):
    script = Script(successes)
    monkeypatch.setattr(environment, "SimplerScene", lambda task, **kwargs: script)
    env = environment.SimplerGymEnv("stack-cube", width=64, **options)
    env.reset(seed=1000)
    return env, script


def play(env):
    seen, ended = [], False
    while not ended:
        _, _, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        seen.append(info["is_success"])
        ended = terminated or truncated
    return seen, info


@pytest.mark.parametrize(
    ("successes", "last", "ever"),
    [
        ([False, True, True, False], [False] * 4, [False, True]),
        ([False, False, False, True], [False, False, False, True], [False, False, False, True]),
        ([False] * 4, [False] * 4, [False] * 4),
    ],
)
def test_official_success_is_seen_at_the_end_only_and_lerobots_at_once(monkeypatch, successes, last, ever):
    seen, info = play(scripted(monkeypatch, successes)[0])
    assert seen == last and info["success_ever"] == any(successes)
    assert play(scripted(monkeypatch, successes, success="ever")[0])[0] == ever


def test_seeds_reach_the_scene_and_lerobots_options_do_not(monkeypatch):
    env, script = scripted(monkeypatch, [False] * 4)
    env.reset(seed=7, options={"lerobot_new_rollout": True})
    env.reset()
    assert script.seeds == [1000, 7, 8]


def test_conventions_of_the_policy_are_converted(monkeypatch):
    from scipy.spatial.transform import Rotation

    env, script = scripted(monkeypatch, [False] * 4, rotation="euler_xyz", gripper="unit")
    env.step(np.array([0.01, 0, 0, 0.2, -0.3, 0.4, 0.7], np.float32))
    sent = script.actions[0]
    turn = Rotation.from_euler("xyz", [0.2, -0.3, 0.4])
    np.testing.assert_allclose(Rotation.from_rotvec(sent[3:6]).as_matrix(), turn.as_matrix(), atol=1e-6)
    assert sent[6] == 1.0 and sent[0] == pytest.approx(0.01)
    env.step(np.array([0, 0, 0, 0, 0, 0, 0.3], np.float32))
    assert script.actions[1][6] == -1.0


def test_lerobot_knows_it_by_name():
    from lerobot.envs.configs import EnvConfig

    assert EnvConfig.get_choice_class("simpler") is SimplerEnvConfig
    config = SimplerEnvConfig()
    assert [simpler_task(task).name for task in config.task.split(",")] == list(TASKS)
    assert set(config.features) == set(config.features_map)
    for bad in ({"success": "latch"}, {"task": "stack"}, {"port": "stock"}):
        with pytest.raises(ValueError):
            SimplerEnvConfig(**bad)


@pytest.mark.sim
@pytest.mark.render
@pytest.mark.skipif(bool(missing_files(simpler_task("stack-cube"))), reason="SIMPLER's scenes are not here")
def test_lerobots_evaluation_loop_runs_on_it():
    """The observation goes through LeRobot's own preprocessing and a short rollout."""
    from lerobot.envs.utils import preprocess_observation

    made = SimplerEnvConfig(task="stack-cube", width=64).create_envs(1)["simpler"][0]
    observation, _ = made.reset(seed=[24])
    batch = preprocess_observation(observation)
    assert batch["observation.images.image"].shape == (1, 3, 48, 64)
    assert batch["observation.state"].shape == (1, 7)
    assert 0 < float(batch["observation.images.image"].mean()) < 1
    assert made.call("task_description") == (simpler_task("stack-cube").instruction,)
    assert made.call("_max_episode_steps") == (60,)
    _, reward, terminated, truncated, info = made.step(np.zeros((1, 7), np.float32))
    assert not (reward.any() or terminated.any() or truncated.any()) and not info["is_success"].any()
    made.close()


@pytest.mark.sim
@pytest.mark.render
@pytest.mark.slow
@pytest.mark.skipif(bool(missing_files(simpler_task("stack-cube"))), reason="SIMPLER's scenes are not here")
def test_lerobots_eval_command_runs_a_task_to_its_end(tmp_path, monkeypatch):
    """LeRobot's own command with a random ACT: all 60 steps under the official rule, the numbers and the video."""
    import json
    import logging

    from lerobot.scripts.lerobot_eval import main

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    small = (
        "dim_model=32",
        "n_heads=2",
        "dim_feedforward=32",
        "n_encoder_layers=1",
        "pretrained_backbone_weights=null",
    )
    options = ["--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false"]
    options += [f"--policy.{option}" for option in small]
    options += ["--env.type=simpler", "--env.task=stack-cube", "--env.width=64"]
    options += ["--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path / 'eval'}"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *options])
    try:
        main()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    metrics = info["per_task"][0]["metrics"]
    assert info["overall"]["n_episodes"] == 1 and len(metrics["successes"]) == 1
    assert Path(metrics["video_paths"][0]).stat().st_size > 0
