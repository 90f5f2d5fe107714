"""Open a model for a run, with or without pruning, and tell models apart by what is in their files."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from headrace.datasets.json_file import read_object
from headrace.nn.fingerprint import folder_fingerprint
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.vqa_run import Answerer

_KINDS = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")  # of a folder, what decides answers


def model_name(source: str) -> str:
    """`source` with a fingerprint of its files when it is a folder, so that another checkpoint under one name shows."""
    folder = Path(os.path.abspath(source))
    return f"{folder.name}@{folder_fingerprint(folder, kinds=_KINDS)}" if folder.is_dir() else source


def budget_of(keep: float) -> Budget:
    """A whole number from 1 on is a number of tokens, anything below 1 a share.

    Raises:
        ValueError: Not above 0, or above 1 and not whole.
    """
    if keep >= 1 and float(keep).is_integer():
        return Budget(tokens=int(keep))
    return Budget(share=keep)


def pruning_of(method: str | None, keep: float | None) -> Any:
    """Settings of `--prune METHOD --keep N` or of `--prune FILE.json`, or None for no pruning.

    A file holds what `pruning_to_dict` gives, such as `pruning` in a run's `run.json`; `keep` replaces its budget.

    Raises:
        ValueError: One of the two without the other, an unknown method, a budget that cannot be, a file that holds no
            settings.
        FileNotFoundError: No such file.
    """
    if method is None and keep is None:
        return None
    if method is not None and method.endswith(".json"):
        return _pruning_of_file(Path(method), keep)
    if method is None or keep is None:
        raise ValueError("--prune METHOD and --keep N go together")
    from headrace.vlm.pruning.auto import pruning_config

    return pruning_config(method, budget_of(keep))


def _pruning_of_file(path: Path, keep: float | None) -> Any:
    from headrace.vlm.pruning.auto import pruning_from_dict

    if not path.is_file():
        raise FileNotFoundError(f"no pruning settings {path}")
    wanted = "an object such as run.json's `pruning`"
    data = read_object(path, wanted=wanted, hint=f"it must hold {wanted}")
    try:
        return pruning_from_dict(data if keep is None else data | {"budget": asdict(budget_of(keep))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def note_kept(model: Any, data: Path, image: str, file: Path, *, examples: int = 0) -> None:
    """Append to `file` how many visual tokens a picture's prompt had and kept, and which of the picture's stayed.

    The latter only where the encoder prunes: with the picture's token grid, and where on it the picture lies. Nothing
    is written for a model without pruning. `image` is relative to `data`. Behind worked examples the picture is the
    prompt's last, the counts are the whole prompt's, and what stayed of crops is not noted.
    """
    if getattr(model, "pruning", None) is None or getattr(model, "record", None) is None:
        return
    before, after = token_counts(model)
    note: dict[str, Any] = {"image": image, "before": before, "after": after}
    record = model.record
    if record.kept and examples in (0, len(record.kept) - 1):
        note |= {"kept": list(record.kept[examples]), "of": int(record.units[examples]), "grid": record.grids[examples]}
        with Image.open(data / image) as opened:
            note["region"] = region_of(model, *opened.size)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(note) + "\n")


def region_of(model: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Where a picture of this size [px] lies on the token grid: left, top, right, bottom as shares of the grid.

    A picture that is cropped to its centre reaches beyond the grid. A processor that cuts a picture into several crops
    gives the whole, squashed, as the first, which is the one that is noted.
    """
    own = getattr(getattr(model, "encoder", None), "preprocessing", None)
    if own is not None:
        return own.region(width, height)
    pixels = getattr(getattr(model, "processor", None), "image_processor", None)
    if pixels is None or not getattr(pixels, "do_center_crop", False) or getattr(pixels, "image_grid_pinpoints", None):
        return 0.0, 0.0, 1.0, 1.0
    size, crop = dict(pixels.size) if pixels.do_resize else {}, pixels.crop_size
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(width, height)
        wide, high = width * scale, height * scale
    else:
        wide, high = size.get("width", width), size.get("height", height)
    wide, high = wide / crop["width"], high / crop["height"]
    return (1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2


def token_counts(model: Any) -> tuple[int, int]:
    """Visual tokens of the last prompt, before any pruning and after all of it; zeros for a model that does not say."""
    record = getattr(model, "record", None)
    if record is None:
        return 0, 0
    from headrace.vlm.pruning.reading import tokens_kept

    return record.visual_before, tokens_kept(getattr(model, "pruning", None), record)
