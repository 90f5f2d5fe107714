"""Drawn charts in memory, and changes to them that keep their annotation true: mirror, new letters, new background.

A few thousand layouts become as many charts as training needs. Letters are redrawn from other charts' pictures of the
same set, so that a mirrored chart still reads.
"""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from headrace.datasets.flowlearn.chart_picture import INK, RED, colour
from headrace.datasets.flowlearn.records import Direction, Edge, Graph, Node
from headrace.datasets.flowlearn.write import image_paths

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MIRRORED: tuple[dict[Direction, Direction], dict[Direction, Direction]] = (
    {"LR": "RL", "RL": "LR"},
    {"TB": "BT", "TD": "BT", "BT": "TB"},
)
Pixels = np.ndarray  # uint8 (H, W, 3)


class DrawnChart(NamedTuple):
    """A picture with its annotation.

    Attributes:
        pixels: uint8 (H, W, 3).
        graph: Boxes and paths in pixels of this picture.
        background: RGB as six hexadecimal digits.
        boxed: Id of the node that carries the red rectangle; None where none was drawn.
    """

    pixels: Pixels
    graph: Graph
    background: str
    boxed: str | None = None


def read_drawn(folder: Path, *, longest: int) -> list[DrawnChart]:
    """All charts of a generated folder, plain pictures, shrunk so that no side is above `longest` [px].

    Raises:
        FileNotFoundError: No charts there, or a picture is missing.
        ValueError: The charts were drawn by a version that kept no lines of arrows.
    """
    files = sorted((folder / "charts").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no charts in {folder}; run `headrace flowlearn generate` first")
    variant = json.loads((folder / "manifest.json").read_text())["variant"]
    charts = []
    for file in files:
        data = json.loads(file.read_text())
        graph = Graph.from_dict(data["graph"])
        if not all(edge.path for edge in graph.edges):
            raise ValueError(f"{file} names no lines of arrows; generate the folder anew, with Mermaid")
        with Image.open(folder / image_paths(variant, data["name"])[0]) as opened:
            picture = opened.convert("RGB")
        scale = min(1.0, longest / max(picture.size))
        if scale < 1.0:
            sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(sides, Image.Resampling.LANCZOS)
            graph = moved(graph, scale=(scale, scale))
        charts.append(DrawnChart(np.asarray(picture), graph, data["bg"]))
    return charts


def moved(graph: Graph, *, scale: tuple[float, float] = (1, 1), shift: tuple[float, float] = (0, 0)) -> Graph:
    """The graph with its boxes and paths at (x * scale + shift); a negative scale mirrors."""

    def point(x: float, y: float) -> tuple[float, float]:
        return x * scale[0] + shift[0], y * scale[1] + shift[1]

    def box(node: Node) -> Node:
        (x0, y0), (x1, y1) = point(*node.box[:2]), point(*node.box[2:])
        return node._replace(box=(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))

    edges = tuple(edge._replace(path=tuple(point(*p) for p in edge.path)) for edge in graph.edges)
    return replace(graph, nodes=tuple(box(node) for node in graph.nodes), edges=edges)


def mirrored(chart: DrawnChart, axis: int) -> DrawnChart:
    """Left and right (axis 0) or top and bottom (axis 1) changed; labels are mirrored too and need `relabelled`."""
    side = chart.pixels.shape[1 - axis]
    scale, shift = ((-1, 1), (side, 0)) if axis == 0 else ((1, -1), (0, side))
    graph = moved(chart.graph, scale=scale, shift=shift)
    graph = replace(graph, direction=_MIRRORED[axis].get(graph.direction, graph.direction))
    return chart._replace(pixels=np.flip(chart.pixels, 1 - axis), graph=graph)


def _inner(node: Node) -> tuple[int, int, int, int]:
    """Pixels inside the border: left, top, right, bottom."""
    x0, y0, x1, y1 = node.box
    return round(x0) + 3, round(y0) + 3, round(x1) - 3, round(y1) - 3


def letter_pictures(charts: list[DrawnChart], *, each: int = 8) -> dict[str, list[Pixels]]:
    """Pictures of the letters, trimmed to their ink, from charts drawn at natural size."""
    found: dict[str, list[Pixels]] = {letter: [] for letter in LETTERS}
    # How tall a box is depends on the browser's fonts; charts that were shrunk have lower ones.
    natural = max((node.box[3] - node.box[1] for chart in charts for node in chart.graph.nodes), default=0.0) - 0.5
    for chart in charts:
        for node in chart.graph.nodes:
            kept = found.get(node.label)
            if kept is None or len(kept) >= each or node.box[3] - node.box[1] < natural:
                continue
            x0, y0, x1, y1 = _inner(node)
            patch = chart.pixels[y0:y1, x0:x1]
            ink = np.flatnonzero(patch.min(axis=(0, 2)) < 190)
            if len(ink):
                kept.append(patch[:, max(0, ink[0] - 1) : ink[-1] + 2].copy())
    missing = [letter for letter, kept in found.items() if not kept]
    if missing:
        raise ValueError(
            f"no chart shows the letters {', '.join(missing)}; more charts of the `char` variant are needed"
        )
    return found


def relabelled(chart: DrawnChart, letters: dict[str, list[Pixels]], rng: random.Random) -> DrawnChart:
    """Other letters in all boxes; each box keeps its size."""
    pixels = chart.pixels.copy()
    nodes = []
    for node, label in zip(chart.graph.nodes, rng.sample(LETTERS, len(chart.graph.nodes)), strict=True):
        x0, y0, x1, y1 = _inner(node)
        glyph = rng.choice(letters[label])
        fill = np.median(glyph[:2].reshape(-1, 3), axis=0)
        pixels[y0:y1, x0:x1] = fill
        if y1 - y0 < glyph.shape[0] - 2:  # the chart was shrunk
            scale = (y1 - y0) / glyph.shape[0]
            sides = (max(1, round(glyph.shape[1] * scale)), y1 - y0)
            glyph = np.asarray(Image.fromarray(glyph).resize(sides, Image.Resampling.LANCZOS))
        high, wide = min(glyph.shape[0], y1 - y0), min(glyph.shape[1], x1 - x0)
        left = x0 + (x1 - x0 - wide) // 2
        pixels[y0 : y0 + high, left : left + wide] = glyph[:high, :wide]
        nodes.append(node._replace(label=label))
    return chart._replace(pixels=pixels, graph=replace(chart.graph, nodes=tuple(nodes)))


def recoloured(chart: DrawnChart, background: str) -> DrawnChart:
    """Another background; boxes stay. Exact up to JPEG noise where the old background is grey.

    Raises:
        ValueError: The old background is not a grey, so that ink and background cannot be told apart by brightness.
    """
    old, new = colour(chart.background), colour(background)
    if len(set(old)) != 1 or old[0] <= INK[0] + 60:
        raise ValueError(f"only a light grey background can be changed, this is {chart.background}")
    shade = np.arange(256, dtype=np.float32)
    ink = np.clip((old[0] - shade) / (old[0] - INK[0]), 0, 1)
    ink[ink < 0.06] = 0
    table = (ink[:, None] * INK[0] + (1 - ink[:, None]) * np.array(new)).astype(np.uint8)
    pixels = table[chart.pixels[..., 1]]
    for node in chart.graph.nodes:
        x0, y0, x1, y1 = (round(v) for v in node.box)
        pixels[max(0, y0) : y1, max(0, x0) : x1] = chart.pixels[max(0, y0) : y1, max(0, x0) : x1]
    return chart._replace(pixels=pixels, background=background)


def framed(chart: DrawnChart, node: str) -> DrawnChart:
    """With the OCR task's red rectangle around one node."""
    x0, y0, x1, y1 = next(n.box for n in chart.graph.nodes if n.id == node)
    high, wide = chart.pixels.shape[:2]
    left, top = max(0, int(x0 - 2)), max(0, int(y0 - 2))
    right, bottom = min(wide - 1, int(x1 + 2)), min(high - 1, int(y1 + 2))
    pixels = chart.pixels.copy()
    inside = np.zeros((high, wide), bool)
    inside[top : bottom + 1, left : right + 1] = True
    inside[top + 3 : bottom - 2, left + 3 : right - 2] = False
    pixels[inside] = RED
    return chart._replace(pixels=pixels, boxed=node)


def varied(
    chart: DrawnChart, letters: dict[str, list[Pixels]], rng: random.Random, *, framed_share: float = 0.5
) -> DrawnChart:
    """A chart that could have been drawn: mirrored, other letters, another background, one node framed or not."""
    grey = chart.background in ("FFFFFF", "C0C0C0")
    if grey and rng.random() < 0.5:
        chart = recoloured(chart, rng.choice(("FFFFFF", "C0C0C0", f"{rng.randrange(1 << 24):06X}")))
    flips = [axis for axis in (0, 1) if rng.random() < 0.5]
    for axis in flips:
        chart = mirrored(chart, axis)
    if flips or rng.random() < 0.5:
        chart = relabelled(chart, letters, rng)
    return framed(chart, rng.choice(chart.graph.nodes).id) if rng.random() < framed_share else chart


def cells_of(chart: DrawnChart, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that the picture covers."""
    return -(-chart.pixels.shape[0] // patch), -(-chart.pixels.shape[1] // patch)


def along(edge: Edge, step: float) -> np.ndarray:
    """Points (P, 2) on an arrow's line at most `step` apart."""
    points = np.array(edge.path)
    parts: list[Any] = [points[:1]]
    for a, b in pairwise(points):
        count = max(1, int(np.ceil(np.linalg.norm(b - a) / step)))
        parts.append(a + (b - a) * (np.arange(1, count + 1) / count)[:, None])
    return np.concatenate(parts)
