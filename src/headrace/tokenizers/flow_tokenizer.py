"""A tokenizer that samples a flow, and the step grid that may have been saved with its weights."""

import os
from pathlib import Path
from typing import Any, Self

from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import GRID_FILE, StepGrid, saved_grid, settings_on
from headrace.nn.pretrained import resolve_folder
from headrace.tokenizers.base import Tokenizer


class FlowTokenizer(Tokenizer):
    """A tokenizer whose pictures come of a flow.

    Attributes:
        step_grid: Saved with the weights (BOSS), read and written with them; None for a network without one. A network
            that was straightened for it refuses every other.
    """

    step_grid: StepGrid | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.step_grid = None

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """As `Pretrained.from_pretrained`, with the folder's step grid; a broken one raises ValueError."""
        folder = resolve_folder(source, revision=revision)
        model = super().from_pretrained(folder)
        model.step_grid = saved_grid(folder)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As `Pretrained.save_pretrained`, with the step grid beside the weights; another network's is removed."""
        super().save_pretrained(folder)
        if self.step_grid is not None:
            self.step_grid.save(folder)
        else:
            (Path(folder) / GRID_FILE).unlink(missing_ok=True)

    def settings(self, asked: SolverSettings | None, *, default: SolverSettings) -> SolverSettings:
        """How to sample: as asked, else on the grid saved with the weights, else by the default.

        Raises:
            GridMismatch: The network is straightened for its grid and something else was asked for.
        """
        return settings_on(self.step_grid, asked, default=default)


def one_of(solver: SolverSettings | None, from_steps: SolverSettings | None) -> SolverSettings | None:
    """What a caller asked for, by a solver or by a step count; raises ValueError for both."""
    if solver is not None and from_steps is not None:
        raise ValueError("give either steps or solver")
    return solver or from_steps
