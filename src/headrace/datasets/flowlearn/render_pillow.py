"""Draw with Pillow alone: a small layered layout, for tests and machines with neither browser nor Graphviz."""

import math

from PIL import Image, ImageDraw, ImageFont

from headrace.datasets.flowlearn.chart_picture import BORDER, FILL, INK, Picture, colour, with_boxes
from headrace.datasets.flowlearn.generate import Chart
from headrace.datasets.flowlearn.records import Graph, Style

_HEIGHT, _PAD, _ACROSS, _ALONG, _MARGIN = 34, 8, 40, 50, 8  # [px], Mermaid's spacing
_WIDTH: dict[Style, int] = {"plain": 2, "thick": 4, "dotted": 2}


def layers_of(graph: Graph) -> list[list[str]]:
    """Nodes by longest path from a source, arrows against the written order left out so that no cycle remains."""
    order = {node.id: i for i, node in enumerate(graph.nodes)}
    rank = dict.fromkeys(order, 0)
    forward = [(e.source, e.target) for e in graph.edges if order[e.source] < order[e.target]]
    for node in order:
        for a, b in forward:
            if a == node:
                rank[b] = max(rank[b], rank[a] + 1)
    rows: list[list[str]] = [[] for _ in range(max(rank.values()) + 1)]
    for node in order:
        rows[rank[node]].append(node)
    return [row for row in rows if row]


class PillowRenderer:
    """Layered layout, straight arrows."""

    name = "pillow-1"

    def __init__(self) -> None:
        self.font = ImageFont.load_default(size=14)

    def draw(self, chart: Chart) -> Picture:
        """Draw one chart."""
        boxes, size = self._layout(chart.graph)
        image = Image.new("RGB", size, colour(chart.background))
        brush = ImageDraw.Draw(image)
        paths = {
            f"{edge.source} {edge.target}": _arrow(
                brush, boxes[edge.source], boxes[edge.target], edge.style, bend=12 * (1 + index % 3)
            )
            for index, edge in enumerate(chart.graph.edges)
        }
        for node in chart.graph.nodes:
            x0, y0, x1, y1 = boxes[node.id]
            brush.rounded_rectangle((x0, y0, x1, y1), radius=4, fill=FILL, outline=BORDER)
            brush.text(((x0 + x1) / 2, (y0 + y1) / 2), node.label, fill=INK, font=self.font, anchor="mm")
        return Picture(image, with_boxes(chart.graph, boxes, paths), self.name)

    def _layout(self, graph: Graph) -> tuple[dict[str, tuple[float, ...]], tuple[int, int]]:
        width = {n.id: max(24, math.ceil(self.font.getlength(n.label))) + 2 * _PAD for n in graph.nodes}
        rows = layers_of(graph)
        sideways = graph.direction in ("LR", "RL")
        boxes: dict[str, tuple[float, ...]] = {}
        along = float(_MARGIN)
        for row in rows:
            depth = max(width[key] for key in row) if sideways else _HEIGHT
            across = float(_MARGIN)
            for key in row:
                w, h = width[key], _HEIGHT
                boxes[key] = (
                    (along, across, along + w, across + h) if sideways else (across, along, across + w, along + h)
                )
                across += (h if sideways else w) + _ACROSS
            along += depth + _ALONG
        x = max(box[2] for box in boxes.values()) + _MARGIN
        y = max(box[3] for box in boxes.values()) + _MARGIN
        if graph.direction == "RL":
            boxes = {key: (x - b[2], b[1], x - b[0], b[3]) for key, b in boxes.items()}
        if graph.direction == "BT":
            boxes = {key: (b[0], y - b[3], b[2], y - b[1]) for key, b in boxes.items()}
        return boxes, (math.ceil(x), math.ceil(y))

    def close(self) -> None:
        """Nothing is kept open."""


def _border_point(box: tuple[float, ...], towards: tuple[float, float]) -> tuple[float, float]:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    dx, dy = towards[0] - x, towards[1] - y
    scale = min(
        (box[2] - x) / abs(dx) if dx else math.inf,
        (box[3] - y) / abs(dy) if dy else math.inf,
    )
    return x + dx * min(scale, 1.0), y + dy * min(scale, 1.0)


def _arrow(
    brush: ImageDraw.ImageDraw, a: tuple[float, ...], b: tuple[float, ...], style: Style, *, bend: float
) -> tuple[tuple[float, float], ...]:
    """A bent line from box to box with a head at the second; the bend keeps the two arrows of a 2-cycle apart.

    Returns the line's points.
    """
    centre_a, centre_b = ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
    length = math.hypot(centre_b[0] - centre_a[0], centre_b[1] - centre_a[1]) or 1.0
    side = (centre_b[1] - centre_a[1]) / length, -(centre_b[0] - centre_a[0]) / length
    middle = ((centre_a[0] + centre_b[0]) / 2 + bend * side[0], (centre_a[1] + centre_b[1]) / 2 + bend * side[1])
    start, tip = _border_point(a, middle), _border_point(b, middle)
    count = 24
    steps = [i / count for i in range(count + 1)]
    across, down = (
        [(1 - t) ** 2 * start[k] + 2 * t * (1 - t) * middle[k] + t * t * tip[k] for t in steps] for k in (0, 1)
    )
    path = list(zip(across, down, strict=True))
    for index in range(count):
        if style != "dotted" or index % 2 == 0:
            brush.line((*path[index], *path[index + 1]), fill=INK, width=_WIDTH[style])
    angle = math.atan2(tip[1] - path[-4][1], tip[0] - path[-4][0])
    wings = [(tip[0] - 10 * math.cos(angle + s), tip[1] - 10 * math.sin(angle + s)) for s in (-0.45, 0.45)]
    brush.polygon([tip, *wings], fill=INK)
    return tuple(path)
