"""Pictures for reports: thumbnails, kept-token overlays, and predicted against reference graphs."""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowlearn.records import Graph

THUMBNAIL = 420  # [px], the longer side
WHOLE = (0.0, 0.0, 1.0, 1.0)
WASHED = 200  # of 255, how white a dropped token is
RIGHT, MISSING, EXTRA = "#2e8b40", "#c23b3b", "#d98a1f"


def data_uri(image: Image.Image, *, quality: int = 80) -> str:
    """A picture as text that an HTML page can hold."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(path: Path, *, longest: int = THUMBNAIL) -> str:
    """`<img>` of a picture file; a note when it cannot be opened."""
    try:
        with Image.open(path) as image:
            image.thumbnail((longest, longest))
            return f'<img src="{data_uri(image)}" alt="{escape(path.name)}">'
    except OSError as error:
        return f'<p class="note">{escape(path.name)}: {escape(str(error))}</p>'


def grid_of(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of `count` tokens on a picture: square if it can be, else closest to the picture's shape."""
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    wanted = size[0] / size[1]
    pairs = [(count // rows, rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] / wanted)))


class Kept(NamedTuple):
    """Visual tokens of a picture that stayed.

    Attributes:
        tokens: Their numbers in raster order, `of` how many.
        region: Where on the token grid the picture lies: left, top, right, bottom as shares of the grid. Below 0 and
            above 1 lies what was cropped off.
        grid: Columns and rows of the token grid, None where they are not known.
    """

    tokens: list[int]
    of: int
    region: tuple[float, ...] = WHOLE
    grid: tuple[int, int] | None = None


def kept_overlay(path: Path, kept: Kept, *, longest: int = THUMBNAIL) -> str:
    """`<img>` in which the tokens that were dropped, and what no token saw, are washed out."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((longest, longest))
    columns, rows = kept.grid or grid_of(kept.of, image.size)
    mask = Image.new("L", (columns, rows), WASHED)
    for index in kept.tokens:
        mask.putpixel((index % columns, index // columns), 0)
    left, top, right, bottom = kept.region
    across, down = (right - left) * columns / image.width, (bottom - top) * rows / image.height
    placed = mask.transform(
        image.size, Image.Transform.AFFINE, (across, 0, left * columns, 0, down, top * rows), fillcolor=WASHED
    )
    washed = Image.composite(Image.new("RGB", image.size, "white"), image, placed)
    return f'<img src="{data_uri(washed)}" alt="{len(kept.tokens)} of {kept.of} tokens kept">'


def _places(graph: Graph, labels: list[str]) -> dict[str, tuple[float, float]]:
    """Centre of each label: where the chart was drawn, if known, else on a circle. In a 440 x 220 field."""
    boxes = {n.label.strip().lower(): n.box for n in graph.nodes if n.box}
    if boxes:
        width, height = max(b[2] for b in boxes.values()), max(b[3] for b in boxes.values())
        across, down = 200 / width, 90 / height
        known = {k: ((b[0] + b[2]) * across + 10, (b[1] + b[3]) * down + 14) for k, b in boxes.items()}
    else:
        known = {}
    rest = [label for label in labels if label not in known]
    for index, label in enumerate(rest):
        angle = 2 * math.pi * index / max(1, len(rest)) - math.pi / 2
        radius = (190, 88) if not known else (205, 104)
        known[label] = 220 + radius[0] * math.cos(angle), 110 + radius[1] * math.sin(angle)
    return known


def graph_difference(answer: str, reference: str, drawn: Graph | None = None) -> str:
    """SVG of both graphs: green what agrees, red what the answer lacks, orange what it adds."""
    got, want = parse_mermaid(answer).graph, parse_mermaid(reference).graph
    labels = sorted(want.label_set() | got.label_set())
    ends = {end for pair in got.link_set() | want.link_set() for end in pair} - set(labels)
    place = _places(drawn or want, [*labels, *sorted(ends)])
    parts = ['<svg class="graph" viewBox="0 0 440 224">']
    for name, colour in (("right", RIGHT), ("missing", MISSING), ("extra", EXTRA)):
        parts.append(f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                     f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>')  # fmt: skip
    for pair in sorted(want.link_set() | got.link_set()):
        kind = (
            "right" if pair in got.link_set() & want.link_set() else "missing" if pair in want.link_set() else "extra"
        )
        colour = {"right": RIGHT, "missing": MISSING, "extra": EXTRA}[kind]
        (x0, y0), (x1, y1) = place[pair[0]], place[pair[1]]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        dx, dy = (x1 - x0) / length * 14, (y1 - y0) / length * 14
        side = (-dy * 0.25, dx * 0.25)
        parts.append(f'<line x1="{x0 + dx + side[0]:.1f}" y1="{y0 + dy + side[1]:.1f}" x2="{x1 - dx + side[0]:.1f}" '
                     f'y2="{y1 - dy + side[1]:.1f}" stroke="{colour}" stroke-width="1.5" '
                     f'marker-end="url(#{kind})"/>')  # fmt: skip
    for label in labels:
        both, wanted = label in want.label_set() and label in got.label_set(), label in want.label_set()
        colour = RIGHT if both else MISSING if wanted else EXTRA
        x, y = place[label]
        parts.append(f'<text x="{x:.1f}" y="{y + 3:.1f}" text-anchor="middle" class="n" fill="{colour}">'
                     f"{escape(label[:22])}</text>")  # fmt: skip
    return "".join([*parts, "</svg>"])
