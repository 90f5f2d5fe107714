"""Pictures agree with their annotation, whichever program drew them."""

import shutil

import pytest

from headrace.datasets.flowlearn import render_mermaid
from headrace.datasets.flowlearn.generate import make_chart
from headrace.datasets.flowlearn.render import FILL, colour, draw_red_box, open_renderer
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
