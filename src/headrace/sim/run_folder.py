"""The folder of a run: held by one process, appended to line by line, never half-written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.training.same_settings import differences

RUN_FILE = "run.json"
LOCK_FILE = ".lock"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder for one run.

    Raises:
        FileExistsError: Another run holds it now.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another run is writing to {folder}; give this one its own --out") from error
        yield


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """Finished episodes of an earlier run; a last line that was cut off by a kill is dropped from the file."""
    if not path.exists():
        return []
    whole, rows = b"", []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            rows.pop()
            break
        whole += line
    if len(whole) != path.stat().st_size:
        temporary = path.with_suffix(".part")
        temporary.write_bytes(whole)
        temporary.replace(path)
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and force it to the disk."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """An object that `write_json` wrote; empty where there is none, or what is there cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    temporary.replace(path)


def check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run that was made with other settings.

    Raises:
        FileExistsError: Names what differs.
    """
    path = folder / RUN_FILE
    if path.exists():
        if differing := differences(json.loads(path.read_text()), identity):
            raise FileExistsError(
                f"{folder} holds another run ({'; '.join(differing)}). Give a new --out, or remove that folder."
            )
    else:
        write_json(path, identity)


def check_same_environment(folder: Path, task: str, about: dict[str, Any]) -> None:
    """Refuse to add episodes of another environment, such as another renderer's, to those of a task that are there.

    What the first call for a task is told is kept in the folder's `run.json`; versions of packages may differ.

    Raises:
        FileExistsError: Names what differs.
    """
    run = read_json(folder / RUN_FILE)
    known = run.get("environments", {})
    if task not in known:
        write_json(folder / RUN_FILE, {**run, "environments": {**known, task: about}})
        return
    told = json.loads(json.dumps(about))
    shared = [key for key in known[task] if key != "packages" and key in told]
    if differing := differences(known[task], told, keys=shared):
        raise FileExistsError(
            f"the episodes of {task} in {folder} are of another environment ({'; '.join(differing)}). "
            "Go on where they were made, or give a new --out."
        )
