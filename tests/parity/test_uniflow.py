"""Our UniFlow against the official modules, on every uniflow set of the golden folder."""

import re

import pytest
import torch

from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_import import from_official_name, model_from_official, official_state


@pytest.fixture(scope="module")
def golden(golden_set):
    state = golden_set.part("state_dict/")
    model = model_from_official(state, heads=golden_set.config.get("num_attention_heads", 0))
    return golden_set.config, golden_set.tensors, state, model


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_sizes_read_from_the_shapes_are_the_published_ones(golden):
    config, _, _, model = golden
    ours = model.config
    read = {
        "image_size": ours.encoder.image_size,
        "vit_hidden_size": ours.encoder.width,
        "num_hidden_layers": ours.encoder.depth,
        "intermediate_size": ours.encoder.width * ours.encoder.mlp_ratio,
        "latent_ch": ours.latent_channels,
        "global_blocks_depth": ours.global_depth,
        "num_decoder_layers": ours.flow_depth,
    }
    assert set(read) & set(config)
    assert {k: v for k, v in read.items() if k in config} == {k: v for k, v in config.items() if k in read}


@torch.no_grad()
def test_every_block_output_is_the_official_one(golden):
    _, tensors, _, model = golden
    pixels, encoder = tensors["in/pixel_values"], model.encoder
    layers, last = model.hidden(pixels)
    stored = {int(k.rsplit("/", 1)[1]): v for k, v in tensors.items() if k.startswith("out/hidden_states/")}
    if not stored:
        pytest.skip("this set stores no block outputs")
    if 0 in stored:  # what enters the first block
        close(encoder._pos_embed(encoder.patch_embed(pixels)), stored.pop(0))
    for index, wanted in stored.items():
        close(layers[index - 1], wanted[:, 1:])
    close(last, layers[-1])


@torch.no_grad()
def test_latents(golden):
    _, tensors, _, model = golden
    close(model.latent(model.hidden(tensors["in/pixel_values"])[1]), tensors["out/latent"])


@torch.no_grad()
def test_velocity(golden):
    _, tensors, _, model = golden
    if "in/net/xt" not in tensors:
        pytest.skip("this set stores no call of the flow head")
    got = model.flow_head(tensors["in/net/xt"], tensors["in/net/t"], tensors["in/net/c"])
    close(got, tensors["out/net/v"])


@torch.no_grad()
def test_reconstructions_from_the_same_noise(golden):
    _, tensors, _, model = golden
    stored = {int(m[1]): v for k, v in tensors.items() if (m := re.match(r"out/recon_(\d+)step$", k))}
    assert stored
    for steps, wanted in stored.items():
        close(model.decode(tensors["out/latent"], steps=steps, noise=tensors["in/noise"]), wanted)


def test_export_gives_back_the_official_tensors(golden):
    _, _, state, model = golden
    again = official_state(model)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("official_keys", ["uniflow"], indirect=True)
def test_published_layout_is_ours_key_by_key(official_keys):
    with torch.device("meta"):
        model = UniFlow(UniFlowConfig.internvit_300m())
    exported = {name: tuple(tensor.shape) for name, tensor in official_state(model).items()}
    assert exported == official_keys
    assert len(official_keys) == 530
    assert {from_official_name(name) for name in official_keys} <= set(model.state_dict())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 452.586
