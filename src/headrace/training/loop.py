"""`fit`: the one training loop, on accelerate; CPU, one GPU, or many GPUs and nodes through `accelerate launch`."""

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env, send_to_device
from torch import Tensor, nn

from headrace.nn.precision import Precision, Resolved, resolve_precision
from headrace.nn.shards import whole
from headrace.training.batches import Batches, Prefetch, seed_of
from headrace.training.checkpoint import RunFolder, TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from headrace.training.ema import Ema
from headrace.training.interrupt import TrainingInterrupted, stop_signals
from headrace.training.log import Record, Tracker, require_trackers
from headrace.training.schedule import Schedule
from headrace.training.sharding import shard_run

Loss = Callable[[Any, Any, torch.Generator], Mapping[str, Tensor]]
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Fitted(NamedTuple):
    """What `fit` returns; the model itself was trained in place.

    Attributes:
        losses: `total` of every update made by this call, averaged over processes.
        step: Updates done in all, those before a resume included.
        ema: The averaged weights, or None; `with ema.applied_to(model): model.save_pretrained(...)`.
        seconds: Wall-clock time of this call [s].
    """

    losses: list[float]
    step: int
    ema: Ema | None
    seconds: float


class _LossModule(nn.Module):
    """The loss as a forward pass, so that gradients are exchanged and autocast is on whatever the loss calls."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        terms = dict(self.loss(self.model, batch, generator))
        if "total" not in terms:
            raise ValueError(f"the loss must return a dict with 'total', got {', '.join(terms) or 'an empty one'}")
        return terms


def fit(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    steps: int,
    out: Path,
    resume: bool = False,
    seed: int = 0,
    schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    clip: float | None = 1.0,
    ema_decay: float | None = None,
    precision: Precision = "fp32",
    accumulate: int = 1,
    checkpoint_every: int = 1000,
    keep: int = 2,
    log_every: int = 10,
    trackers: tuple[Tracker, ...] = (),
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    find_unused: bool = False,
    shard: tuple[str, ...] = (),
) -> Fitted:
    """Train `model` in place until `steps` updates are done.

    Everything random follows from (seed, step, process): the batch, the generator given to `loss`, and the global
    generators (dropout), which are seeded anew at every step. So a killed run that is resumed gives the same losses,
    bit for bit, on the same machine with the same number of threads and processes; on a GPU as far as its kernels are
    deterministic.

    Args:
        model: Any module; trained on the device that accelerate finds.
        loss: `loss(model, batch, generator)` returns scalars by name; "total" is minimised, all are logged.
        optimizer: Over parameters of `model`, at the base learning rate.
        batches: `at(step)` gives the batch; loaded ahead in a thread, moved to the device here.
        steps: Updates in all, those before a resume included.
        out: Run folder (see `headrace.training.checkpoint`). On several nodes all must see it.
        resume: Go on from the newest checkpoint in `out`; begins at 0 if there is none yet.
        seed: Of dropout and of the generator given to `loss`.
        schedule: Factor on the learning rate by step.
        clip: Largest norm of the gradient; None for no clipping.
        ema_decay: Keep an average of the weights with this decay.
        precision: `bf16` and `fp16` run the loss under autocast, `fp16` (GPU only) with a gradient scaler; `auto` is
            `bf16` where the device multiplies it natively, else `fp32`.
        accumulate: Batches per update; update k uses batches k * accumulate and following.
        checkpoint_every: Updates between checkpoints; one more is written at the end and when interrupted.
        keep: Newest checkpoints kept, at least 1.
        log_every: Updates between writing to the log and the trackers, where a loss that is not finite is found.
        trackers: Also write to TensorBoard or Weights & Biases (`WANDB_MODE=offline` for no network).
        settings: JSON-ready facts of the recipe; recorded, and compared on resume.
        progress: Show a bar with loss and remaining time.
        find_unused: Let processes agree on parameters that a loss does not reach (slower).
        shard: Class names of the model's blocks, such as `("LlamaDecoderLayer",)`: spread parameters, gradients,
            optimizer and average over the processes, each block being gathered when it computes (FSDP2). Not with
            fp16, and only for a loss that reads each block once. Afterwards the model's tensors are spread ones; all
            processes call its `save_pretrained`.

    Raises:
        FileExistsError: `out` is in use or holds a run and `resume` is False.
        ValueError: Wrong arguments, or `resume` of a run with other settings (each is named).
        FloatingPointError: The loss is no longer finite; the checkpoints before it stay.
        TrainingInterrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    _check_arguments(steps, accumulate, checkpoint_every, keep, log_every, trackers)
    accelerator, precision = _accelerator(precision, trackers, out, find_unused)
    if shard and (accelerator.num_processes == 1 or precision == "fp16"):
        raise ValueError("sharding needs several processes (accelerate launch) and fp32 or bf16")
    description = _describe(model, optimizer, seed, schedule, clip, ema_decay, precision, accumulate, settings)
    folder = RunFolder(out, description, resume=resume) if accelerator.is_main_process else None
    rates = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    try:
        module = _LossModule(model, loss)
        if not shard:
            wrapped, stepper = accelerator.prepare(module, optimizer)
        ema = None if ema_decay is None else Ema(model, ema_decay)
        state = TrainingState(model=model, optimizer=optimizer, ema=ema, scaler=accelerator.scaler)
        first = _restore(accelerator, out, state) if resume else 0
        if shard:
            shard_run(module, model, optimizer, ema, shard, accelerator.device)
            wrapped = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)  # no DDP
            stepper = accelerator.prepare_optimizer(optimizer, device_placement=False)
        record = Record(accelerator, folder, first, steps, trackers, settings, progress)
        if accelerator.num_processes > 1:
            batches = batches.shard(accelerator.process_index, accelerator.num_processes)
        model.train()
        ahead = Prefetch(batches, start=first * accumulate, stop=steps * accumulate)
        with stop_signals() as arrived, ahead, record:
            incoming = iter(ahead)
            saved = first
            for step in range(first, steps):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule.factor(step)
                terms = _update(accelerator, wrapped, stepper, incoming, step, seed, accumulate, clip)
                if ema is not None:
                    ema.update(model)
                record.add(step, {**terms, "lr": optimizer.param_groups[0]["lr"]})
                due = (step + 1) % checkpoint_every == 0 or step + 1 == steps
                stopping = False
                if due or (step + 1) % log_every == 0 or (arrived and accelerator.num_processes == 1):
                    record.flush()
                    stopping = _agree(accelerator, bool(arrived))
                if due or stopping:
                    saved = step + 1
                    if folder is not None or shard:
                        save_checkpoint(out, saved, state, keep=keep, write=folder is not None)
                    accelerator.wait_for_everyone()
                if stopping and saved < steps:
                    raise TrainingInterrupted(f"stopped after step {saved}; resume the run in {out} to go on")
        return Fitted(record.losses, max(first, steps), ema, time.perf_counter() - started)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if folder is not None:
            folder.close()


def _check_arguments(
    steps: int, accumulate: int, checkpoint_every: int, keep: int, log_every: int, trackers: tuple[Tracker, ...]
) -> None:
    given = {"steps": steps, "accumulate": accumulate, "checkpoint_every": checkpoint_every, "keep": keep}
    for name, value in (given | {"log_every": log_every}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    require_trackers(trackers)


def _accelerator(
    precision: Precision, trackers: tuple[Tracker, ...], out: Path, find_unused: bool
) -> tuple[Accelerator, Resolved]:
    # accelerate keeps the first precision of a process for good; a second `fit` may want another.
    AcceleratorState._reset_state(reset_partial_state=False)
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    chosen = resolve_precision(precision, "cuda" if on_gpu else "cpu")
    accelerator = Accelerator(
        mixed_precision="no" if chosen == "fp32" else chosen,
        log_with=list(trackers) or None,
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    if accelerator.distributed_type not in REPLICATED:
        raise ValueError(
            f"accelerate is set to {accelerator.distributed_type.value}; choose CPU or multi-GPU in `accelerate config`"
            ". A model that is too large for one device is spread by fit itself: shard=(class names of its blocks)"
        )
    return accelerator, chosen


def _describe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    schedule: Schedule,
    clip: float | None,
    ema_decay: float | None,
    precision: Resolved,
    accumulate: int,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What makes two runs the same run; `steps` is not in it, so a run can be made longer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        foreign = sum(p not in names for p in group["params"])
        if foreign:
            raise ValueError(f"the optimizer holds {foreign} parameters that are not the model's")
        plain = {k: v for k, v in group.items() if k != "params" and isinstance(v, (int, float, str, bool, tuple))}
        groups.append(plain | {"parameters": len(group["params"])})
    shapes = [f"{name} {tuple(p.shape)} {p.requires_grad}" for p, name in names.items()]
    return {
        "model": type(model).__name__,
        "parameters": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "seed": seed,
        "schedule": asdict(schedule),
        "clip": clip,
        "ema_decay": ema_decay,
        "precision": precision,
        "accumulate": accumulate,
        "settings": dict(settings or {}),
    }


def _restore(accelerator: Accelerator, out: Path, state: TrainingState) -> int:
    accelerator.wait_for_everyone()
    found = latest_checkpoint(out)
    return 0 if found is None else load_checkpoint(found, state)


def _update(
    accelerator: Accelerator,
    wrapped: nn.Module,
    stepper: Any,
    incoming: Iterator[Any],
    step: int,
    seed: int,
    accumulate: int,
    clip: float | None,
) -> dict[str, Tensor]:
    """One step of the optimizer; returns the mean of each loss term and the norm of the gradient, on the device."""
    sums: dict[str, Tensor] = {}
    for part in range(accumulate):
        batch = send_to_device(next(incoming), accelerator.device, non_blocking=True)
        number = seed_of(seed, step * accumulate + part, accelerator.process_index)
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.manual_seed(number)
        generator = torch.Generator(accelerator.device).manual_seed(number)
        with nullcontext() if part == accumulate - 1 else accelerator.no_sync(wrapped):
            terms = wrapped(batch, generator)
            accelerator.backward(terms["total"] / accumulate)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / accumulate
    if clip is not None:
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip)
        if norm is not None:
            sums["grad_norm"] = whole(norm.detach())
    stepper.step()
    stepper.zero_grad()
    return sums


def _agree(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process was told to stop."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return accelerator.reduce(flag, "sum").item() > 0
