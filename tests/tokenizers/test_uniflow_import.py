import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS
from headrace.tokenizers.uniflow_import import (
    from_official_name,
    load_official,
    model_from_official,
    official_state,
    save_official,
    to_official_name,
)

SMALL = UniFlowConfig(
    encoder=dataclasses.replace(ENCODERS["tiny"], image_size=32, depth=2),
    latent_channels=8,
    global_depth=1,
    flow_depth=2,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniFlow(SMALL).eval()


def test_names_go_there_and_back(model):
    for name in model.state_dict():
        assert from_official_name(to_official_name(name)) == name


@torch.no_grad()
def test_a_written_official_file_reads_back_as_the_same_model(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_official(model, path)
    for source in (path, tmp_path):
        again = load_official(source, heads=4)
        assert again.config.encoder.depth == 2 and again.config.latent_channels == 8
        images = torch.rand(1, 3, 32, 32)
        assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))
    half = load_official(path, heads=4, dtype=torch.bfloat16)
    assert half.flow_head.out.weight.dtype == torch.bfloat16
    assert half.latent_mean.dtype == torch.float64 and half.latent_count.dtype == torch.int64


def test_broken_and_foreign_files_are_named(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_official(model, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_official(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not an official UniFlow checkpoint"):
        load_official(path)
    state = official_state(model)
    del state["flow_head.net.cond_embed.bias"]
    with pytest.raises(ValueError, match=r"1 missing: flow_head.cond_embed.bias"):
        model_from_official(state, heads=4)


def test_only_internvit_fits_the_official_layout(tmp_path):
    encoder = dataclasses.replace(ENCODERS["tiny"], name="vit_large_patch14_dinov2", image_size=32, depth=1)
    other = UniFlow(dataclasses.replace(SMALL, encoder=encoder))
    with pytest.raises(ValueError, match="InternViT encoders only"):
        save_official(other, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "change", [{"latent_norm": "layernorm"}, {"target_scale": 2.0}, {"flow_segments": 2, "steps": 2, "flow_depth": 3}]
)
def test_settings_that_official_keys_do_not_hold_are_refused(change, tmp_path):
    other = UniFlow(dataclasses.replace(SMALL, **change))
    with pytest.raises(ValueError, match=f"holds no {next(iter(change))}"):
        save_official(other, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
