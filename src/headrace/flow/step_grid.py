"""A grid of sampling times that belongs to one network, kept as JSON beside its weights."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from headrace.flow.solver import SolverSettings, check_grid, uniform_grid

GRID_FILE = "step_grid.json"


class GridMismatch(ValueError):
    """A network that was straightened for one grid was to be sampled on another."""


@dataclass(frozen=True, kw_only=True)
class StepGrid:
    """Times to visit, with how they were found and whether the network was tuned for exactly them.

    Attributes:
        times: Rising strictly from 0 to 1.
        source: `uniform`, or the Bellman cost that was minimised: `local` or `endpoint`.
        tuned: The network was straightened on these times; it is then wrong on any others.
        fine_steps: Steps of the uniform grid that the times were chosen from; 0 for a uniform grid.
        samples: Noise samples that the cost is a mean over; 0 for a uniform grid.
        cost: The minimised cost, in squared units of the state; 0 for a uniform grid.
    """

    times: tuple[float, ...]
    source: Literal["uniform", "local", "endpoint"] = "uniform"
    tuned: bool = False
    fine_steps: int = 0
    samples: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        SolverSettings(grid=tuple(self.times))
        object.__setattr__(self, "times", check_grid(self.times))
        if self.source not in ("uniform", "local", "endpoint"):
            raise ValueError(f"unknown grid source {self.source!r} (known: uniform, local, endpoint)")

    @classmethod
    def uniform(cls, steps: int) -> "StepGrid":
        """Equal steps."""
        return cls(times=uniform_grid(steps))

    @property
    def steps(self) -> int:
        """Number of Euler steps."""
        return len(self.times) - 1

    @property
    def settings(self) -> SolverSettings:
        """Euler on these times."""
        return SolverSettings(method="euler", grid=self.times)

    def require(self, settings: SolverSettings) -> None:
        """Refuse settings that a tuned network was not tuned for; an untuned network may be sampled anyhow.

        Raises:
            GridMismatch: The network is tuned and the method is not Euler, or the times differ by more than 1e-6.
        """
        if not self.tuned:
            return
        times: Sequence[float] = settings.times
        same = len(times) == len(self.times) and all(abs(a - b) <= 1e-6 for a, b in zip(times, self.times, strict=True))
        if settings.method != "euler" or not same:
            shown = ", ".join(f"{t:.4g}" for t in self.times)
            raise GridMismatch(
                f"this network was straightened for {self.steps} Euler steps at [{shown}] and is wrong on any other "
                f"grid, such as {settings.to_json()}. Sample it on its own grid, or load the network from before "
                "straightening"
            )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `step_grid.json` into a model folder, by a temporary name; returns the path."""
        path = Path(folder) / GRID_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "StepGrid":
        """Read a grid from a model folder or from a JSON file.

        Raises:
            FileNotFoundError: No such file; says how to make one.
            ValueError: Not JSON, unknown keys (named), or times that are no grid; names the file.
        """
        path = Path(source)
        path = path / GRID_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no step grid at {path}; make one with headrace.flow.bellman.bellman_grid")
        return cls._read(path, _read_json(path))

    @classmethod
    def _read(cls, path: Path, data: Any) -> "StepGrid":
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) - known or "times" not in data:
            raise ValueError(f"{path} is not a step grid: it needs `times` and knows only {', '.join(sorted(known))}")
        try:
            return cls(**{**data, "times": tuple(data["times"])})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a step grid: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def read_grid(source: str | os.PathLike[str]) -> StepGrid:
    """A grid as a user gives it: a model folder, a file that `StepGrid.save` wrote, or a JSON list of times.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or times that are no grid; names the file.
    """
    path = Path(source)
    if path.is_file():
        data = _read_json(path)
        return StepGrid._read(path, {"times": data} if isinstance(data, list) else data)
    return StepGrid.load(path)


def settings_for(
    folder: str | os.PathLike[str], asked: SolverSettings | None = None, *, default: SolverSettings | None = None
) -> SolverSettings:
    """How to sample the model in a folder: as asked, else on the grid saved with it, else by the default.

    Args:
        folder: Model folder; need not hold a grid.
        asked: What the user chose, if anything.
        default: For a model without a grid; ten Euler steps if not given.

    Raises:
        GridMismatch: The model is straightened for its grid and something else was asked for.
        ValueError: The grid's file is broken.
    """
    return settings_on(saved_grid(folder), asked, default=default)


def saved_grid(folder: str | os.PathLike[str]) -> StepGrid | None:
    """The grid saved in a model folder, if any; raises ValueError where its file is broken."""
    return StepGrid.load(folder) if (Path(folder) / GRID_FILE).is_file() else None


def settings_on(
    grid: StepGrid | None, asked: SolverSettings | None = None, *, default: SolverSettings | None = None
) -> SolverSettings:
    """As `settings_for`, for a network whose grid is already read; None for a network without one.

    Raises:
        GridMismatch: The network is straightened for its grid and something else was asked for.
    """
    if grid is None:
        return asked or default or SolverSettings(steps=10)
    if asked is None:
        return grid.settings
    grid.require(asked)
    return asked
