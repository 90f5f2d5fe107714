"""Saved folders of the continuous tokenizers: half written, of another variant, of another kind."""

import dataclasses
import json

import pytest
import torch

from headrace.nn.pretrained import CONFIG_FILE, WEIGHTS_FILE
from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig


def small(kind):
    torch.manual_seed(0)
    if kind is FlowTok:
        return FlowTok(FlowTokConfig.tiny())
    config = UniFlowConfig.tiny()
    return UniFlow(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, depth=1), flow_depth=1))


@pytest.fixture(params=[UniFlow, FlowTok], ids=["uniflow", "flowtok"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    small(kind).save_pretrained(tmp_path)
    return tmp_path


def test_a_half_written_folder_is_named(kind, folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*truncated"):
        kind.from_pretrained(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        kind.from_pretrained(folder)
    (folder / CONFIG_FILE).write_text('{"model": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        kind.from_pretrained(folder)


def test_weights_of_another_variant_are_named(kind, folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    text = json.dumps(config)
    wider = text.replace('"latent_channels": 32', '"latent_channels": 48').replace('"width": 32', '"width": 64')
    wider = wider.replace('"text_width": 32', '"text_width": 64')
    assert wider != text
    (folder / CONFIG_FILE).write_text(wider)
    with pytest.raises(ValueError, match="of another shape") as error:
        kind.from_pretrained(folder)
    assert "32" in str(error.value)
    assert str(48 if kind is UniFlow else 64) in str(error.value)
    assert ("variant 'tiny'" in str(error.value)) is (kind is FlowTok)  # the small UniFlow is of no variant


def test_the_variant_that_a_file_looks_like_is_named(tmp_path):
    torch.manual_seed(0)
    UniFlow(UniFlowConfig.tiny()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"latent_channels": 48}))
    with pytest.raises(ValueError, match="they look like the variant 'tiny'"):
        UniFlow.from_pretrained(tmp_path)


def test_a_folder_of_the_other_kind_is_named(kind, folder):
    other = FlowTok if kind is UniFlow else UniFlow
    with pytest.raises(ValueError, match=kind.__name__):
        other.from_pretrained(folder)
    assert isinstance(load_tokenizer(folder), kind)
