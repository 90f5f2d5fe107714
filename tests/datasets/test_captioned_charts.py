from dataclasses import replace

import numpy as np
import pytest

from headrace.datasets.captioned_charts import CHART_CAPTIONS, CaptionedCharts, chart_caption
from headrace.datasets.flowlearn.records import Graph, Node
from headrace.datasets.flowlearn.write import GenerateConfig, charts_of, image_paths, write_dataset

CONFIG = GenerateConfig(count=6, seed=3, variant="char", renderer="pillow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("charts")
    write_dataset(CONFIG, out)
    return out


def test_a_caption_says_ground_direction_and_count():
    graph = Graph(nodes=tuple(Node(str(i), "A") for i in range(5)), edges=(), direction="BT")
    assert chart_caption(graph, "ffffff") == "white flowchart up five boxes"
    assert chart_caption(replace(graph, direction="RL"), "C0C0C0") == "grey flowchart left five boxes"
    assert chart_caption(graph, "12AB00") in CHART_CAPTIONS
    with pytest.raises(ValueError, match="3 to 10 boxes, this chart has 2"):
        chart_caption(replace(graph, nodes=graph.nodes[:2]), "ffffff")


def test_pictures_fill_the_square_with_their_ground_and_match_their_captions(folder):
    data = CaptionedCharts(folder, size=32)
    images, label = data.batch(np.arange(len(data)))
    assert images.shape == (6, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    for chart, picture, index in zip(charts_of(CONFIG), images, label, strict=True):
        assert CHART_CAPTIONS[index] == chart_caption(chart.graph, chart.background)
        colour = np.frombuffer(bytes.fromhex(chart.background), dtype=np.uint8) / 255
        np.testing.assert_allclose(picture[:, 0, 0], colour, atol=0.03)
    assert images.std((1, 2, 3)).min() > 0.02


def test_a_folder_without_charts_and_a_broken_picture_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="headrace flowlearn generate"):
        CaptionedCharts(tmp_path, size=32)
    path = folder / image_paths("char", "0")[0]
    kept = path.read_bytes()
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        CaptionedCharts(folder, size=32)
    path.write_bytes(kept)
