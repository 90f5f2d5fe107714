"""The future frame beside the actions: pretraining's term, in training alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.contracts import Observation
from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.mixture import Mixture
from headrace.robot.finetune import FinetuneSettings, train_policy, training_batches
from headrace.robot.frame_beside import PolicyWithFrame, open_frames, predict_frame
from headrace.robot.frame_codes import frames_to_codes
from headrace.robot.policy import FlowPolicy, load_policy
from headrace.robot.policy_start import Start, prepare
from headrace.robot.pretrain import open_encoder
from headrace.robot.token_cache import encoder_hash
from headrace.robot.vipra_pretraining import PretrainingInput, VipraPretraining, VipraPretrainingConfig
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig

SETTINGS = FinetuneSettings(
    steps=4, batch_size=4, lr=1e-3, precision="fp32", ema=0.0, checkpoint_every=2, log_every=1
)  # fmt: skip
LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_noisy_demos) -> Path:
    root = tmp_path_factory.mktemp("frames")
    make_noisy_demos(root / "demos", side=72, length=LENGTH)
    for seed, name in enumerate(("tokenizer", "other_tokenizer")):
        torch.manual_seed(seed)
        TokenFlow(TokenFlowConfig.tiny()).eval().save_pretrained(root / name)
    encoder = open_encoder(root / "tokenizer")
    for name, attention in (("causal", "causal"), ("among_itself", "bidirectional"), ("la", "causal")):
        tiny = VipraPretrainingConfig.tiny(future=name != "la")
        config = replace(
            tiny,
            camera_size=72,
            crop=(4, 4),
            prefix_attention=attention,
            frame_tokens=encoder.tokens_per_picture,
            frame_codes=encoder.codes,
            record=replace(tiny.record, tokenizer_hash=encoder_hash(encoder)),
        )
        torch.manual_seed(3)
        VipraPretraining(config).save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def with_frame(folder: Path, name: str = "causal", weight: float = 1.0, **start):
    init = str(folder / name)
    policy, data, _ = prepare([folder / "demos"], Start(init=init, **start))
    frames = open_frames(init, folder / "tokenizer", new_head=name == "la")
    torch.manual_seed(0)
    return predict_frame(policy, data, frames, weight)


def chunk(policy) -> np.ndarray:
    policy.reset(0, seed=0)
    seen = Observation(
        images={"base": np.full((72, 72, 3), 90, np.uint8)},
        state=np.zeros(4, np.float32),
        instruction="push the cube",
    )
    return policy.act([seen], [0]).actions


def test_the_picture_ahead_is_the_episode_s_own(folder):
    data = LeRobotDemos(folder / "demos", history=(-1, 0))
    ahead, rows = data.looking_ahead(3), np.array([0, 2, 4, LENGTH])
    seen = ahead.batch(rows)
    assert seen.images.shape[2] == 3 and torch.equal(seen.images[:, :, :2], data.batch(rows).images)
    later = np.array([3, LENGTH - 1, LENGTH - 1, LENGTH + 3])
    assert torch.equal(seen.images[:, 0, 2], data.batch(later).images[:, 0, 1])
    both = Mixture([data, data]).looking_ahead(3).batch(np.array([0, len(data) + 2]))
    assert torch.equal(both.images, seen.images[:2]) and data.ahead == 0
    with pytest.raises(ValueError, match="at least 1 step"):
        data.looking_ahead(0)


@pytest.mark.parametrize("name", ["causal", "among_itself"])
def test_the_frame_s_term_is_pretraining_s(folder, name):
    model, data = with_frame(folder, name)
    source = VipraPretraining.from_pretrained(folder / name)
    batch = training_batches(data, model.policy.config, SETTINGS, ahead=True).at(0)
    codes = frames_to_codes(model.encoder, batch.future.permute(0, 3, 1, 2))
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    latents = torch.zeros(4, 6, dtype=torch.int64)
    text = source.encode_text(["push the cube"] * 4)
    with torch.no_grad():
        mine = model.loss(batch, torch.Generator().manual_seed(0))
        theirs = source.loss(PretrainingInput(batch.inputs.images, nothing, codes, latents, text))
        plain = model.policy.loss(batch.inputs, batch.actions, batch.valid, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine["frame"], theirs["visual"])
    torch.testing.assert_close(mine["total"], plain["total"] + theirs["visual"])


@pytest.mark.parametrize("head", ["flow", "bins"])
def test_the_frame_is_learned_and_the_saved_policy_knows_nothing_of_it(folder, tmp_path, head):
    model, data = with_frame(folder, head=head, bins=8)
    assert isinstance(model, PolicyWithFrame)
    before = dict(model.policy.state_dict())
    settings = replace(SETTINGS, steps=16, lr=4e-3, checkpoint_every=16, move=0)
    train_policy(model, data, settings, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    frame = [row["frame"] for row in log if "frame" in row]
    assert np.mean(frame[-3:]) < 0.9 * np.mean(frame[:2]), frame
    saved = load_policy(str(tmp_path / "run" / "model"))
    assert saved.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, model.policy.state_dict()[name]) for name, value in saved.model.state_dict().items())
    if head == "flow":
        np.testing.assert_array_equal(chunk(saved), chunk(FlowPolicy(model.policy.eval(), solver=saved.solver)))


def test_a_killed_run_with_the_frame_resumes_exactly(folder, tmp_path):
    model, data = with_frame(folder)
    whole = train_policy(model, data, SETTINGS, tmp_path).losses
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    model, data = with_frame(folder, weight=0.5)
    with pytest.raises(ValueError, match="frame"):
        train_policy(model, data, SETTINGS, tmp_path, resume=True)
    model, data = with_frame(folder)
    assert train_policy(model, data, SETTINGS, tmp_path, resume=True).losses == whole[2:]


def test_a_network_without_the_head_gets_a_new_one_only_if_asked(folder, tmp_path):
    with pytest.raises(ValueError, match="without the future frame and has no head for it"):
        open_frames(folder / "la", folder / "tokenizer")
    with pytest.raises(ValueError, match="leave out --new-frame-head"):
        open_frames(folder / "causal", folder / "tokenizer", new_head=True)
    model, data = with_frame(folder, "la")
    source = VipraPretraining.from_pretrained(folder / "la")
    assert torch.equal(model.policy.backbone.norm.weight, source.backbone.norm.weight)
    assert len(train_policy(model, data, replace(SETTINGS, steps=2), tmp_path).losses) == 2


def test_what_cannot_predict_a_frame_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="start from a network of headrace pretrain; got scratch"):
        open_frames("scratch", folder / "tokenizer")
    model, _ = with_frame(folder)
    model.policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a VipraPolicy"):
        open_frames(tmp_path, folder / "tokenizer")
    with pytest.raises(ValueError, match="was pretrained with"):
        open_frames(folder / "causal", folder / "other_tokenizer")
    with pytest.raises(ValueError, match="above 0"):
        with_frame(folder, weight=-1.0)
