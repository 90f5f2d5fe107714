import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.sim
@pytest.mark.render
@pytest.mark.slow
def test_the_recipe_of_the_shipped_policy_runs(tmp_path):
    """One demonstration and two updates, through the same collection, launch and copy as the real thing."""
    options = [
        "--tasks",
        "PushCube-v1",
        "--demonstrations",
        "1",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--processes",
        "1",
    ]
    places = ["--out", str(tmp_path / "run"), "--checkpoint", str(tmp_path / "policy")]
    subprocess.run([sys.executable, ROOT / "recipes" / "demo_policy.py", *options, *places], check=True)
    from headrace.robot.policy import load_policy

    policy = load_policy(str(tmp_path / "policy"))
    assert policy.model.config.words == ("cube", "push", "target", "the", "to")


def test_the_shipped_policy_loads_and_is_small():
    from headrace.robot.policy import load_policy

    folder = ROOT / "checkpoints" / "demo"
    policy = load_policy(str(folder))
    assert policy.spec.controller == "pd_ee_delta_pose" and len(policy.model.config.state_names) == 15
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
