"""The training log: one JSON line per step, and TensorBoard or Weights & Biases beside it when asked for."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from headrace.nn.pretrained import void, write_atomically
from headrace.training.checkpoint import RunFolder

Tracker = Literal["tensorboard", "wandb"]


def require_trackers(trackers: tuple[Tracker, ...]) -> None:
    """Check that the asked-for trackers are known and installed, before any work is done.

    Raises:
        ValueError: Unknown name.
        ModuleNotFoundError: Not installed; names the extra.
    """
    for name in trackers:
        if name not in ("tensorboard", "wandb"):
            raise ValueError(f"unknown tracker {name!r}; there are tensorboard and wandb")
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed; pip install 'headrace[track]'")


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log, oldest first; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_log(path: Path, step: int) -> None:
    """Keep only rows of updates before `step`, so that a resumed run writes every step once."""
    rows = [row for row in read_log(path) if row["step"] < step]
    write_atomically(path, lambda temporary: void(temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))))


def append_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Add rows at the end."""
    with path.open("a") as file:
        file.writelines(json.dumps(dict(row)) + "\n" for row in rows)


class Record:
    """Collects rows on the device and writes them in groups, so that a GPU is not stopped at every step."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder | None,
        first: int,
        steps: int,
        trackers: tuple[Tracker, ...],
        settings: Mapping[str, Any] | None,
        progress: bool,
    ) -> None:
        self.losses: list[float] = []
        self._accelerator, self._folder, self._trackers = accelerator, folder, trackers
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        if folder is not None:
            cut_log(folder.log, first)
        if trackers:
            accelerator.init_trackers("headrace", config=dict(settings or {}))
        hidden = not progress or folder is None
        self._bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=hidden, mininterval=1.0)

    def add(self, step: int, values: dict[str, Tensor | float]) -> None:
        """Note one step's values."""
        self._pending.append((step, values))
        self._bar.update()

    def flush(self) -> None:
        """Average over processes, check, and write."""
        if not self._pending:
            return
        names = [name for name, value in self._pending[0][1].items() if isinstance(value, Tensor)]
        table = torch.stack([torch.stack([torch.as_tensor(v[n]).float() for n in names]) for _, v in self._pending])
        means = self._accelerator.reduce(table, "mean").tolist()
        rows = [
            {"step": step, **values, **dict(zip(names, mean, strict=True))}
            for (step, values), mean in zip(self._pending, means, strict=True)
        ]
        self._pending.clear()
        for row in rows:
            if not np.isfinite(row["total"]):
                raise FloatingPointError(
                    f"the loss is {row['total']} at step {row['step']}; lower the learning rate, or resume from the "
                    "last checkpoint with other settings in a new folder"
                )
        self.losses += [row["total"] for row in rows]
        if self._folder is not None:
            append_rows(self._folder.log, rows)
        if self._trackers:
            values = {name: value for name, value in rows[-1].items() if name != "step"}
            self._accelerator.log(values, step=int(rows[-1]["step"]))
        self._bar.set_postfix(loss=f"{rows[-1]['total']:.4f}")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._trackers:
            self._accelerator.end_training()
