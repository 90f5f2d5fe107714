"""The report is one file that needs nothing else, and shows what was measured."""

import base64
import io
import json
import math
import re
import shutil

import pytest
from PIL import Image

from headrace.datasets.flowlearn.browser import Browser, find_browser
from headrace.datasets.flowlearn.mermaid import format_mermaid
from headrace.datasets.flowlearn.prompts import find_prompts
from headrace.datasets.flowlearn.records import Edge, Graph, Node
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.vqa_charts import Series, line_chart
from headrace.vlm.vqa_data import load_task
from headrace.vlm.vqa_gallery import EXTRA, MISSING, RIGHT, Kept, graph_difference, grid_of, kept_overlay
from headrace.vlm.vqa_report import kept_share, read_run, write_report
from headrace.vlm.vqa_run import run, run_identity

PROMPTS = find_prompts("headrace-1")


class Noisy:
    """Gives the reference, or nonsense on every `every`-th question."""

    def __init__(self, tasks, every):
        self.rows, self.every, self.count = tasks.questions, every, 0

    def answer(self, images, questions, *, max_new_tokens):
        answers = []
        for text in questions:
            self.count += 1
            found = next(q for q in self.rows if str(images).endswith(q.image) and PROMPTS.ask(q) == text)
            answers.append("<b>?</b>" if self.count % self.every == 0 else found.answer)
        return answers


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    data, out = tmp_path_factory.mktemp("charts"), tmp_path_factory.mktemp("runs")
    write_dataset(GenerateConfig(count=5, seed=9, renderer="pillow"), data)
    tasks = load_task("flowlearn/sim-word", data)
    folders = []
    for every, tokens in ((7, None), (4, 64), (3, 32)):
        pruning = tokens and {"pruning": "FlowCutConfig", "budget": {"tokens": tokens, "share": None}}
        folder = out / f"keep-{tokens}"
        identity = run_identity(tasks, PROMPTS, model="fake", pruning=pruning, data=data, split="test")
        model = Noisy(tasks, every)
        run(tasks, lambda m=model: m, data=data, out=folder, identity=identity, prompts=PROMPTS)
        if tokens:
            row = {"image": tasks.questions[0].image, "kept": list(range(tokens)), "of": 576}
            (folder / "pictures.jsonl").write_text(json.dumps(row) + "\n")
        folders.append(folder)
    return write_report(folders, out / "report.html", data=data), folders


def test_page_is_self_contained_and_escaped(page):
    text = page[0].read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    assert "&lt;b&gt;?&lt;/b&gt;" in text and "<b>?</b>" not in text
    for wanted in ("Pruning sweep", "By number of nodes", "True and false", "Graphs:", "Kept tokens:", "prompt_hash"):
        assert wanted in text


def test_tables_beside_the_page_hold_the_measured_scores(page):
    path, folders = page
    rows = path.with_suffix(".csv").read_text().splitlines()
    results = json.loads((folders[0] / "results.json").read_text())
    assert len(rows) == 1 + 3 * len(results["tasks"])
    assert f",num_nodes,{results['tasks']['num_nodes']['score']}," in rows[1]
    assert path.with_suffix(".md").read_text().count("\n") == len(rows) + 1


@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
def test_page_opens_in_a_browser(page):
    with Browser() as browser:
        browser.open(page[0].resolve().as_uri())
        assert browser.evaluate("document.querySelectorAll('h2').length") >= 8
        assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.evaluate("document.querySelectorAll('svg polyline').length") > 20


def test_graph_difference_colours_each_link_once():
    nodes = tuple(Node(k, k) for k in "abc")
    want = Graph(nodes=nodes, edges=(Edge("a", "b"), Edge("b", "c")))
    got = Graph(nodes=nodes, edges=(Edge("a", "b"), Edge("c", "b")))
    drawn = graph_difference(format_mermaid(got), format_mermaid(want))
    for colour in (RIGHT, MISSING, EXTRA):
        assert len(re.findall(rf'<line [^>]*stroke="{colour}"', drawn)) == 1


def test_overlay_washes_out_what_was_dropped(tmp_path):
    path = tmp_path / "black.png"
    Image.new("RGB", (80, 80)).save(path)
    assert "2 of 16 tokens" in kept_overlay(path, Kept([0, 5], 16))
    for region, dark in (((0.0, 0.0, 1.0, 1.0), (10, 10)), ((0.5, 0.5, 1.0, 1.0), (50, 50))):
        page = kept_overlay(path, Kept([0, 10], 16, region))  # tokens at row 0 column 0, and row 2 column 2
        shown = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0]))).convert("L")
        assert shown.getpixel((10, 10)) < 40, "the picture's corner shows a kept token in both regions"
        assert (shown.getpixel((50, 50)) < 40) == (dark == (10, 10)), "a quarter of the grid shows other tokens"
    assert grid_of(576, (900, 300)) == (24, 24) and grid_of(12, (400, 300)) == (4, 3)


def brightness(page, place):
    shown = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0]))).convert("L")
    return shown.getpixel(place)


def test_overlay_follows_the_grid_and_the_crop_that_the_model_saw(tmp_path):
    path = tmp_path / "black.png"
    Image.new("RGB", (90, 40)).save(path)
    page = kept_overlay(path, Kept([8], 36, grid=(9, 4)))  # the upper right corner, which 6 x 6 has elsewhere
    assert brightness(page, (85, 4)) < 40 and brightness(page, (45, 4)) > 150 and brightness(page, (85, 34)) > 150
    seen = Kept([0, 1, 2, 3], 4, region=(-0.625, 0.0, 1.625, 1.0), grid=(2, 2))  # the middle, 40 of 90 px
    page = kept_overlay(path, seen)
    assert brightness(page, (45, 20)) < 40
    assert brightness(page, (10, 20)) > 150 and brightness(page, (80, 20)) > 150, "what was cropped off is washed out"


def test_sweep_keeps_methods_apart_and_counts_what_reaches_the_answer(page, tmp_path):
    folders, methods = [], ("flowcut", "flowcut-decoder", "fastv", "fastv")
    for name, method, after in zip("abcd", methods, (64, 64, 64, None), strict=True):
        shutil.copytree(page[1][1], tmp_path / name)
        for file in ("run.json", "results.json"):
            written = json.loads((tmp_path / name / file).read_text())
            run = written["run"] if file == "results.json" else written
            run["pruning"] = {"pruning": "FlowCutConfig", "method": method, "budget": {"tokens": 64, "share": None}}
            (tmp_path / name / file).write_text(json.dumps(written))
        note = {"image": "x.jpeg", "before": 576, "after": after}
        (tmp_path / name / "pictures.jsonl").write_text(json.dumps(note) + "\n" if after else "")
        folders.append(tmp_path / name)
    runs = [read_run(folder) for folder in folders]
    assert [kept_share(run) for run in runs[:3]] == [64 / 576] * 3 and math.isnan(kept_share(runs[3]))
    assert kept_share(read_run(page[1][0])) == 1.0
    sweep = write_report(folders, tmp_path / "r.html").read_text().split("Pruning sweep")[1].split("<h2>")[0]
    assert all(f">{name}</text>" in sweep for name in ("flowcut", "flowcut-decoder", "fastv"))
    assert sweep.count(">11</text>") == sweep.count("<svg") and "nan" not in sweep


def test_a_chart_without_points_is_empty():
    assert line_chart("x", [Series("a", [])], x_label="", y_label="") == ""


def test_notes_that_a_crash_tore_are_left_out(page, tmp_path):
    shutil.copytree(page[1][1], tmp_path / "run")
    notes = [json.dumps({"image": f"{i}.jpeg", "before": 9, "after": 3}) for i in range(3)]
    (tmp_path / "run" / "pictures.jsonl").write_text(
        f"{notes[0]}\n{notes[1][:20]}{notes[1]}\n{notes[2]}\n{notes[0][:9]}"
    )
    assert list(read_run(tmp_path / "run").tokens) == ["0.jpeg", "2.jpeg"]


def test_a_page_is_not_overwritten_by_its_tables(page, tmp_path):
    with pytest.raises(ValueError, match=r"name it \.html"):
        write_report(page[1], tmp_path / "r.csv")


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        write_report([tmp_path], tmp_path / "r.html")
