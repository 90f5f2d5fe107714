"""From a pretrained network and LeRobot demonstrations to a policy that acts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from headrace.contracts import Observation
from headrace.robot.finetune import FinetuneSettings, train_policy, usual_lr
from headrace.robot.lora import LoraSettings, add_adapters, merged_state, without_adapters
from headrace.robot.policy import BinsPolicy, FlowPolicy, load_policy
from headrace.robot.policy_start import Start, prepare
from headrace.robot.vipra_config import BackboneConfig
from headrace.robot.vipra_pretraining import VipraPretraining, VipraPretrainingConfig

FPS = 20
QUICK = FinetuneSettings(steps=2, batch_size=4, lr=1e-3, precision="fp32", ema=0.5, checkpoint_every=2, log_every=1)


def recorded(root: Path, high: int = 64, wide: int = 64) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    random, names = np.random.default_rng(0), ["height", "width", "channel"]
    features = {
        f"observation.images.{name}": {"dtype": "image", "shape": (high, wide, 3), "names": names}
        for name in ("base", "wrist")
    }
    features["observation.state"] = {"dtype": "float32", "shape": (4,), "names": list("abcd")}
    features["action"] = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "gripper"]}
    made = LeRobotDataset.create("local/demos", FPS, features, root=root, use_videos=False)
    for episode in range(3):
        for _ in range(6):
            frame = {key: random.integers(0, 256, (high, wide, 3), np.uint8) for key in list(features)[:2]}
            frame["observation.state"] = random.normal(size=4).astype(np.float32)
            frame["action"] = random.normal(size=3).astype(np.float32)
            made.add_frame({**frame, "task": ["push the cube", "lift it"][episode % 2]})
        made.save_episode()
    made.finalize()
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return recorded(tmp_path_factory.mktemp("demos") / "set")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    VipraPretraining(VipraPretrainingConfig.tiny()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def observation() -> Observation:
    images = {name: np.zeros((64, 64, 3), np.uint8) for name in ("base", "wrist")}
    return Observation(images=images, state=np.zeros(4, np.float32), instruction="push the cube")


def test_a_pretrained_trunk_drives_two_cameras(dataset, pretrained, tmp_path):
    model, data, report = prepare([dataset], Start(init=str(pretrained), demonstrations=2))
    source = VipraPretraining.from_pretrained(pretrained)
    assert {name.split(".")[0] for name in report.fresh} == {"decoder", "proprio"}
    assert torch.equal(model.view.weight, source.view.weight.repeat(2, 1))
    assert len(data) == 12 and model.config.decoder.horizon == 3
    assert model.config.words == ("cube", "it", "lift", "pull", "push", "the")
    assert model.config.pretraining == source.config.record
    train_policy(model, data, QUICK, tmp_path)
    policy = load_policy(str(tmp_path / "model"))
    assert isinstance(policy, FlowPolicy) and policy.model.config.pretraining == source.config.record
    policy.reset(0, seed=0)
    assert policy.act([observation()], [0]).actions.shape == (1, 3, 3)


def test_the_discrete_head_starts_from_the_same_trunk(dataset, pretrained, tmp_path):
    model, data, _ = prepare([dataset], Start(init=str(pretrained), head="bins", bins=8))
    source = VipraPretraining.from_pretrained(pretrained)
    assert torch.equal(model.backbone.norm.weight, source.backbone.norm.weight)
    assert len(model.config.bins.values[2]) == 2  # the gripper
    train_policy(model, data, QUICK, tmp_path)
    policy = load_policy(str(tmp_path / "model"))
    assert isinstance(policy, BinsPolicy) and policy.horizon == 3
    policy.reset(0, seed=0)
    assert policy.act([observation()], [0]).actions.shape == (1, 3, 3)


def test_a_policy_goes_on_from_its_checkpoint(dataset, pretrained, tmp_path):
    model, _, _ = prepare([dataset], Start(init=str(pretrained), head="bins", bins=8))
    model.save_pretrained(tmp_path)
    again, data, report = prepare([dataset], Start(init=str(tmp_path)))
    assert report is None and len(data) == 18
    assert again.config.bins == model.config.bins and again.config.pretraining == model.config.pretraining


def test_the_same_network_from_scratch_shares_nothing(dataset, pretrained):
    taught, _, _ = prepare([dataset], Start(init=str(pretrained)))
    fresh, _, report = prepare([dataset], Start(init=str(pretrained), carry=False, seed=1))
    assert report is None and fresh.config == replace(taught.config, pretraining=None)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (taught, fresh)]
    assert shapes[0] == shapes[1]
    name = "backbone.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(taught.state_dict()[name], fresh.state_dict()[name])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"history": (-2, 0)}, "--override history"),
        ({"lam_hash": "b" * 16}, "not of"),
        ({"demonstrations": 9}, "asked for"),
    ],
)
def test_what_does_not_fit_is_refused(dataset, pretrained, start, message):
    with pytest.raises(ValueError, match=message):
        prepare([dataset], Start(init=str(pretrained), **start))


def test_another_rate_than_pretraining_s_is_refused_unless_named(dataset, tmp_path):
    tiny = VipraPretrainingConfig.tiny()
    VipraPretraining(replace(tiny, record=replace(tiny.record, rate=5.0))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="5 steps a second, the demonstrations have 20"):
        prepare([dataset], Start(init=str(tmp_path)))
    model, _, _ = prepare([dataset], Start(init=str(tmp_path), override=("rate",)))
    assert model.config.pretraining.rate == 5.0


def test_videos_read_with_a_stride_teach_a_policy_at_their_own_rate(dataset, tmp_path):
    """Four frames of the videos a step: the labels' horizon counts steps of 0.2 s, the chunk actions of 0.05 s."""
    tiny = VipraPretrainingConfig.tiny()
    record = replace(tiny.record, rate=FPS / 4, stride=4, history=(-1, 0))
    VipraPretraining(replace(tiny, record=record, history=(-1, 0))).save_pretrained(tmp_path)
    model, data, _ = prepare([dataset], Start(init=str(tmp_path), horizon=5))
    assert model.config.history == (-4, 0) and model.config.decoder.horizon == 5
    assert data.batch(np.array([0])).actions.shape == (1, 5, 3)
    assert model.config.pretraining.horizon == 3
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="chunks of 5 actions, asked for 6"):
        prepare([dataset], Start(init=str(tmp_path / "policy"), horizon=6))


def test_the_published_width_gets_the_published_rate():
    config = VipraPretrainingConfig.tiny()
    assert usual_lr(config) == 5e-4
    assert usual_lr(replace(config, backbone=BackboneConfig(), image=replace(config.image, width=4096))) == 4e-5


def test_a_config_without_statistics_is_refused(dataset, pretrained, tmp_path):
    import json

    model, _, _ = prepare([dataset], Start(init=str(pretrained)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["action_normalizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="action_normalizer"):
        load_policy(str(tmp_path))


def test_adapters_learn_alone_and_are_merged_when_saved(dataset, pretrained, tmp_path):
    pytest.importorskip("peft")
    model, data, _ = prepare([dataset], Start(init=str(pretrained)))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    count = add_adapters(model, LoraSettings(rank=2, alpha=4))
    assert count == sum(p.numel() for n, p in model.backbone.named_parameters() if p.requires_grad)
    with torch.no_grad():  # without an update an adapter adds nothing
        assert all(torch.equal(value, base[name]) for name, value in merged_state(model).items())
    train_policy(model, data, QUICK, tmp_path)
    name = "backbone.layers.0.mlp.up_proj"
    assert torch.equal(model.state_dict()[f"{name}.base_layer.weight"], base[f"{name}.weight"])
    saved = load_policy(str(tmp_path / "model")).model
    assert not torch.equal(saved.state_dict()[f"{name}.weight"], base[f"{name}.weight"])
    plain = without_adapters(model).eval()
    rows = torch.randn(1, 5, 32)
    with torch.no_grad():
        mine = model.eval().backbone(inputs_embeds=rows).last_hidden_state
        theirs = plain.backbone(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_camera_that_is_not_square_trains_and_acts(tmp_path, pretrained):
    wide = recorded(tmp_path / "wide", high=48, wide=96)
    model, data, _ = prepare([wide], Start(size="tiny"))
    assert data.image_size == (72, 72) and model.config.crop == (4, 4)  # the whole picture and a margin
    train_policy(model, data, QUICK, tmp_path / "run")
    policy = load_policy(str(tmp_path / "run" / "model"))
    images = {name: np.zeros((48, 96, 3), np.uint8) for name in ("base", "wrist")}
    policy.reset(0, seed=0)
    assert policy.act([Observation(images=images, state=np.zeros(4, np.float32))], [0]).actions.shape[0] == 1
    _, data, _ = prepare([wide], Start(init=str(pretrained)))
    assert data.image_size == (64, 64)
    with pytest.raises(ValueError, match="96 x 48 px; with a crop say to which --camera-size"):
        prepare([wide], Start(size="tiny", crop=(0, 0)))
    cut, data, _ = prepare([wide], Start(size="tiny", camera_size=100, crop=(30, 36)))
    assert data.image_size == (100, 100) and cut.config.crop == (30, 36)


def test_a_crop_alone_keeps_square_pictures_as_stored(dataset):
    model, data, _ = prepare([dataset], Start(size="tiny", crop=(0, 0)))
    assert data.image_size == (64, 64) and model.config.camera_size == 64


def test_a_checkpoint_refuses_demonstrations_of_other_actions_and_names_new_words(tmp_path, caplog):
    folder = recorded(tmp_path / "set")
    model, _, _ = prepare([folder], Start(size="tiny"))
    model.save_pretrained(tmp_path / "policy")
    again = Start(init=str(tmp_path / "policy"))
    with pytest.raises(ValueError, match="says itself what it sees; leave out camera_size"):
        prepare([folder], replace(again, camera_size=80))
    tasks = folder / "meta" / "tasks.parquet"
    prepare([folder], again)
    assert "knows no" not in caplog.text
    frame = pandas.read_parquet(tasks)
    frame.index = ["push the cube", "open it"]
    frame.to_parquet(tasks)
    prepare([folder], again)
    assert "knows no 'open'" in caplog.text
    other = replace(model.config.action_spec, rate=5.0, controller="pd_joint_pos").to_dict()
    (folder / "meta" / "headrace.json").write_text(json.dumps({"spec": other}))
    with pytest.raises(ValueError, match=r"recorded with other actions.*rate: policy 20\.0, environment 5\.0"):
        prepare([folder], again)
