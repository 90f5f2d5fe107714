"""What parity tests do with the folder of golden sets: no set is a skip, a set that cannot be read is an error."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

TESTS = Path(__file__).parent


def outcomes(folder):
    """How `test_boss.py` ends with this folder: numbers by word, such as {"skipped": 2}."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_boss.py")],
        env=os.environ | {"HEADRACE_GOLDEN": str(folder)},
        capture_output=True,
        text=True,
    )
    last = ran.stdout.strip().splitlines()[-1]
    return {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}, ran.returncode


def write(folder, name, entries):
    save_file({"random/0/in/cost": np.zeros((2, 2))}, folder / f"{name}.safetensors")
    about = {"config": {}, "files": [{"file": f"{name}.safetensors"}], "entries": {key: {} for key in entries}}
    (folder / f"{name}.json").write_text(json.dumps(about))


@pytest.mark.slow
def test_a_folder_without_a_set_skips(tmp_path):
    write(tmp_path, "other_a", ["random/0/in/cost"])
    counts, code = outcomes(tmp_path)
    assert counts["skipped"] == 2 and code == 0 and counts.keys() == {"skipped"}


@pytest.mark.slow
def test_sets_that_cannot_be_read_fail(tmp_path):
    (tmp_path / "boss_a.json").write_text('{"files": [')
    write(tmp_path, "boss_b", ["random/0/in/cost"])
    whole = (tmp_path / "boss_b.safetensors").read_bytes()
    (tmp_path / "boss_b.safetensors").write_bytes(whole[:-8])
    write(tmp_path, "boss_c", ["random/0/in/cost"])
    (tmp_path / "boss_c.safetensors").unlink()
    write(tmp_path, "boss_d", ["random/0/in/cost", "random/0/out/K1/path"])
    counts, code = outcomes(tmp_path)
    assert counts["error"] == 2 * 4 and code == 1 and counts.keys() == {"error"}
