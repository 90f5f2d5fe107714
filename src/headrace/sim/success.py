"""When an episode counts as a success: rules with names, both readings always recorded."""

from typing import Literal, NamedTuple

SuccessRule = Literal["once", "at_end"]
RULES: dict[str, str] = {
    "once": "the environment's success flag was set at any step; the episode stops there",
    "at_end": "the environment's success flag is set at the last step of a full-length episode (SIMPLER's rule)",
}


class SuccessReading(NamedTuple):
    """What one episode's success flags say under every rule."""

    once: bool
    at_end: bool
    first_step: int | None

    def under(self, rule: SuccessRule) -> bool:
        """The verdict under one rule."""
        return self.once if rule == "once" else self.at_end


def read_success(flags: list[bool]) -> SuccessReading:
    """Read the success flags of an episode, one per step; an episode without a step is no success."""
    first = next((step for step, flag in enumerate(flags, start=1) if flag), None)
    return SuccessReading(once=first is not None, at_end=bool(flags and flags[-1]), first_step=first)


def stops_early(rule: SuccessRule) -> bool:
    """Whether an episode ends at its first success under this rule."""
    return rule == "once"


def check_rule(rule: str) -> SuccessRule:
    """The rule of that name.

    Raises:
        ValueError: Unknown name; lists the known ones.
    """
    if rule not in RULES:
        raise ValueError(f"unknown success rule {rule!r} (known: {', '.join(RULES)})")
    return rule  # type: ignore[return-value]
