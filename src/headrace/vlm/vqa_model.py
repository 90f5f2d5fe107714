"""Open a model for a run, with or without pruning, and tell models apart by what is in their files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from headrace.vlm.canvas import Canvas
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.vqa_run import Answerer

_HEAD = 1 << 20  # bytes of each weights file that go into the fingerprint, beside its size


def model_name(source: str) -> str:
    """`source` with a fingerprint of its files when it is a folder, so that another checkpoint under one name shows."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt"):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HEAD))
    return f"{folder.name}@{digest.hexdigest()[:12]}"


def budget_of(keep: float) -> Budget:
    """A whole number from 1 on is a number of tokens, anything below 1 a share.

    Raises:
        ValueError: Not above 0, or above 1 and not whole.
    """
    if keep >= 1 and keep == int(keep):
        return Budget(tokens=int(keep))
    return Budget(share=keep)


def pruning_of(method: str | None, keep: float | None) -> Any:
    """Settings of `--prune METHOD --keep N`, or None for no pruning.

    Raises:
        ValueError: One of the two without the other, an unknown method, a budget that cannot be.
    """
    if method is None and keep is None:
        return None
    if method is None or keep is None:
        raise ValueError("--prune METHOD and --keep N go together")
    from headrace.vlm.pruning.auto import pruning_config

    return pruning_config(method, budget_of(keep))


def pruning_identity(pruning: Any) -> dict[str, Any] | None:
    """JSON-ready form of the settings for `run.json`."""
    if pruning is None:
        return None
    from headrace.vlm.pruning.auto import pruning_to_dict

    return json.loads(json.dumps(pruning_to_dict(pruning)))


def opener(source: str, *, device: str, pruning: Any) -> Callable[[], Answerer]:
    """A function that opens the model; nothing is loaded before it is called.

    Calling it raises FileNotFoundError or OSError when there is no such model.
    """

    def open_it() -> Answerer:
        from headrace.vlm.auto import load_vlm

        return load_vlm(source, pruning=pruning, device=device)

    return open_it


def set_pruning(model: Any, pruning: Any) -> None:
    """Give an open model other pruning settings; None switches pruning off.

    Raises:
        ValueError: The model takes none.
    """
    if not hasattr(model, "pruning"):
        raise ValueError(f"{type(model).__name__} takes no pruning; use a model with a vision encoder")
    model.pruning = pruning


def note_kept(model: Any, data: Path, image: str, file: Path) -> None:
    """Append to `file` which visual tokens of a picture stayed, and where on the token grid the picture lies.

    Nothing is written when nothing was pruned. `image` is relative to `data`.
    """
    found = kept_tokens(model)
    if found is None:
        return
    note: dict[str, Any] = {"image": image, "kept": found[0], "of": found[1]}
    canvas = getattr(getattr(model, "encoder", None), "preprocessing", None)
    if isinstance(canvas, Canvas):
        with Image.open(data / image) as opened:
            note["region"] = canvas.region(*opened.size)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(note) + "\n")


def kept_tokens(model: Any) -> tuple[list[int], int] | None:
    """Which visual tokens of the last picture stayed (raster order), and of how many; None when nothing was pruned."""
    record = getattr(model, "record", None)
    if record is None or not record.kept:
        return None
    return list(record.kept[0]), int(record.units[0])
