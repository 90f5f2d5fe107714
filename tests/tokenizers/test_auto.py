import json
from importlib import import_module

import pytest
import torch

from headrace.tokenizers.auto import RELEASE_FILES, TOKENIZERS, load_tokenizer, new_tokenizer, tokenizer_class
from headrace.tokenizers.base import Tokenizer


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_row_is_a_tokenizer_with_a_tiny_variant(family):
    cls = tokenizer_class(family)
    assert issubclass(cls, Tokenizer) and "tiny" in cls.VARIANTS and cls.kind in ("discrete", "continuous")
    assert all(callable(getattr(cls.Config, variant)) for variant in cls.VARIANTS)
    assert cls.__name__ == TOKENIZERS[family].split(":")[1]
    assert import_module(cls.__module__)


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


@pytest.mark.parametrize("family", RELEASE_FILES)
def test_every_importer_exists(family):
    module, attribute = RELEASE_FILES[family].split(":")
    assert callable(getattr(import_module(module), attribute)) and family in TOKENIZERS
