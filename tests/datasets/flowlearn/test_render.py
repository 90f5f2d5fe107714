"""Pictures agree with their annotation, whichever program drew them."""

import shutil
import sys
from dataclasses import replace

import pytest

from headrace.datasets.flowlearn import render_mermaid
from headrace.datasets.flowlearn.chart_picture import FILL, colour, draw_red_box
from headrace.datasets.flowlearn.generate import make_chart
from headrace.datasets.flowlearn.render import open_renderer
from headrace.datasets.flowlearn.render_mermaid import mermaid_is_here


def near(pixel, wanted, tolerance=12):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


@pytest.fixture(
    params=[
        "pillow",
        pytest.param("graphviz", marks=pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz")),
        pytest.param(
            "mermaid",
            marks=[pytest.mark.browser, pytest.mark.skipif(not mermaid_is_here(), reason="no Chromium or npm")],
        ),
    ],
    scope="module",
)
def renderer(request):
    try:
        opened = open_renderer(request.param)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.mark.parametrize("index", range(5))
def test_every_box_is_filled_inside_and_background_outside(renderer, index):
    chart = make_chart(2, index)
    picture = renderer.draw(chart)
    boxes = [node.box for node in picture.graph.nodes]
    assert len(boxes) == len(chart.graph.nodes)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= picture.image.width and 0 <= y0 < y1 <= picture.image.height
        for x, y in ((x0 + 4, (y0 + y1) / 2), (x1 - 4, (y0 + y1) / 2)):
            assert near(picture.image.getpixel((int(x), int(y))), FILL)
        ink = picture.image.crop((int(x0) + 6, int(y0) + 6, int(x1) - 6, int(y1) - 6)).convert("L").getextrema()[0]
        assert ink < 150, "a label must be drawn inside its box"
    for a in boxes:
        assert not any(a is not b and a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes)
    assert near(picture.image.getpixel((1, 1)), colour(chart.background))


def test_the_red_box_surrounds_one_node(renderer):
    picture = renderer.draw(make_chart(2, 0))
    node = picture.graph.nodes[1]
    boxed = draw_red_box(picture, node.id)
    x0, y0, x1, y1 = (round(v) for v in node.box)
    middle = (y0 + y1) // 2
    assert near(boxed.getpixel((max(0, x0 - 2), middle)), (255, 0, 0))
    pixels = [(r, g, b) for r, g, b in boxed.convert("RGB").getdata()]
    red = [p for p in pixels if near(p, (255, 0, 0), 5)]
    assert len(red) < 3.5 * 2 * ((x1 - x0 + 8) + (y1 - y0 + 8))


def test_unknown_renderer_is_named():
    with pytest.raises(ValueError, match="unknown renderer 'paint'"):
        open_renderer("paint")


def test_auto_falls_back_with_a_warning(monkeypatch):
    def broken():
        raise FileNotFoundError("npm could not install mermaid")

    monkeypatch.setattr(render_mermaid, "MermaidRenderer", broken)
    monkeypatch.setattr(render_mermaid, "mermaid_is_here", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="Mermaid cannot be used"):
        assert open_renderer("auto").name.startswith("pillow")


# Answers as `dot` does for -Tpng and -Tjson: points with y upwards, pad 0.1 inch, pictures at the asked resolution.
STAND_IN = """#!{python}
import io, json, re, sys
from PIL import Image, ImageDraw
if sys.argv[1] == "-V":
    sys.exit(sys.stderr.write("dot - graphviz version 9.9.9 (stand-in)"))
source = sys.stdin.read()
if "entity1" not in source:
    sys.exit(sys.stderr.write("Error: syntax error in line 1") and 1)
names = re.findall(r"^(\\w+) \\[label", source, re.M)
back = re.search(r'bgcolor="(#\\w+)"', source)[1]
wide, high = 100.0, 60.0 * len(names)
if sys.argv[1] == "-Tjson":
    objects = [dict(name=n, pos=f"{{50 + 3 * i}},{{high - 60 * i - 30}}", width="1.0", height="0.5")
               for i, n in enumerate(names)]
    sys.exit(sys.stdout.write(json.dumps(dict(bb=f"0,0,{{wide}},{{high}}", objects=objects))) and 0)
scale = 96 / 72
image = Image.new("RGB", (round((wide + 14.4) * scale), round((high + 14.4) * scale)), back)
brush = ImageDraw.Draw(image)
for i, _ in enumerate(names):
    x, y = 7.2 + 50 + 3 * i, 7.2 + 60 * i + 30
    corners = tuple(v * scale for v in (x - 36, y - 18, x + 36, y + 18))
    brush.rectangle(corners, fill="#ECECFF", outline="#9370DB")
    brush.text((x * scale, y * scale), "label", fill="#333333", anchor="mm")
out = io.BytesIO()
image.save(out, "PNG")
sys.stdout.buffer.write(out.getvalue())
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / "dot"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_graphviz_boxes_come_from_its_layout_where_they_are_drawn(stand_in):
    chart = make_chart(2, 3)
    picture = open_renderer("graphviz").draw(chart)
    assert picture.renderer == "graphviz-9.9.9"
    for node in picture.graph.nodes:
        x0, y0, x1, y1 = node.box
        assert (x1 - x0, y1 - y0) == pytest.approx((96, 48), abs=0.1)
        back = colour(chart.background)
        for x, y, wanted in ((x0 + 3, y0 + 3, FILL), (x1 - 3, y1 - 3, FILL), (x0 - 3, y0, back), (x1 + 3, y1, back)):
            assert near(picture.image.getpixel((int(x), int(y))), wanted)


def test_what_graphviz_says_is_passed_on(stand_in):
    chart = make_chart(2, 3)
    renderer = open_renderer("graphviz")
    one = replace(chart, graph=replace(chart.graph, nodes=chart.graph.nodes[:1], edges=()))
    with pytest.raises(RuntimeError, match=r"status 1: Error: syntax error in line 1"):
        renderer.draw(one)


def test_graphviz_without_its_program_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs the program `dot`; install graphviz or take another"):
        open_renderer("graphviz")


def test_arrows_of_a_picture_know_their_lines(renderer):
    picture = renderer.draw(make_chart(2, 1))
    if renderer.name.startswith("graphviz"):  # its lines are not read, and none are made up
        assert all(edge.path == () for edge in picture.graph.edges)
        return
    box = {node.id: node.box for node in picture.graph.nodes}

    def distance(point, b):
        return max(b[0] - point[0], point[0] - b[2], b[1] - point[1], point[1] - b[3])

    for edge in picture.graph.edges:
        assert len(edge.path) >= 2
        assert abs(distance(edge.path[0], box[edge.source])) < 8 and abs(distance(edge.path[-1], box[edge.target])) < 12
