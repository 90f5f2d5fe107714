"""A drawn chart: its picture, its graph with boxes in pixels, and the colours of FlowLearn's charts."""

from typing import NamedTuple

from PIL import Image, ImageDraw

from headrace.datasets.flowlearn.records import Graph, Node

FILL, BORDER, INK = (236, 236, 255), (147, 112, 219), (51, 51, 51)
RED = (255, 0, 0)


class Picture(NamedTuple):
    """A drawn chart.

    Attributes:
        image: RGB at natural size.
        graph: The chart's graph with the nodes' boxes filled in [px].
        renderer: Name and version of what drew it; never mix renderers in one table silently.
    """

    image: Image.Image
    graph: Graph
    renderer: str


def with_boxes(
    graph: Graph,
    boxes: dict[str, tuple[float, ...]],
    paths: dict[str, tuple[tuple[float, float], ...]] | None = None,
) -> Graph:
    """The graph with `boxes[id]` in its nodes, and `paths["SOURCE TARGET"]` in its arrows where they are known."""
    return Graph(
        nodes=tuple(Node(n.id, n.label, tuple(round(x, 2) for x in boxes[n.id])) for n in graph.nodes),
        edges=tuple(e._replace(path=(paths or {}).get(f"{e.source} {e.target}", ())) for e in graph.edges),
        direction=graph.direction,
    )


def colour(background: str) -> tuple[int, int, int]:
    """Six hexadecimal digits as RGB."""
    return int(background[:2], 16), int(background[2:4], 16), int(background[4:6], 16)


def draw_red_box(picture: Picture, node: str, *, width: int = 3) -> Image.Image:
    """A copy with a red rectangle around one node: the picture of the OCR task."""
    x0, y0, x1, y1 = next(n.box for n in picture.graph.nodes if n.id == node)
    copy = picture.image.copy()
    corners = [max(0, x0 - 2), max(0, y0 - 2), min(copy.width - 1, x1 + 2), min(copy.height - 1, y1 + 2)]
    ImageDraw.Draw(copy).rectangle(corners, outline=RED, width=width)
    return copy
