"""Whether what a folder holds was made with the settings that are given now."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, keys: Iterable[str] | None = None) -> list[str]:
    """`name: value before, value now` for each of the keys (by default those of `now`) that differs."""
    return [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in (now if keys is None else keys)
        if before.get(key) != now.get(key)
    ]


def require_same_settings(made: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a result that was made with other settings.

    Args:
        made: The file or folder that is there.
        before: Its settings; more than those of `now` do not matter.
        now: Those that are given, in the types that JSON gives back.

    Raises:
        ValueError: Names what differs.
    """
    if wrong := differences(before, now):
        raise ValueError(f"{made} was made with other settings ({'; '.join(wrong)}): give the same, or a new --out")
