"""What a save that fails leaves behind."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from headrace.nn.fingerprint import folder_fingerprint
from headrace.nn.pretrained import Pretrained, write_atomically


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Width of the one layer."""

    width: int = 64


class Tiny(Pretrained):
    """One layer."""

    Config = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(config.width, config.width)


def test_equal_weights_are_equal_files(tmp_path):
    """Also from one process to the next: safetensors hashes metadata with a seed per process, so one key at most."""
    Tiny(TinyConfig()).save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] == {"format": "pt"}
    Tiny.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == data
    assert folder_fingerprint(tmp_path) == folder_fingerprint(tmp_path / "again")


def test_a_first_save_that_does_not_fit_leaves_nothing(tmp_path, small_files):
    with small_files(1000), pytest.raises(Exception, match="too large"):
        Tiny(TinyConfig()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_later_save_that_does_not_fit_leaves_the_earlier_one(tmp_path, small_files):
    first = Tiny(TinyConfig())
    first.save_pretrained(tmp_path)
    with small_files(1000), pytest.raises(Exception, match="too large"):
        Tiny(TinyConfig(width=128)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(Tiny.from_pretrained(tmp_path).layer.weight, first.layer.weight)


def test_write_atomically_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("full")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
