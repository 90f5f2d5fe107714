"""Drawn charts and changes to them: the annotation stays true to the picture."""

import random

import numpy as np
import pytest

from headrace.datasets.flowlearn.drawn import (
    along,
    framed,
    letter_pictures,
    mirrored,
    read_drawn,
    recoloured,
    relabelled,
    varied,
)
from headrace.datasets.flowlearn.targets import COURSES, node_facts, patch_targets
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    write_dataset(GenerateConfig(count=24, seed=3, renderer="pillow", variant="char"), folder)
    return read_drawn(folder, longest=512)


@pytest.fixture(scope="module")
def letters(charts):
    return letter_pictures(charts)


def ink_share(chart):
    """Share of points on the arrows' lines, away from the boxes' borders, that are dark."""
    dark = []
    for edge in chart.graph.edges:
        for x, y in along(edge, 2.0)[2:-2]:
            patch = chart.pixels[max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2]
            dark.append(patch.min() < 110 or any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes(chart)))
    return np.mean(dark)


def boxes(chart):
    return [node.box for node in chart.graph.nodes]


def test_lines_lie_on_ink_after_every_change(charts, letters):
    light = [c for c in charts if c.background in ("FFFFFF", "C0C0C0")]
    assert len(light) >= 8
    for chart in light[:8]:
        assert ink_share(chart) > 0.95
        assert ink_share(mirrored(chart, 0)) > 0.95 and ink_share(mirrored(chart, 1)) > 0.95
        assert ink_share(relabelled(chart, letters, random.Random(0))) > 0.95
        assert ink_share(recoloured(chart, "E0F0C0")) > 0.95


def test_two_mirrors_give_the_chart_back(charts):
    for axis in (0, 1):
        twice = mirrored(mirrored(charts[0], axis), axis)
        assert np.array_equal(twice.pixels, charts[0].pixels)
        assert np.allclose(boxes(twice), boxes(charts[0]))
    left_right = next(c for c in charts if c.graph.direction == "LR")
    assert mirrored(left_right, 0).graph.direction == "RL" and mirrored(left_right, 1).graph.direction == "LR"


def test_relabelling_changes_letters_and_nothing_outside_the_boxes(charts, letters):
    chart = charts[0]
    other = relabelled(chart, letters, random.Random(1))
    assert len(other.graph.label_set()) == len(chart.graph.nodes)
    assert [n.label for n in other.graph.nodes] != [n.label for n in chart.graph.nodes]
    outside = np.ones(chart.pixels.shape[:2], bool)
    for x0, y0, x1, y1 in boxes(chart):
        outside[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = False
    assert np.array_equal(other.pixels[outside], chart.pixels[outside])


def test_recolouring_keeps_boxes_and_sets_the_corner(charts):
    chart = next(c for c in charts if c.background == "C0C0C0")
    other = recoloured(chart, "30D040")
    assert other.pixels[0, 0].tolist() == [0x30, 0xD0, 0x40]
    x0, y0, x1, y1 = (round(v) for v in chart.graph.nodes[0].box)
    assert np.array_equal(other.pixels[y0:y1, x0:x1], chart.pixels[y0:y1, x0:x1])
    with pytest.raises(ValueError, match="light grey"):
        recoloured(other, "FFFFFF")


def test_frame_is_red_around_one_box_only(charts):
    chart = framed(charts[1], charts[1].graph.nodes[0].id)
    red = (chart.pixels == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    x0, y0, x1, y1 = chart.graph.nodes[0].box
    assert abs(columns.min() - x0) <= 3 and abs(columns.max() - x1) <= 3
    assert abs(rows.min() - y0) <= 3 and abs(rows.max() - y1) <= 3


def test_facts_hold_the_graph(charts, letters):
    rng = random.Random(5)
    for chart in (varied(rng.choice(charts), letters, rng) for _ in range(20)):
        facts = node_facts(chart.graph, chart.boxed)
        label = {k: chr(65 + v) for k, v in enumerate(facts.letter) if v >= 0}
        links = {(label[a].lower(), chr(97 + b)) for a, b in zip(*np.nonzero(facts.out), strict=True)}
        back = {(chr(97 + b), label[a].lower()) for a, b in zip(*np.nonzero(facts.into), strict=True)}
        assert links == back == chart.graph.link_set()
        assert facts.counts.tolist() == [len(chart.graph.nodes), len(chart.graph.edges)]
        assert facts.red.sum() == (chart.boxed is not None)
        assert COURSES[facts.course] == chart.graph.direction.replace("TD", "TB")


def test_patch_targets_follow_a_line_from_box_to_box(charts):
    chart = charts[2]
    found = patch_targets(chart, patch=16, rows=40, columns=40, left=7, top=9)
    for edge in chart.graph.edges:
        a, b = (next(k for k, n in enumerate(chart.graph.nodes) if n.id == end) for end in edge[:2])
        assert found.leads[found.node[a], b] == 1 and found.comes[found.node[b], a] == 1
        for x, y in edge.path:
            cell = int(y + 9) // 16 * 40 + int(x + 7) // 16
            assert found.leads[cell, b] == 1 and found.comes[cell, a] == 1
    assert found.leads.sum() < found.leads.size / 10


def test_charts_without_lines_are_refused(tmp_path):
    write_dataset(GenerateConfig(count=1, renderer="pillow", variant="char"), tmp_path)
    file = next((tmp_path / "charts").glob("*.json"))
    file.write_text(file.read_text().replace('"path"', '"other"'))
    with pytest.raises(ValueError, match="no lines of arrows"):
        read_drawn(tmp_path, longest=512)
