import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.training.batches import batches
from headrace.training.checkpoint import load_checkpoint, save_checkpoint
from headrace.training.interrupt import TrainingInterrupted
from headrace.training.log import read_log
from headrace.training.loop import fit
from headrace.training.schedule import Schedule


class Line:
    """Points on a noisy line, 37 of them so that batches cross the end of an epoch."""

    def __init__(self):
        self.x = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        x = self.x[torch.from_numpy(indices)]
        return {"x": x, "y": x.sum(1, keepdim=True)}


def loss(model, batch, generator):
    noise = 0.1 * torch.randn(batch["y"].shape, generator=generator, device=generator.device)
    return {"total": (model(batch["x"]) - batch["y"] - noise).square().mean(), "noise": noise.abs().mean()}


def make(seed=0, lr=1e-2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def run(out, *, loss=loss, lr=1e-2, model_and_optimizer=None, **options):
    model, optimizer = model_and_optimizer or make(lr=lr)
    return fit(model, loss, optimizer, batches(Line(), 8, seed=1), out=out, progress=False, **options)


OPTIONS = {"ema_decay": 0.9, "schedule": Schedule(kind="cosine", warmup=2, steps=20, floor=0.1), "checkpoint_every": 4}


def test_loss_falls(tmp_path):
    losses = run(tmp_path, steps=150).losses
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


@pytest.mark.parametrize("precision, accumulate", [("fp32", 1), ("bf16", 2)])
def test_resume_gives_the_same_losses_weights_and_average(tmp_path, precision, accumulate):
    options = OPTIONS | {"precision": precision, "accumulate": accumulate}
    whole_model = make()
    whole = run(tmp_path / "a", steps=12, model_and_optimizer=whole_model, **options)
    first = run(tmp_path / "b", steps=5, **options)
    later_model = make(seed=7)
    later = run(tmp_path / "b", steps=12, resume=True, model_and_optimizer=later_model, **options)
    assert first.losses + later.losses == whole.losses
    for name, value in whole_model[0].state_dict().items():
        assert torch.equal(value, later_model[0].state_dict()[name]), name
    assert all(torch.equal(whole.ema.shadow[k], later.ema.shadow[k]) for k in whole.ema.shadow)
    assert read_log(tmp_path / "a" / "log.jsonl") == read_log(tmp_path / "b" / "log.jsonl")


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_loop
seen = 0
def deadly(model, batch, generator):
    global seen
    seen += 1
    if seen == 10:
        os.kill(os.getpid(), int(sys.argv[3]))
    return test_loop.loss(model, batch, generator)
test_loop.run(Path(sys.argv[1]), steps=12, loss=deadly, **test_loop.OPTIONS)
"""


def kill_in_the_middle(out, number):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", CHILD, str(out), str(Path(__file__).parent), str(int(number))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_losses_after_a_kill_equal_those_of_a_run_left_alone(tmp_path):
    whole = run(tmp_path / "a", steps=12, **OPTIONS)
    assert kill_in_the_middle(tmp_path / "b", signal.SIGKILL).returncode == -signal.SIGKILL
    later = run(tmp_path / "b", steps=12, resume=True, **OPTIONS)
    assert len(later.losses) == 4, "the checkpoint after step 8 is the newest"
    assert later.losses == whole.losses[8:]
    assert read_log(tmp_path / "a" / "log.jsonl") == read_log(tmp_path / "b" / "log.jsonl")


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    whole = run(tmp_path / "a", steps=12, **OPTIONS)
    ended = kill_in_the_middle(tmp_path / "b", signal.SIGTERM)
    assert ended.returncode != 0 and "stopped after step 10" in ended.stderr
    assert run(tmp_path / "b", steps=12, resume=True, **OPTIONS).losses == whole.losses[10:]


def test_interrupt_is_raised_in_this_process_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def stopping(model, batch, generator):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, generator)

    with pytest.raises(TrainingInterrupted, match="step 1"):
        run(tmp_path, steps=5, loss=stopping)
    assert signal.getsignal(signal.SIGTERM) is before


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    whole = run(tmp_path / "a", steps=3)
    assert run(tmp_path / "b", steps=3, resume=True).losses == whole.losses


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path, steps=3)
    again = run(tmp_path, steps=3, resume=True)
    assert again.losses == [] and again.step == 3


def test_bf16_computes_in_bfloat16_on_the_cpu(tmp_path):
    seen = []

    def watching(model, batch, generator):
        seen.append(model(batch["x"]).dtype)
        return loss(model, batch, generator)

    run(tmp_path / "a", steps=1, loss=watching, precision="bf16")
    run(tmp_path / "b", steps=1, loss=watching)
    assert seen == [torch.bfloat16, torch.float32]


def test_accumulated_halves_equal_the_whole_batch(tmp_path):
    def plain(model, batch, generator):
        return {"total": (model(batch["x"]) - batch["y"]).square().mean()}

    def train(out, size, accumulate):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, plain, optimizer, batches(Line(), size), steps=5, out=out, accumulate=accumulate, progress=False)
        return model.weight.detach()

    torch.testing.assert_close(train(tmp_path / "a", 8, 1), train(tmp_path / "b", 4, 2))


def test_clipping_bounds_the_update(tmp_path):
    model = nn.Linear(4, 1)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, loss, optimizer, batches(Line(), 8), steps=1, out=tmp_path, clip=1e-3, progress=False)
    assert 0 < (model.weight - start).norm() <= 1.001e-3


def test_schedule_scales_the_callers_rate_and_gives_it_back(tmp_path):
    model, optimizer = make(lr=0.5)
    run(tmp_path, steps=4, model_and_optimizer=(model, optimizer), schedule=Schedule(warmup=4))
    assert [row["lr"] for row in read_log(tmp_path / "log.jsonl")] == [0.125, 0.25, 0.375, 0.5]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_second_run_into_the_folder_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(FileExistsError, match="already holds a training run"):
        run(tmp_path, steps=2)


def test_a_folder_in_use_is_refused(tmp_path):
    def nested(model, batch, generator):
        with pytest.raises(FileExistsError, match="right now"):
            run(tmp_path, steps=2, resume=True)
        return loss(model, batch, generator)

    run(tmp_path, steps=1, loss=nested)


def test_resume_with_other_settings_names_them(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"groups.*0\.01.*0\.02.*seed: 0 before, 5 now"):
        run(tmp_path, steps=4, resume=True, lr=2e-2, seed=5)


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path):
    run(tmp_path, steps=9, checkpoint_every=2, keep=2)
    half = tmp_path / "checkpoints" / ".step_00000010.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert run(tmp_path, steps=10, checkpoint_every=2, keep=2, resume=True).step == 10
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000009", "step_00000010"]


def test_a_truncated_checkpoint_is_named(tmp_path):
    run(tmp_path, steps=2)
    weights = tmp_path / "checkpoints" / "step_00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"step_00000002 cannot be used.*truncated.*one before"):
        run(tmp_path, steps=3, resume=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def at_step_four(folder, step, state, *, keep, write=True):
        if step == 4:
            monkeypatch.setattr("headrace.training.checkpoint.save_file", full)
        return save_checkpoint(folder, step, state, keep=keep, write=write)

    monkeypatch.setattr("headrace.training.loop.save_checkpoint", at_step_four)
    with pytest.raises(OSError, match="after step 4 could not be written"):
        run(tmp_path, steps=6, checkpoint_every=2, log_every=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def bad(model, batch, generator):
        terms = loss(model, batch, generator)
        bad.calls += 1
        return terms if bad.calls < 4 else {key: value * float("nan") for key, value in terms.items()}

    bad.calls = 0
    with pytest.raises(FloatingPointError, match="nan at step 3"):
        run(tmp_path, steps=8, loss=bad, checkpoint_every=2, log_every=8)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        run(tmp_path / "a", steps=0)
    with pytest.raises(ValueError, match="with 'total', got loss"):
        run(tmp_path / "b", steps=1, loss=lambda *_: {"loss": torch.zeros(())})
    with pytest.raises(ValueError, match="2 parameters that are not the model's"):
        run(tmp_path / "c", steps=1, model_and_optimizer=(make()[0], torch.optim.SGD(nn.Linear(2, 2).parameters())))
    with pytest.raises(ValueError, match="unknown tracker"):
        run(tmp_path / "d", steps=1, trackers=("comet",))


def test_tensorboard_gets_the_losses(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    losses = run(tmp_path, steps=4, log_every=2, trackers=("tensorboard",)).losses
    events = event_accumulator.EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("total")] == [(k, pytest.approx(losses[k])) for k in (1, 3)]


def test_weights_and_biases_gets_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path / "run", steps=2, trackers=("wandb",), settings={"task": "line"})
    assert list(tmp_path.rglob("*.wandb"))


def test_progress_bar_shows_loss_and_remaining_time(tmp_path, capsys):
    model, optimizer = make()
    fit(model, loss, optimizer, batches(Line(), 8), steps=3, out=tmp_path)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "<" in shown


def test_checkpoint_of_another_optimizer_parameter_is_refused(tmp_path):
    run(tmp_path, steps=2)
    folder = tmp_path / "checkpoints" / "step_00000002"
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(facts | {"optimizer_numbers": {"9.weight": {"step": 1}}}))
    from headrace.training.checkpoint import TrainingState

    model, optimizer = make()
    with pytest.raises(ValueError, match=r"knows 9\.weight"):
        load_checkpoint(folder, TrainingState(model=model, optimizer=optimizer))
