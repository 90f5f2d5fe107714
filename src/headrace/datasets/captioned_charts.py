"""Generated flowcharts with captions that say ground, reading direction and number of boxes; from a folder on disk."""

# Shape letters in this file: B batch, S side in pixels.

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from headrace.datasets.captioned_shapes import Captioned
from headrace.datasets.flowlearn.records import Graph
from headrace.datasets.flowlearn.write import CHARTS_FILE, MANIFEST_FILE, image_paths

GROUNDS = ("white", "grey", "coloured")
POINTS = {"TB": "down", "TD": "down", "BT": "up", "LR": "right", "RL": "left"}
NUMBERS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
CHART_CAPTIONS = tuple(
    f"{ground} flowchart {point} {number} boxes"
    for ground, point, number in itertools.product(GROUNDS, ("down", "up", "right", "left"), NUMBERS)
)
PLAIN_GROUNDS = {"FFFFFF": "white", "C0C0C0": "grey"}


def chart_caption(graph: Graph, background: str) -> str:
    """What is said of a chart, one of `CHART_CAPTIONS`.

    Args:
        graph: Boxes and the direction in which it is read.
        background: RGB as six hexadecimal digits; every colour but white and silver is `coloured`.

    Raises:
        ValueError: A number of boxes that the captions have no word for.
    """
    if not 3 <= len(graph.nodes) < 3 + len(NUMBERS):
        raise ValueError(f"captions count 3 to {2 + len(NUMBERS)} boxes, this chart has {len(graph.nodes)}")
    ground = PLAIN_GROUNDS.get(background.upper(), "coloured")
    return f"{ground} flowchart {POINTS[graph.direction]} {NUMBERS[len(graph.nodes) - 3]} boxes"


class CaptionedCharts:
    """Charts of a folder that `headrace flowlearn generate` wrote, scaled into a square. All pictures lie in memory.

    Args:
        folder: Holds `charts.jsonl`, `manifest.json` and the pictures.
        size: Side S [px]; a chart keeps its proportions, the rest of the square is its ground.

    Raises:
        FileNotFoundError: The folder or a picture is missing; says how to make one.
        ValueError: A picture cannot be read, or its chart has no caption; names the file.
    """

    captions = CHART_CAPTIONS

    def __init__(self, folder: Path, *, size: int) -> None:
        if not (folder / CHARTS_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no generated charts ({CHARTS_FILE}, {MANIFEST_FILE}); make them with "
                f"`headrace flowlearn generate --count 2000 --variant char --out {folder}`"
            )
        variant = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["variant"]
        lines = (folder / CHARTS_FILE).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        labels, pictures = [], []
        for row in rows:
            caption = chart_caption(Graph.from_dict(row["graph"]), row["bg"])
            labels.append(CHART_CAPTIONS.index(caption))
            pictures.append(_square(folder / image_paths(variant, row["name"])[0], size, row["bg"]))
        self._pictures, self._labels = np.stack(pictures), np.array(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: np.ndarray) -> Captioned:
        """Pictures of these indices, (B, 3, S, S) in [0, 1], and which of `captions` each has."""
        pictures = torch.from_numpy(self._pictures[indices]).permute(0, 3, 1, 2).float().div(255)
        return Captioned(pictures.contiguous(), torch.from_numpy(self._labels[indices]))


def _square(path: Path, size: int, background: str) -> np.ndarray:
    try:
        picture = Image.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that can be read; generate the charts again") from error
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), f"#{background}")
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(square)
