"""JSON files that users write or download: one clear error that names the file."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, *, hint: str) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        hint: What to do when it is no JSON, the end of the error.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or not UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {hint}") from error


def read_object(path: Path, *, wanted: str, hint: str) -> dict[str, Any]:
    """The one object that a JSON file holds.

    Args:
        path, hint: As `read_json`.
        wanted: What the object should be, for the error.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or another thing than an object.
    """
    data = read_json(path, hint=hint)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; wanted {wanted}")
    return data
