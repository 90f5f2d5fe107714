import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from headrace.training.batches import batches
from headrace.training.loop import fit


class Line:
    """37 points on a line."""

    x = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 37

    def batch(self, indices):
        x = self.x[torch.from_numpy(indices)]
        return {"x": x, "y": x.sum(1, keepdim=True)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def error(self, batch):  # not `forward`: gradients must be exchanged all the same
        return (self.net(batch["x"]) - batch["y"]).square().mean()


def train(out, steps, *, resume=False):
    """Losses of this call, and one number of the averaged weights."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batches(Line(), 8, seed=1)
    options = {"ema_decay": 0.9, "log_every": 2, "progress": False, "resume": resume}
    fitted = fit(model, lambda m, b, g: {"total": m.error(b)}, optimizer, data, steps=steps, out=out, **options)
    return fitted.losses, fitted.ema.shadow["net.0.weight"].sum().item()


CHILD = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import test_processes
out = Path(sys.argv[1])
parts = [test_processes.train(out, 3), test_processes.train(out, 6, resume=True)]
(out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(parts))
"""


def start(rank, world, port, out):
    """One process as a launcher starts it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(out), os.path.dirname(__file__)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume(tmp_path):
    alone, weight = train(tmp_path / "one", 6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two"
    processes = [start(rank, 2, port, out) for rank in range(2)]
    for process in processes:
        errors = process.communicate(timeout=400)[1]
        assert process.returncode == 0, errors[-2000:]
    (first, later), (first_too, later_too) = (json.loads((out / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first == first_too and later == later_too, "all processes report the mean over processes"
    assert first[0] + later[0] == pytest.approx(alone, rel=1e-5)
    assert later[1] == pytest.approx(weight, rel=1e-5)
    rows = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(6)), "one process writes the log"
