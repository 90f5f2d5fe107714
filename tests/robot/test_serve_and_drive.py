"""From a saved checkpoint to an arm: `headrace serve` in a process of its own, `headrace drive` against it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.robot.arm import MockArm

JOINTS = MockArm().joints


@pytest.fixture
def checkpoint(tmp_path):
    from headrace.robot.vipra import VipraConfig, VipraPolicy

    torch.manual_seed(0)
    count = len(JOINTS)
    bounds = {"low": (-20.0,) * count, "high": (20.0,) * count}
    spec = ActionSpec(names=JOINTS, frame="joint", rotation="none", gripper="open_is_1", rate=30.0, **bounds)
    config = VipraConfig.tiny(spec, cameras=("front",), state_dim=count)
    VipraPolicy(config).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy", config


@pytest.mark.slow
def test_a_checkpoint_is_served_and_drives_a_mock_arm(checkpoint, tmp_path):
    folder, config = checkpoint
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "headrace.cli.main"]
    server = subprocess.Popen(
        [*command, "serve", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        url = re.search(r"ws://\S+", server.stdout.readline()).group()
        size = config.camera_size
        options = json.dumps({"picture": [size, size]})
        arguments = ["drive", url, "--options", options, "--seconds", "2", "--out", str(tmp_path / "log")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads((tmp_path / "log" / "summary.json").read_text())
        assert told["reason"] == "done" and told["chunks"] >= 1
    finally:
        server.terminate()
        server.wait(30)
