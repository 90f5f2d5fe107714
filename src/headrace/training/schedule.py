"""Learning-rate schedules: the factor on the base learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then constant or a half cosine down to `floor`.

    Attributes:
        kind: `constant` stays at 1 after the warm-up; `cosine` falls from 1 to `floor` at `steps` and stays there.
        warmup: Steps until the factor reaches 1; the first step has `1 / warmup`, never 0.
        steps: Where the cosine ends. Needed for `cosine`, refused for `constant`, where it would mean nothing.
        floor: Last factor of the cosine, 0 to 1.
    """

    kind: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    steps: int | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine"):
            raise ValueError(f"a schedule is 'constant' or 'cosine', got {self.kind!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more steps, got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a factor from 0 to 1, got {self.floor}")
        if self.kind == "constant" and (self.steps is not None or self.floor):
            raise ValueError("a constant schedule takes no steps and no floor; use kind='cosine'")
        if self.kind == "cosine" and (self.steps is None or self.steps <= self.warmup):
            raise ValueError(f"a cosine schedule needs steps above its warmup ({self.warmup}), got {self.steps}")

    def factor(self, step: int) -> float:
        """Factor for the update number `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant" or self.steps is None:
            return 1.0
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
