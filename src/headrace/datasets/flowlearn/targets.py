"""What each patch of a drawn chart should know: boxes, letters, neighbours, and where the arrows in it lead.

Training targets only; nothing of this is read when a model answers.
"""
# Shape letters in this file: N patches, K boxes (padded), 26 letters.

from typing import NamedTuple

import numpy as np

from headrace.datasets.flowlearn.drawn import LETTERS, DrawnChart, along
from headrace.datasets.flowlearn.records import DIRECTIONS, Graph

MOST_NODES, MOST_EDGES = 10, 15
COURSES = ("TB", "BT", "LR", "RL")  # TD looks like TB
CONCEPTS = 3 * len(LETTERS) + 2 + (MOST_NODES + 1) + (MOST_EDGES + 1) + len(COURSES)


class NodeFacts(NamedTuple):
    """About each box, padded to `MOST_NODES`.

    Attributes:
        letter: int64 (K,), index of the label in A..Z; -100 for padding.
        out, into: float32 (K, 26), labels that arrows lead to from here, and from which they come.
        red: float32 (K,), 1 where the box is framed.
        counts: int64 (2,), boxes and arrows of the chart.
        course: int64 (), index into `COURSES`.
    """

    letter: np.ndarray
    out: np.ndarray
    into: np.ndarray
    red: np.ndarray
    counts: np.ndarray
    course: np.ndarray


class PatchTargets(NamedTuple):
    """Where boxes and arrows lie on the patches.

    Attributes:
        node: int64 (K,), patch of each box's middle; -1 for padding.
        leads, comes: uint8 (N, K), 1 where a line in this patch ends or begins at box K.
    """

    node: np.ndarray
    leads: np.ndarray
    comes: np.ndarray


def course_of(graph: Graph) -> int:
    """Index into `COURSES` of a chart's direction."""
    assert graph.direction in DIRECTIONS
    return COURSES.index("TB" if graph.direction == "TD" else graph.direction)


def node_facts(graph: Graph, boxed: str | None) -> NodeFacts:
    """Facts of a chart with one-letter labels.

    Raises:
        ValueError: More boxes or arrows than the targets hold, or a label that is no capital letter.
    """
    if len(graph.nodes) > MOST_NODES or len(graph.edges) > MOST_EDGES:
        raise ValueError(f"targets hold {MOST_NODES} boxes and {MOST_EDGES} arrows, this chart has more")
    number = {}
    for k, node in enumerate(graph.nodes):
        if len(node.label) != 1 or node.label not in LETTERS:
            raise ValueError(f"targets are for charts of the `char` variant, this one has the label {node.label!r}")
        number[node.id] = k
    letter = np.full(MOST_NODES, -100, np.int64)
    letter[: len(number)] = [LETTERS.index(node.label) for node in graph.nodes]
    out, into = np.zeros((2, MOST_NODES, len(LETTERS)), np.float32)
    for edge in graph.edges:
        a, b = number[edge.source], number[edge.target]
        out[a, letter[b]] = into[b, letter[a]] = 1
    red = np.zeros(MOST_NODES, np.float32)
    if boxed is not None:
        red[number[boxed]] = 1
    counts = np.array([len(graph.nodes), len(graph.edges)], np.int64)
    return NodeFacts(letter, out, into, red, counts, np.array(course_of(graph)))


def patch_targets(
    chart: DrawnChart, *, patch: int, rows: int, columns: int, left: int = 0, top: int = 0
) -> PatchTargets:
    """Targets of a chart that lies at (left, top) [px] on a canvas of rows x columns patches."""
    number = {node.id: k for k, node in enumerate(chart.graph.nodes)}
    node = np.full(MOST_NODES, -1, np.int64)
    leads, comes = np.zeros((2, rows * columns, MOST_NODES), np.uint8)

    def cell(points: np.ndarray) -> np.ndarray:
        x, y = ((points + (left, top)) // patch).astype(np.int64).T
        return np.clip(y, 0, rows - 1) * columns + np.clip(x, 0, columns - 1)

    for k, one in enumerate(chart.graph.nodes):
        x0, y0, x1, y1 = one.box
        node[k] = cell(np.array([[(x0 + x1) / 2, (y0 + y1) / 2]]))[0]
    for edge in chart.graph.edges:
        a, b = number[edge.source], number[edge.target]
        crossed = cell(along(edge, patch / 4))
        leads[crossed, b] = comes[crossed, a] = 1
        leads[node[a], b] = comes[node[b], a] = 1
    return PatchTargets(node, leads, comes)
