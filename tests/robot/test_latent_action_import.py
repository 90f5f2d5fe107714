"""Files of the published latent action model: only tensors are read, and the state is found where trainers put it."""

import json
import os
from pathlib import Path

import pytest
import torch

from headrace.robot.latent_action_import import read_official

GOLDEN = Path(os.environ.get("HEADRACE_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"step": 1, "state_dict": s}])
def test_the_state_is_found(tmp_path, wrap):
    state = {"vq.codebooks": torch.ones(8, 32), "to_pixels.0.weight": torch.zeros(2, 3)}
    prefixed = {f"module.{key}": value for key, value in state.items()}
    torch.save(wrap(prefixed), tmp_path / "laq.pt")
    read = read_official(tmp_path / "laq.pt")
    assert set(read) == set(state) and torch.equal(read["vq.codebooks"], state["vq.codebooks"])


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no vq\.codebooks"):
        read_official(tmp_path / "other.pt")
    torch.save({"vq.codebooks": Path("x")}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="not loaded"):
        read_official(tmp_path / "objects.pt")
    (tmp_path / "short.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not loaded"):
        read_official(tmp_path / "short.pt")


@pytest.mark.skipif(not list(GOLDEN.glob("vipra_*.json")), reason="no golden set of ViPRA is here")
def test_a_file_of_the_official_class_loads_as_its_state_does(tmp_path):
    from safetensors.torch import load_file

    for description in GOLDEN.glob("vipra_*.json"):
        parts = json.loads(description.read_text())["files"]
        tensors = {k: v for part in parts for k, v in load_file(GOLDEN / part["file"]).items()}
        start = "state_dict/lam/"
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "laq.pt")
        read = read_official(tmp_path / "laq.pt")
        assert set(read) == set(state) and all(torch.equal(read[k], state[k]) for k in state)
