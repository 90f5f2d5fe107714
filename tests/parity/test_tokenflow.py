"""Same codes, features and pictures as the official code, on every set `tokenflow_<letter>` there is."""

import pytest
import torch

from headrace.nn.pretrained import load_strictly
from headrace.tokenizers.tokenflow import TokenFlow
from headrace.tokenizers.tokenflow_import import config_from_official, export_official, from_official

FEATURES = {"rtol": 1e-5, "atol": 1e-5}
PIXELS = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def golden(golden_set):
    torch.manual_seed(0)
    given, state = golden_set.config, golden_set.part("state_dict/")
    config = config_from_official(
        state,
        size=given["img"],
        scales=tuple(given["scales"]),
        heads=given["heads"],
        decoder_heads=given.get("sem_dec_heads", given["heads"]),
    )
    model = TokenFlow(config)
    load_strictly(model, from_official(state, config), what=golden_set.name)
    return model.eval(), state, golden_set.tensors


def test_codes_are_identical_and_features_close(golden):
    model, _, tensors = golden
    with torch.no_grad():
        quantized = model.quantize(tensors["in/pixel_values"])
    assert torch.equal(quantized.codes, tensors["out/ids"])
    torch.testing.assert_close(quantized.features, tensors["out/quant"], **FEATURES)


def test_training_pass_gives_the_same_codes(golden):
    model, _, tensors = golden
    quantized = model.quantize(tensors["in/pixel_values"])
    assert quantized.vector_loss > 0
    assert torch.equal(quantized.codes, tensors["out/ids"])
    torch.testing.assert_close(quantized.features, tensors["out/quant"], **FEATURES)


def test_decoders_agree(golden):
    model, _, tensors = golden
    with torch.no_grad():
        decoded = model.decode_features(tensors["out/quant"])
        from_codes = model.decode(tensors["out/ids"])
    torch.testing.assert_close(decoded.semantics, tensors["out/sem_decoded"], **FEATURES)
    torch.testing.assert_close(decoded.images, tensors["out/image"], **PIXELS)
    torch.testing.assert_close(from_codes, tensors["out/image"], **PIXELS)


def test_next_scale_inputs_agree(golden):
    model, _, tensors = golden
    if "out/llm_feats" not in tensors:
        pytest.skip("this set records no features for a language model")
    with torch.no_grad():
        rows = model.quantizer.next_scale_inputs(tensors["out/ids"])
    torch.testing.assert_close(rows, tensors["out/llm_feats"], **FEATURES)


def test_export_gives_every_official_weight_back(golden):
    model, state, _ = golden
    exported = export_official(model)
    assert exported.keys() == state.keys()
    for key, value in state.items():
        if key != "quantize.codebook_used":
            assert torch.equal(exported[key], value), key
