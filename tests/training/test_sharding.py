"""A model spread over two CPU processes (FSDP2 over gloo) trains like one that is whole in one process."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from headrace.nn.pretrained import read_weights
from headrace.nn.shards import part, spread_like, whole
from headrace.robot.vipra_pretraining import PretrainingInput, VipraPretraining, VipraPretrainingConfig
from headrace.robot.vipra_trunk import encode_text
from headrace.training.batches import batches
from headrace.training.checkpoint import latest_checkpoint
from headrace.training.loop import fit

BLOCKS = ("LlamaDecoderLayer",)
CONFIG = VipraPretrainingConfig.tiny()


class Clips:
    """Twelve samples of ViPRA's second stage."""

    def __len__(self):
        return 12

    def batch(self, indices):
        rows = [torch.Generator().manual_seed(int(i)) for i in indices]
        draws = {"images": (256, (1, 1, 64, 64, 3)), "future": (20, (6,)), "latents": (4, (6,))}
        made = {k: torch.stack([torch.randint(n, shape, generator=g) for g in rows]) for k, (n, shape) in draws.items()}
        return PretrainingInput(
            images=made["images"].to(torch.uint8),
            frames=torch.zeros(len(rows), 0, dtype=torch.int64),
            future=made["future"],
            latents=made["latents"],
            text=encode_text(["push the cube"] * len(rows), CONFIG.words),
        )


def train(out, steps, *, resume=False, shard=()):
    torch.manual_seed(0)
    model = VipraPretraining(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    data = batches(Clips(), 4, seed=1)
    options = {"ema_decay": 0.9, "log_every": 1, "progress": False, "resume": resume, "shard": shard}
    fitted = fit(model, lambda m, b, g: m.loss(b), optimizer, data, steps=steps, out=out, **options)
    with fitted.ema.applied_to(model):
        model.save_pretrained(out / "model")
    return fitted.losses


CHILD = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import test_sharding
out = Path(sys.argv[1])
losses = test_sharding.train(out, 2, shard=test_sharding.BLOCKS)
losses += test_sharding.train(out, 3, resume=True, shard=test_sharding.BLOCKS)
(out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(losses))
"""


def start(rank, port, out):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(out), os.path.dirname(__file__)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_with_a_part_each_train_like_one_with_all(tmp_path):
    alone = train(tmp_path / "one", 3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two"
    processes = [start(rank, port, out) for rank in range(2)]
    for process in processes:
        errors = process.communicate(timeout=500)[1]
        assert process.returncode == 0, errors[-3000:]
    losses = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1] == pytest.approx(alone, rel=1e-4)
    for folder in (latest_checkpoint(tmp_path / "one"), tmp_path / "one" / "model"):
        one = read_weights(folder / "model.safetensors")
        two = read_weights(out / folder.relative_to(tmp_path / "one") / "model.safetensors")
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_plain_tensors_are_left_alone():
    plain = torch.ones(3)
    assert whole(plain) is plain and part(plain) is plain and spread_like(plain, plain) is plain


def test_one_process_has_nothing_to_spread_over(tmp_path):
    with pytest.raises(ValueError, match="several processes"):
        train(tmp_path / "out", 1, shard=BLOCKS)
