import dataclasses
import json
from importlib import import_module

import pytest
import torch

from headrace.tokenizers.auto import RELEASE_FILES, TOKENIZERS, load_tokenizer, new_tokenizer, tokenizer_class
from headrace.tokenizers.base import Tokenizer
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS
from headrace.tokenizers.uniflow_import import save_official


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_row_is_a_tokenizer_with_a_tiny_variant(family):
    cls = tokenizer_class(family)
    assert issubclass(cls, Tokenizer) and "tiny" in cls.VARIANTS and cls.kind in ("discrete", "continuous")
    assert all(callable(getattr(cls.Config, variant)) for variant in cls.VARIANTS)
    assert cls.__name__ == TOKENIZERS[family].split(":")[1]
    assert import_module(cls.__module__)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_variant_is_known_by_its_shapes(family, monkeypatch):
    cls, model = tokenizer_class(family), new_tokenizer(f"{family}:tiny")
    monkeypatch.setattr(cls, "VARIANTS", (cls.VARIANTS[0], "tiny"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert cls.variant_of(shapes) == "tiny"
    monkeypatch.setattr(cls, "VARIANTS", ("tiny",))
    assert cls.variant_of(dict(list(shapes.items())[1:])) is None


def test_near_names_are_suggested():
    with pytest.raises(ValueError, match="tokenflow"):
        tokenizer_class("tokenflo")
    with pytest.raises(ValueError, match="tiny"):
        new_tokenizer("tokenflow:tinny")


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "Policy"}))
    with pytest.raises(ValueError, match="holds a Policy"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_file_of_a_release_needs_its_family(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"model": {"a.weight": torch.zeros(1)}}, file)
    with pytest.raises(ValueError, match="no TokenFlow checkpoint"):  # so it was read as one
        load_tokenizer(f"tokenflow:{file}")
    with pytest.raises(ValueError, match=rf"is a file.*tokenflow:{file}"):
        load_tokenizer(file)
    with pytest.raises(ValueError, match="did you mean 'tokenflow'"):
        load_tokenizer(f"tokenflo:{file}")


def test_a_hub_id_of_a_release_goes_to_its_importer(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = dataclasses.replace(ENCODERS["tiny"], image_size=32, depth=1)
    model = UniFlow(UniFlowConfig(encoder=encoder, latent_channels=8, global_depth=1, flow_depth=1)).eval()
    folder = tmp_path / "snapshot"
    save_official(model, folder / "model.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    for source in ("uniflow:somebody/UniFlow", f"uniflow:{folder}"):
        again = load_tokenizer(source)
        assert torch.equal(again.to_latent.c_fc.weight, model.to_latent.c_fc.weight)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("uniflow:snapshot").config.latent_channels == 8
    assert asked == ["somebody/UniFlow"]
    with pytest.raises(ValueError, match="takes no revision"):
        load_tokenizer("uniflow:somebody/UniFlow", revision="main")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_tokenizer("uniflow:./nowhere")


@pytest.mark.parametrize("family", RELEASE_FILES)
def test_every_importer_exists(family):
    module, attribute = RELEASE_FILES[family].split(":")
    assert callable(getattr(import_module(module), attribute)) and family in TOKENIZERS
