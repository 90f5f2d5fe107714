"""Fast reading of datasets that hold pictures in their tables, for LeRobot 0.6.1.

LeRobot answers a window of actions through a transform that decodes every column of every row in the window, so that a
chunk of 50 actions costs 50 pictures per camera (lerobot issues 2895 and 4392; repaired upstream by pull request 4314
for the release after 0.6.1). Here numbers are answered from their own columns; pictures are decoded only where a window
asks for pictures. The samples are the same to the bit.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lerobot.datasets.dataset_reader import DatasetReader

SLOW_VERSIONS = ("0.6.0", "0.6.1")
_stock = DatasetReader._query_hf_dataset


def install() -> bool:
    """Replace the reader's query in this process; False where LeRobot does not need it. A second call is harmless."""
    if version("lerobot") not in SLOW_VERSIONS:
        return False
    DatasetReader._query_hf_dataset = _query  # type: ignore[method-assign]
    return True


def uninstall() -> None:
    """Give LeRobot its own query back."""
    DatasetReader._query_hf_dataset = _stock  # type: ignore[method-assign]


def _query(self: DatasetReader, query_indices: dict[str, list[int]]) -> dict[str, Any]:
    pictures = {key: rows for key, rows in query_indices.items() if key in self._meta.camera_keys}
    answer = _stock(self, pictures) if pictures else {}
    for key, rows in query_indices.items():
        if key not in pictures:
            answer[key] = _column(self, key)[_relative(self, rows)]
    return {key: answer[key] for key in query_indices if key in answer}


def _relative(reader: DatasetReader, rows: list[int]) -> list[int]:
    """Row numbers among the chosen episodes."""
    mapping = reader._absolute_to_relative_idx
    return rows if mapping is None else [mapping[row] for row in rows]


def _column(reader: DatasetReader, key: str) -> torch.Tensor:
    """All rows of a column of numbers, read once per reader, in the dtype that LeRobot's own transform gives."""
    kept: dict[str, torch.Tensor] = reader.__dict__.setdefault("_headrace_columns", {})
    if key not in kept:
        column = reader.hf_dataset.with_format("numpy", columns=[key])[:][key]
        values = np.stack(column) if column.dtype == object else np.ascontiguousarray(column)
        like = reader.hf_dataset[0][key]
        kept[key] = torch.from_numpy(values).to(like.dtype).reshape(len(values), *like.shape)
    return kept[key]
