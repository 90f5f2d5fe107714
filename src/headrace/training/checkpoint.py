"""A training run's folder: one process at a time, one run per folder, and checkpoints that are whole or not there.

    OUT/run.json                         what the run is: model, optimizer, schedule, seed, ...
    OUT/log.jsonl                        one line per step
    OUT/checkpoints/step_00001000/       model, optimizer and ema.safetensors, state.json

A checkpoint is written under a hidden name, flushed to disk and renamed; only renamed folders count. Nothing in it is a
pickle. The state of random generators is not saved because `fit` derives every draw from (seed, step, process).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headrace.nn.pretrained import load_strictly, read_weights, void, write_atomically
from headrace.nn.shards import part, whole
from headrace.training.ema import Ema
from headrace.training.same_settings import differences

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """The output folder of one run, locked while this object is open (a killed process frees the lock).

    Args:
        out: The folder; created when missing. Files that are not a run's own may lie in it.
        description: JSON-ready facts that must stay the same when the run goes on.
        resume: Go on with the run in the folder; a folder without one starts from the beginning.

    Raises:
        FileExistsError: Another process trains into it, or it holds a run and `resume` is False.
        ValueError: `resume` with another model or other settings; names each that differs.
    """

    def __init__(self, out: Path, description: Mapping[str, Any], *, resume: bool) -> None:
        self.path = out
        self._lock = _lock(out)
        try:
            self._claim(json.loads(json.dumps(description)), resume)
        except BaseException:
            self.close()
            raise

    def _claim(self, description: dict[str, Any], resume: bool) -> None:
        recorded = self.path / RUN_FILE
        if recorded.is_file():
            if not resume:
                raise FileExistsError(
                    f"{self.path} already holds a training run; resume it, or give another output folder"
                )
            _require_same_run(json.loads(recorded.read_text()), description, self.path)
        elif (self.path / CHECKPOINTS).exists():
            raise FileExistsError(f"{self.path} holds checkpoints without {RUN_FILE}; give another output folder")
        else:
            text = json.dumps(description, indent=2) + "\n"
            write_atomically(recorded, lambda path: void(path.write_text(text)))
        for leftover in (self.path / CHECKPOINTS).glob(".*"):
            shutil.rmtree(leftover)

    @property
    def log(self) -> Path:
        """Where the JSON lines go."""
        return self.path / LOG_FILE

    def close(self) -> None:
        """Free the folder for another process."""
        self._lock.close()


def latest_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`, or None."""
    found = sorted((out / CHECKPOINTS).glob("step_*"))
    return found[-1] if found else None


def _lock(out: Path) -> TextIO:
    out.mkdir(parents=True, exist_ok=True)
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise FileExistsError(f"another process trains into {out} right now; give another output folder") from error
    return file


def _require_same_run(recorded: dict[str, Any], given: dict[str, Any], out: Path) -> None:
    if differing := differences(recorded, given, keys=sorted(recorded.keys() | given.keys())):
        raise ValueError(
            f"{out} holds another run ({'; '.join(differing)}). Resume with the same settings, or use a new folder."
        )


@dataclass(kw_only=True)
class TrainingState:
    """What a checkpoint holds, as live objects.

    Attributes:
        model: The bare model, not wrapped for several processes.
        optimizer: Its parameters are all the model's.
        ema: The average, if there is one.
        scaler: Gradient scaler of fp16, if there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    scaler: torch.amp.GradScaler | None = None


def save_checkpoint(folder: Path, step: int, state: TrainingState, *, keep: int, write: bool = True) -> Path:
    """Write the checkpoint after `step` updates and drop all but the newest `keep`.

    Where the model is spread over processes all of them must call this, one with `write`: the parts are gathered.

    Raises:
        OSError: Disk full or not writable; the checkpoints written before are untouched.
    """
    parent = folder / CHECKPOINTS
    target = parent / f"step_{step:08d}"
    contents = _contents(step, state)
    if not write:
        return target
    temporary = parent / f".{target.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, contents)
        for path in temporary.iterdir():
            _flush_to_disk(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        _flush_to_disk(parent)
    except OSError as error:
        raise OSError(
            error.errno, f"the checkpoint after step {step} could not be written ({error}); earlier ones are whole"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target


def _contents(step: int, state: TrainingState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by the name of their file, and the facts beside them."""
    tensors, numbers = _optimizer_state(state.model, state.optimizer)
    files = {"model": _without_aliases(state.model.state_dict()), "optimizer": tensors}
    facts: dict[str, Any] = {"step": step, "optimizer_numbers": numbers}
    if state.ema is not None:
        files["ema"] = {k: whole(v).cpu().contiguous() for k, v in state.ema.shadow.items()}
        facts["ema_updates"] = state.ema.updates
    if state.scaler is not None:
        facts["scaler"] = state.scaler.state_dict()
    return files, facts


def _write(folder: Path, contents: tuple[dict[str, dict[str, Tensor]], dict[str, Any]]) -> None:
    files, facts = contents
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"} if name == "model" else None)
    (folder / "state.json").write_text(json.dumps(facts) + "\n")


def load_checkpoint(folder: Path, state: TrainingState) -> int:
    """Bring the objects to the checkpoint's state.

    Returns:
        The number of updates done.

    Raises:
        ValueError: A damaged file, or weights of another model; says which file and what to do.
    """
    try:
        facts = json.loads((folder / "state.json").read_text())
        load_strictly(state.model, read_weights(folder / "model.safetensors"), what=str(folder))
        saved = _with_numbers(read_weights(folder / "optimizer.safetensors"), facts["optimizer_numbers"])
        _restore_optimizer(state.model, state.optimizer, saved)
        if state.ema is not None:
            state.ema.load(read_weights(folder / "ema.safetensors"), facts["ema_updates"])
        if state.scaler is not None and facts.get("scaler"):
            state.scaler.load_state_dict(facts["scaler"])
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(
            f"the checkpoint {folder} cannot be used ({error}). Delete that folder to resume from the one before it."
        ) from error
    return int(facts["step"])


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once, on the CPU; `load_strictly` accepts the missing second name."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    unique = {}
    for key, spread in state.items():
        value, own = whole(spread.detach()), part(spread)
        place = own.data_ptr(), value.shape, value.stride()  # a gathered copy's memory is used again for the next
        if value.numel() and place in seen:
            continue
        seen.add(place)
        unique[key] = value.cpu().clone().contiguous()
    return unique


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Per-parameter state as `name/entry`: tensors for safetensors, other values for JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{entry}"] = whole(value.detach()).cpu().clone().contiguous()
            elif value is None or isinstance(value, (int, float, bool, str)):
                numbers.setdefault(name, {})[entry] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} ({entry}) per parameter; "
                    "checkpoints hold tensors and numbers only"
                )
    return tensors, numbers


def _with_numbers(tensors: dict[str, Tensor], numbers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in numbers.items()}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        state.setdefault(name, {})[entry] = value
    return state


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Through `load_state_dict`, which moves tensors to where the optimizer wants them; options stay the caller's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    unknown = sorted(saved.keys() - names.values())
    if unknown:
        raise ValueError(f"the saved optimizer knows {', '.join(unknown[:5])}, which the model has not")
    groups = optimizer.state_dict()["param_groups"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {index: saved[names[p]] for index, p in enumerate(order) if names[p] in saved}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
