"""The files of a LeRobotDataset v3.0, as written by LeRobot 0.6.1; every error names the file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class EpisodeVideo(NamedTuple):
    """Where one episode lies: chunk and file of its video, its start in it [s], its first row and the row after."""

    episode: int
    chunk: int
    file: int
    start: float
    first_row: int
    end_row: int


def resolve_dataset(source: str | Path, *, revision: str | None = None) -> Path:
    """Turn a folder, a dataset in LeRobot's cache or a Hub id into a local folder.

    Raises:
        FileNotFoundError: None of the three.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    home = os.environ.get("HF_LEROBOT_HOME") or Path.home() / ".cache" / "huggingface" / "lerobot"
    recorded = Path(home) / text
    if (recorded / "meta" / "info.json").is_file():
        return recorded
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no dataset folder {text!r} here, and it is not a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, repo_type="dataset", revision=revision))
    except Exception as error:
        raise FileNotFoundError(
            f"no dataset folder {text!r} here or in {home}, and the Hub did not give it "
            f"({type(error).__name__}: {error})"
        ) from error


def read_info(folder: Path) -> dict[str, Any]:
    """meta/info.json, checked: v3, with frames in it."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no meta/info.json: it is not a LeRobotDataset")
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the dataset again") from error
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise ValueError(
            f"{folder} is a LeRobotDataset {version}, v3.0 is needed; convert it with "
            "`python -m lerobot.scripts.convert_dataset_v21_to_v30`"
        )
    if not info.get("total_frames"):
        raise ValueError(f"{folder} is empty: it holds no episodes")
    return info


def find_cameras(features: dict[str, Any], wanted: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    """Whole keys of the wanted colour cameras, which may be given by their last part; all for None."""
    present = [
        key
        for key, feature in features.items()
        if feature["dtype"] in ("video", "image") and not (feature.get("info") or {}).get("is_depth_map")
    ]
    if wanted is None:
        return tuple(present)
    short = {key.rsplit(".", 1)[-1]: key for key in present}
    missing = [name for name in wanted if name not in present and name not in short]
    if missing:
        has = ", ".join(short) or "none"
        raise ValueError(f"{folder} has no camera {', '.join(missing)}; wanted {', '.join(wanted)}, it has {has}")
    return tuple(name if name in present else short[name] for name in wanted)


def vector_names(features: dict[str, Any], keys: Sequence[str], folder: Path) -> tuple[str, ...]:
    """One name per number of the vectors under `keys`."""
    names: list[str] = []
    for key in keys:
        if key not in features or len(features[key]["shape"]) != 1:
            vectors = [k for k, f in features.items() if len(f["shape"]) == 1]
            raise ValueError(f"{folder} has no vector {key!r}; it has {', '.join(vectors)}")
        size, given = features[key]["shape"][0], features[key].get("names")
        flat = next(iter(given.values())) if isinstance(given, dict) else given
        names += flat if isinstance(flat, list) and len(flat) == size else [f"{key}.{i}" for i in range(size)]
    return tuple(names)


def data_files(folder: Path) -> list[Path]:
    """The parquet files with the rows, in order."""
    return sorted((folder / "data").rglob("*.parquet"))


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as parquet with the columns {', '.join(columns)} ({error}); it is truncated, or "
            "its recording was never finalised"
        ) from error


def read_columns(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns over all files: shape (N,) or, for vectors, (N, D)."""
    tables = [_read_table(path, names) for path in data_files(folder)]
    if not sum(table.num_rows for table in tables):
        raise ValueError(f"{folder} is empty: data/ holds no frames")
    return {name: np.concatenate([_to_array(table.column(name)) for table in tables]) for name in names}


def _to_array(column: pa.ChunkedArray) -> np.ndarray:
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0)
    width = 0
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        width = len(values)
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    return array.reshape(width, -1) if width else array


def read_tasks(folder: Path, highest: int) -> list[str]:
    """Task strings by task_index; the string column is `task` or the saved index of a pandas table."""
    table = _read_whole(folder / "meta" / "tasks.parquet")
    text = next(name for name in table.column_names if name != "task_index")
    by_index = dict(zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True))
    missing = [index for index in range(highest + 1) if index not in by_index]
    if missing:
        raise ValueError(f"{folder}/meta/tasks.parquet does not name task {missing[0]}, which data/ uses")
    return [str(by_index[index]) for index in range(highest + 1)]


def _read_whole(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); the dataset is incomplete, copy it again") from error


def read_episodes(folder: Path, key: str) -> list[EpisodeVideo]:
    """Where each episode's video of camera `key` lies."""
    names = [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    names = ["episode_index", *names, "dataset_from_index", "dataset_to_index"]
    found: list[EpisodeVideo] = []
    for path in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        table = _read_table(path, names)
        found += map(EpisodeVideo._make, zip(*(table.column(name).to_pylist() for name in names), strict=True))
    return found
