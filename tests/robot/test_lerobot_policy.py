"""The policy inside LeRobot: its own train, eval and rollout commands, its checkpoints, the same actions as ours."""

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "lerobot_policy_vipra" / "src"))

from lerobot.configs import NormalizationMode  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors  # noqa: E402
from lerobot_policy_vipra import LeRobotVipraConfig, fast_pictures  # noqa: E402

from headrace.contracts import Observation  # noqa: E402
from headrace.robot.lerobot_checkpoint import load_network  # noqa: E402
from headrace.robot.policy import load_policy  # noqa: E402
from headrace.robot.vipra import VipraPolicy  # noqa: E402
from headrace.robot.vipra_pretraining import VipraPretraining, VipraPretrainingConfig  # noqa: E402

SIZE, FPS = 72, 10
CHANNELS = ["height", "width", "channel"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Pictures in tables, two tasks, numbers far from mean 0 and deviation 1."""
    root = tmp_path_factory.mktemp("lerobot") / "pushed"
    features = {
        "observation.images.image": {
            "dtype": "image",
            "shape": (SIZE, SIZE, 3),
            "names": ["height", "width", "channel"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    made = LeRobotDataset.create("local/pushed", FPS, features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for episode in range(2):
        for _ in range(10):
            made.add_frame(
                {
                    "observation.images.image": random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8),
                    "observation.state": random.normal(250, 40, 2).astype(np.float32),
                    "action": random.normal(200, 60, 2).astype(np.float32),
                    "task": ("push the T", "turn it")[episode],
                }
            )
        made.save_episode()
    made.finalize()
    return root


@pytest.fixture
def run(monkeypatch):
    """Run one of LeRobot's commands in this process, leaving the log as it was."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level

    def command(main, *options):
        monkeypatch.setattr(sys, "argv", [main.__module__, *options])
        main()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield command
    root.handlers[:], root.level = kept, level
    root.setLevel(level)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A folder of `lerobot-train`, two steps, for each way of normalising."""
    from lerobot.scripts.lerobot_train import main

    folders, argv = {}, sys.argv
    handlers = logging.getLogger().handlers[:]
    for normalization in ("network", "processors"):
        out = tmp_path_factory.mktemp("out") / normalization
        sys.argv = [
            "lerobot-train",
            "--policy.type=vipra",
            "--policy.size=tiny",
            f"--policy.normalization={normalization}",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            "--dataset.repo_id=local/pushed",
            f"--dataset.root={dataset}",
            "--batch_size=4",
            "--num_workers=0",
            "--steps=2",
            "--save_freq=2",
            "--log_freq=1",
            "--env_eval_freq=0",
            f"--output_dir={out}",
        ]
        main()
        folders[normalization] = out / "checkpoints" / "last" / "pretrained_model"
    sys.argv, logging.getLogger().handlers[:] = argv, handlers
    return folders


def lerobot_actions(folder, observation, noise):
    """What LeRobot's own pipeline makes of an observation: pre-processor, policy, post-processor."""
    policy = get_policy_class("vipra").from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
    batch = {
        "observation.images.image": torch.from_numpy(observation.images["image"]).permute(2, 0, 1).float()[None] / 255,
        "observation.state": torch.from_numpy(observation.state)[None],
        "task": [observation.instruction],
    }
    return after(policy.predict_action_chunk(before(batch), noise=noise)).numpy()


@pytest.mark.parametrize("normalization", ["network", "processors"])
def test_a_checkpoint_of_lerobot_acts_the_same_in_both_loaders_and_is_normalised_once(trained, dataset, normalization):
    folder = trained[normalization]
    random = np.random.default_rng(1)
    observation = Observation(
        images={"image": random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)},
        state=np.array([300.0, 210.0], np.float32),
        instruction="push the T",
    )
    ours = load_policy(str(folder), device="cpu")
    ours.reset(0, seed=3)
    actions = ours.act([observation], [0]).actions
    noise = torch.randn(actions.shape[1:], generator=torch.Generator().manual_seed(3))[None]
    np.testing.assert_allclose(actions, lerobot_actions(folder, observation, noise), rtol=1e-4, atol=1e-2)
    stats = json.loads((dataset / "meta" / "stats.json").read_text())["action"]
    np.testing.assert_allclose(ours.model.config.action_normalizer.shift, stats["mean"], rtol=1e-5)
    np.testing.assert_allclose(ours.model.config.action_normalizer.scale, stats["std"], rtol=1e-5)
    assert ours.model.config.words == ("it", "push", "t", "the", "turn")
    assert ours.spec.rate == FPS and ours.spec.names == ("x", "y")


def test_both_ways_of_normalising_train_to_the_same_weights(trained):
    """The same affine map before the same network: only the place differs."""
    one, other = (load_network(trained[name]).state_dict() for name in ("network", "processors"))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4, msg=key)


def test_lerobot_evaluates_and_trains_the_checkpoint_further(run, trained, dataset, tmp_path):
    pytest.importorskip("gym_pusht")
    from lerobot.scripts.lerobot_eval import main as evaluate
    from lerobot.scripts.lerobot_train import main as train

    run(
        evaluate,
        f"--policy.path={trained['network']}",
        "--policy.device=cpu",
        "--env.type=pusht",
        "--env.episode_length=5",
        '--rename_map={"observation.image": "observation.images.image"}',
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'eval'}",
    )
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
    again = trained["network"].parents[1] / "last" / "pretrained_model" / "train_config.json"
    run(train, f"--config_path={again}", "--resume=true", "--steps=3")
    steps = json.loads((trained["network"].parent / "training_state" / "training_step.json").read_text())
    assert steps["step"] == 3


def test_our_checkpoint_is_trained_further_in_lerobot(dataset, trained, tmp_path):
    load_network(trained["processors"]).save_pretrained(tmp_path / "ours")
    config = LeRobotVipraConfig(init=str(tmp_path / "ours"), device="cpu")
    meta = LeRobotDataset("local/pushed", root=dataset).meta
    policy = make_policy(config, ds_meta=meta)
    for key, value in load_network(tmp_path / "ours").state_dict().items():
        torch.testing.assert_close(policy.model.state_dict()[key], value)
    assert policy.model.config.action_normalizer == load_network(tmp_path / "ours").config.action_normalizer


def test_a_network_pretrained_on_videos_becomes_a_policy(dataset, tmp_path):
    """At a stride of 2 and 5 steps a second, so the dataset of 10 Hz is at the videos' own rate."""
    tiny = VipraPretrainingConfig.tiny()
    record = replace(tiny.record, rate=FPS / 2, stride=2, history=(-1, 0))
    torch.manual_seed(0)
    source = VipraPretraining(replace(tiny, record=record, history=(-1, 0)))
    source.save_pretrained(tmp_path / "pretrained")
    meta = LeRobotDataset("local/pushed", root=dataset).meta
    config = LeRobotVipraConfig(init=str(tmp_path / "pretrained"), device="cpu", chunk_size=6)
    assert config.history == config.observation_delta_indices == [-2, 0] and config.camera_size == 64
    policy = make_policy(config, ds_meta=meta)
    ours = policy.model.config
    assert ours.decoder.horizon == 6 and ours.pretraining == record
    assert set(tiny.words) | {"t", "turn"} <= set(ours.words)
    for name in ("backbone.norm.weight", "view.weight", "image_tokens.project.weight"):
        torch.testing.assert_close(policy.model.state_dict()[name], source.state_dict()[name], rtol=0, atol=0)
    batch = {
        "observation.images.image": torch.rand(2, 2, 3, SIZE, SIZE),
        "observation.state": torch.rand(2, 2, 2),
        "action": torch.rand(2, 6, 2),
        "task": ["push the T"] * 2,
    }
    assert torch.isfinite(policy(batch)[0])
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "pretrained").rename(tmp_path / "elsewhere")  # a robot has not what the training machine had
    again = get_policy_class("vipra").from_pretrained(tmp_path / "policy")
    assert torch.equal(again.model.view.weight, policy.model.view.weight) and again.config.history == [-2, 0]
    VipraPretraining(replace(tiny, record=replace(record, rate=7.0), history=(-1, 0))).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="7 steps a second on videos of 14 Hz, the demonstrations have 10"):
        make_policy(LeRobotVipraConfig(init=str(tmp_path / "odd"), device="cpu"), ds_meta=meta)


def test_a_dataset_at_the_labels_rate_is_told_the_history_to_give(dataset, tmp_path):
    tiny = VipraPretrainingConfig.tiny()
    record = replace(tiny.record, rate=float(FPS), stride=4, history=(-1, 0))
    VipraPretraining(replace(tiny, record=record, history=(-1, 0))).save_pretrained(tmp_path)
    meta = LeRobotDataset("local/pushed", root=dataset).meta
    with pytest.raises(ValueError, match=r"frames \(-1, 0\), the policy is to see \(-4, 0\): give --policy\.history"):
        make_policy(LeRobotVipraConfig(init=str(tmp_path), device="cpu"), ds_meta=meta)
    policy = make_policy(LeRobotVipraConfig(init=str(tmp_path), device="cpu", history=[-1, 0]), ds_meta=meta)
    assert policy.config.observation_delta_indices == [-1, 0]


def test_the_learning_rate_is_the_widths_own_unless_given():
    assert LeRobotVipraConfig(device="cpu", size="tiny").optimizer_lr == 5e-4
    published = LeRobotVipraConfig(device="cpu", size="published")
    assert published.optimizer_lr == published.get_scheduler_preset().peak_lr == 4e-5
    assert LeRobotVipraConfig(device="cpu", size="tiny", optimizer_lr=1e-3).get_optimizer_preset().lr == 1e-3


def test_a_dataset_of_another_rate_is_refused_unless_named(dataset, trained, tmp_path):
    ours = load_network(trained["network"])
    spec = ours.config.action_spec
    faster = replace(ours.config, spec=replace(spec, rate=2 * FPS).to_dict())
    VipraPolicy(faster).save_pretrained(tmp_path / "faster")
    meta = LeRobotDataset("local/pushed", root=dataset).meta
    with pytest.raises(ValueError, match="acts 20 times a second, the dataset has 10 frames"):
        make_policy(LeRobotVipraConfig(init=str(tmp_path / "faster"), device="cpu"), ds_meta=meta)
    make_policy(LeRobotVipraConfig(init=str(tmp_path / "faster"), device="cpu", override=["rate"]), ds_meta=meta)
    with pytest.raises(ValueError, match="takes history and rate, got speed"):
        LeRobotVipraConfig(device="cpu", override=["speed"])


@pytest.mark.parametrize("shape", [(96, 128), (100, 72), (48, 40), (50, 120)])
def test_pictures_of_other_sizes_are_stretched_as_headrace_does(shape):
    from lerobot_policy_vipra.stretching import stretched

    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    wanted = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    given = stretched(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, SIZE)
    got = (given[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(got - wanted).max() <= 1 and (got != wanted).mean() < 0.1


def test_pictures_are_stretched_in_full_precision_whatever_lerobot_allows(monkeypatch):
    from lerobot_policy_vipra import stretching

    seen, matrices = [], stretching._matrices
    before = torch.backends.cuda.matmul.allow_tf32
    allowed = lambda: torch.backends.cuda.matmul.allow_tf32  # noqa: E731
    monkeypatch.setattr(stretching, "_matrices", lambda *shape: seen.append(allowed()) or matrices(*shape))
    try:
        torch.backends.cuda.matmul.allow_tf32 = True  # as lerobot-train and lerobot-eval do
        stretching.stretched(torch.rand(1, 3, 48, 64), 32)
        assert seen == [False] and allowed()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_options_that_contradict_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="normalise twice"):
        LeRobotVipraConfig(device="cpu", normalization_mapping={"ACTION": NormalizationMode.MEAN_STD})
    with pytest.raises(ValueError, match="n_action_steps"):
        LeRobotVipraConfig(device="cpu", size="tiny", n_action_steps=9)
    saved = json.loads((trained["network"] / "config.json").read_text())
    with pytest.raises(ValueError, match="the network has chunk_size 4"):
        LeRobotVipraConfig(device="cpu", network=saved["network"], chunk_size=8)
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / "config.json").write_text(json.dumps({"type": "act"}))
    with pytest.raises(ValueError, match="'act'"):
        load_network(tmp_path / "act")


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for file in trained["network"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop(next(iter(state)))
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        get_policy_class("vipra").from_pretrained(folder)


@pytest.mark.parametrize("episodes", [None, [1]])
def test_fast_reading_gives_the_same_samples_and_decodes_one_picture(dataset, monkeypatch, episodes):
    windows = {
        "action": [i / FPS for i in range(5)],
        "observation.images.image": [-0.1, 0.0],
        "observation.state": [-0.1, 0.0],
    }
    fast_pictures.uninstall()
    stock = LeRobotDataset("local/pushed", root=dataset, episodes=episodes, delta_timestamps=windows)
    wanted = [stock[i] for i in range(len(stock))]
    assert fast_pictures.install()
    quick = LeRobotDataset("local/pushed", root=dataset, episodes=episodes, delta_timestamps=windows)
    for row, sample in enumerate(wanted):
        got = quick[row]
        assert set(got) == set(sample)
        for key, value in sample.items():
            assert got[key] == value if isinstance(value, str) else torch.equal(got[key], value), key
    from PIL import PngImagePlugin

    opened = []
    original = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: opened.append(1) or original(self))
    plain = LeRobotDataset("local/pushed", root=dataset, delta_timestamps={"action": windows["action"]})
    plain[0]
    opened.clear()
    plain[3]
    fast = len(opened)
    fast_pictures.uninstall()
    opened.clear()
    plain[3]
    fast_pictures.install()
    assert fast * 3 < len(opened)


@dataclass
class Arm:
    """A robot with two joints and a camera that remembers what it was sent."""

    id: str = "arm"
    type: str = "arm"
    cameras: tuple = ()

    def __post_init__(self):
        self.name, self.robot_type, self.config, self.is_connected, self.sent = "arm", "arm", self, False, []
        self.action_features = {"x.pos": float, "y.pos": float}
        self.observation_features = {**self.action_features, "image": (SIZE, SIZE, 3)}
        self.is_calibrated = True

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        return {"x.pos": 250.0, "y.pos": 250.0, "image": np.zeros((SIZE, SIZE, 3), np.uint8)}

    def send_action(self, action):
        self.sent.append([action["x.pos"], action["y.pos"]])
        return action


@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rolls_it_out_on_an_arm(run, trained, monkeypatch, inference):
    from lerobot.robots import RobotConfig
    from lerobot.rollout import context
    from lerobot.scripts.lerobot_rollout import main
    from lerobot_policy_vipra import modeling_vipra

    prefixes = []
    sample_after = modeling_vipra.sample_after
    monkeypatch.setattr(
        modeling_vipra, "sample_after", lambda *a, **k: prefixes.append(k["prefix"].shape) or sample_after(*a, **k)
    )
    if "still_arm" not in RobotConfig.get_known_choices():

        @RobotConfig.register_subclass("still_arm")
        @dataclass
        class StillArmConfig(RobotConfig):
            pass

    arm = Arm()
    monkeypatch.setattr(context, "make_robot_from_config", lambda config: arm)
    options = ["--inference.rtc.execution_horizon=3", "--inference.queue_threshold=3"] if inference == "rtc" else []
    fps, duration = (2, 6) if inference == "rtc" else (FPS, 2)  # slow enough that a rest is left on a busy machine
    run(
        main,
        "--strategy.type=base",
        f"--policy.path={trained['network']}",
        "--policy.device=cpu",
        f"--inference.type={inference}",
        *options,
        "--robot.type=still_arm",
        "--task=push the T",
        f"--fps={fps}",
        f"--duration={duration}",
        "--play_sounds=false",
    )
    assert len(arm.sent) > 2 and np.isfinite(arm.sent).all() and np.ptp(arm.sent, 0).min() > 0
    assert bool(prefixes) == (inference == "rtc")


def test_the_asynchronous_server_takes_it(trained, tmp_path, monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.chdir(tmp_path)  # the server keeps its logs in the present folder
    import pickle
    from types import SimpleNamespace

    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot_policy_vipra import serve

    serve.allow()
    server = PolicyServer(PolicyServerConfig(host="127.0.0.1", port=8099))
    features = {
        "observation.images.image": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": CHANNELS},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x.pos", "y.pos"]},
    }
    wanted = RemotePolicyConfig("vipra", str(trained["network"]), features, actions_per_chunk=3, device="cpu")
    peer = SimpleNamespace(peer=lambda: "test")
    server.SendPolicyInstructions(SimpleNamespace(data=pickle.dumps(wanted)), peer)
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    raw = {"image": picture, "x.pos": 250.0, "y.pos": 240.0, "task": "turn it"}
    chunk = server._predict_action_chunk(TimedObservation(timestamp=0.0, timestep=0, observation=raw))
    assert len(chunk) == 3 and all(torch.isfinite(action.get_action()).all() for action in chunk)


def test_vla_evals_bridge_gives_the_actions_of_lerobots_own_pipeline(trained):
    bridge = pytest.importorskip("vla_eval.model_servers.lerobot")
    folder = trained["network"]
    server = bridge.LeRobotModelServer("vipra", str(folder), device="cpu")
    policy, noise = server._policy, torch.randn(1, 14, 2, generator=torch.Generator().manual_seed(5))
    whole = policy.predict_action_chunk
    noise = noise[:, : policy.config.chunk_size]
    policy.predict_action_chunk = lambda batch: whole(batch, noise=noise)
    random = np.random.default_rng(2)
    picture = random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    state = np.array([280.0, 190.0], np.float32)
    told = server.predict({"images": {"primary": picture}, "states": state, "task_description": "turn it"}, None)
    observation = Observation(images={"image": picture}, state=state, instruction="turn it")
    np.testing.assert_allclose(told["actions"], lerobot_actions(folder, observation, noise)[0], rtol=1e-4, atol=1e-2)
    assert server.chunk_size == policy.config.n_action_steps
