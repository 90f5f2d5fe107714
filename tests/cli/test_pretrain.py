"""The commands in a row, on one small LeRobot dataset: label, pretrain, finetune."""

import json
from pathlib import Path

import pytest
import torch

from headrace.cli.finetune import finetune
from headrace.cli.label import label
from headrace.cli.pretrain import pretrain
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.policy import load_policy
from headrace.robot.vipra_pretraining import VipraPretraining
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_noisy_demos) -> Path:
    root = tmp_path_factory.mktemp("story")
    make_noisy_demos(root / "demos", side=64, length=8)
    for seed, name in enumerate(("lam", "other_lam")):
        torch.manual_seed(seed)
        LatentActionModel(LatentActionConfig.tiny()).eval().save_pretrained(root / name)
    TokenFlow(TokenFlowConfig.tiny()).eval().save_pretrained(root / "tokenizer")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_videos_become_a_policy_that_remembers_them(folder, tmp_path, capsys):
    data, labels = (str(folder / "demos"),), tmp_path / "labels"
    assert label(folder / "lam", data=data, out=labels, horizon=4) == 0
    shared = {"data": data, "labels": labels, "size": "tiny", "camera_size": 64, "steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match="not by"):
        pretrain(**shared, out=tmp_path / "wrong", lam=folder / "other_lam", fields="la")
    with pytest.raises(ValueError, match="need a frame tokenizer"):
        pretrain(**shared, out=tmp_path / "wrong", lam=folder / "lam")
    whole = {**shared, "tokenizer": str(folder / "tokenizer"), "lam": folder / "lam", "cache": tmp_path / "tokens"}
    assert pretrain(**whole, out=tmp_path / "pictures") == 0
    assert pretrain(**whole, out=tmp_path / "ids", context="ids") == 0
    assert pretrain(**shared, out=tmp_path / "la", lam=folder / "lam", fields="la") == 0
    assert len(list((tmp_path / "tokens").iterdir())) == 1  # both contexts read one cache
    record = VipraPretraining.from_pretrained(tmp_path / "ids" / "model").config.record
    assert (record.rate, record.horizon, record.latent_steps, record.future) == (20.0, 4, 4, True)
    written = json.loads((labels / "labels.json").read_text())
    assert record.lam_hash == written["lam_hash"]
    for name in ("pictures", "ids"):
        out = tmp_path / f"policy_{name}"
        init = str(tmp_path / name / "model")
        assert finetune(dataset=data, out=out, init=init, lam=folder / "lam", steps=2, batch_size=4) == 0
        assert load_policy(str(out / "model")).model.config.pretraining.lam_hash == record.lam_hash
    assert "fresh: decoder, proprio" in capsys.readouterr().out
    framed = {"dataset": data, "steps": 2, "batch_size": 4, "predict_frame": 1.0}
    with pytest.raises(ValueError, match="needs --tokenizer"):
        finetune(**framed, out=tmp_path / "no", init=init)
    with pytest.raises(ValueError, match="belong to --predict-frame"):
        finetune(dataset=data, out=tmp_path / "no", init=init, tokenizer=str(folder / "tokenizer"))
    for name, new in (("pictures", False), ("ids", False), ("la", True)):
        out, own = tmp_path / f"framed_{name}", str(tmp_path / name / "model")
        assert finetune(**framed, out=out, init=own, tokenizer=str(folder / "tokenizer"), new_frame_head=new) == 0
        logged = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        assert {"action", "frame", "frame_right"} <= set(logged)
        assert load_policy(str(out / "model")).model.config.pretraining.future != new
    with pytest.raises(ValueError, match="not of"):
        finetune(dataset=data, out=tmp_path / "no", init=init, lam=folder / "other_lam", steps=2)
