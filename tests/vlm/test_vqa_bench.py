"""A pruning sweep on a small chart model with random weights: budgets are honoured, and the page shows them."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from headrace.datasets.flowlearn.prompts import find_prompts
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.tokenizers.base import Preprocessing
from headrace.vlm.vqa_bench import SweepConfig, sweep, sweep_table, time_prefill
from headrace.vlm.vqa_data import load_task
from headrace.vlm.vqa_model import budget_of, model_name, pruning_identity, pruning_of, region_of
from headrace.vlm.vqa_report import write_report
from headrace.vlm.vqa_samples import read_samples

SCRIPT = Path(__file__).parents[2] / "recipes" / "flowchart_vlm.py"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    data, out = tmp_path_factory.mktemp("charts"), tmp_path_factory.mktemp("sweep")
    write_dataset(GenerateConfig(count=2, seed=4, renderer="pillow", variant="char"), data)
    spec = importlib.util.spec_from_file_location("flowchart_vlm", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shape = {"width": 64, "vision_layers": 3, "text_width": 48, "text_layers": 3, "stem": (4, 8, 8, 16, 16)}
    model = script.build(script.Recipe(stage="joint", data=(data,), out=out, size=128, **shape)).eval()
    config = SweepConfig(methods=("flowcut", "random", "fastv"), keep=(8, 4), repeats=2, warmup=0)
    tasks = load_task("flowlearn/sim-char/num_nodes", data)
    folders = sweep(config, tasks, model, name="tiny", data=data, out=out, prompts=find_prompts("short-1"))
    return folders, data, model


def test_every_setting_keeps_what_it_was_told(swept):
    folders, data, model = swept
    rows = sweep_table(folders)
    assert [(r["setting"], r["tokens"], r["of"]) for r in rows] == [
        ("full", 16, 16), ("flowcut-8", 8, 16), ("flowcut-4", 4, 16), ("random-8", 8, 16), ("random-4", 4, 16),
        ("fastv-8", 8, 16), ("fastv-4", 4, 16),
    ]  # fmt: skip
    assert all(row["prefill_ms"] > 0 for row in rows) and rows[0]["times_faster"] == 1.0
    assert not any(row["errors"] for row in rows)
    assert not any(s.error for folder in folders for s in read_samples(folder))
    notes = [json.loads(line) for line in (folders[1] / "pictures.jsonl").read_text().splitlines()]
    assert all(len(n["kept"]) == 8 and n["of"] == 16 and n["kept"] == sorted(n["kept"]) for n in notes)
    assert all(n["grid"] == [4, 4] and (n["before"], n["after"]) == (16, 8) for n in notes)
    cut_later = [json.loads(line) for line in (folders[5] / "pictures.jsonl").read_text().splitlines()]
    assert len(cut_later) == 2 and all(note["after"] == 8 and "kept" not in note for note in cut_later)
    assert model.pruning is None
    with Image.open(data / notes[0]["image"]) as picture:
        assert tuple(notes[0]["region"]) == model.encoder.preprocessing.region(*picture.size)


def test_the_page_draws_the_sweep(swept, tmp_path):
    folders, data, _ = swept
    text = write_report(folders, tmp_path / "r.html", data=data).read_text()
    assert "prefill: encoder and first token" in text and "8 of 16 tokens" in text


def test_budgets_and_methods_are_checked():
    assert budget_of(64).tokens == 64 and budget_of(0.25).share == 0.25
    with pytest.raises(ValueError, match="go together"):
        pruning_of("flowcut", None)
    with pytest.raises(ValueError, match="did you mean 'flowcut'"):
        SweepConfig(methods=("flowcat",), keep=(8,))
    for keep in (1.5, float("inf")):
        with pytest.raises(ValueError, match="share must lie"):
            SweepConfig(methods=("flowcut",), keep=(keep,))


def test_a_file_holds_all_switches_of_a_method(tmp_path):
    from headrace.vlm.pruning.auto import METHODS

    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"pruning": "FlowCutConfig", "every": 4, "budget": {"tokens": 9}}))
    pruning = pruning_of(str(path), None)
    assert (pruning.every, pruning.budget.tokens) == (4, 9) and pruning_of(str(path), 0.5).budget.share == 0.5
    assert pruning_identity(pruning)["method"] == "flowcut (every=4)"
    for method in METHODS:
        path.write_text(json.dumps(pruning_identity(pruning_of(method, 5))))
        assert json.loads(path.read_text())["method"] == method
        assert pruning_of(str(path), None) == pruning_of(method, 5) and pruning_of(str(path), 6) == pruning_of(
            method, 6
        )
    path.write_text(json.dumps({"pruning": "PruMergeConfig", "budget": None, "neighbours": 3}))
    assert pruning_of(str(path), None).budget is None
    for wrong in ("[]", "{", '{"pruning": "Nothing"}', '{"pruning": "FlowCutConfig", "evry": 2}'):
        path.write_text(wrong)
        with pytest.raises(ValueError):
            pruning_of(str(path), None)
    with pytest.raises(FileNotFoundError, match="no pruning settings"):
        pruning_of("nowhere.json", None)


def test_where_a_cropped_picture_lies_on_the_grid():
    square = {"height": 336, "width": 336}

    def model(**more):
        settings = {"do_resize": True, "do_center_crop": True, "size": {"shortest_edge": 336}, "crop_size": square}
        return SimpleNamespace(processor=SimpleNamespace(image_processor=SimpleNamespace(**settings | more)))

    whole = (0.0, 0.0, 1.0, 1.0)
    assert region_of(model(), 200, 100) == (-0.5, 0.0, 1.5, 1.0) and region_of(model(), 50, 50) == whole
    for other in ({"size": square}, {"do_center_crop": False}, {"image_grid_pinpoints": [[336, 672]]}):
        assert region_of(model(**other), 200, 100) == whole
    own = Preprocessing(size=64, fit="crop")
    assert region_of(SimpleNamespace(encoder=SimpleNamespace(preprocessing=own)), 100, 300) == (0.0, -1.0, 1.0, 2.0)
    assert Preprocessing(size=64, fit="squash").region(100, 300) == whole


def test_pictures_on_which_the_model_fails_are_not_timed(swept):
    _, data, _ = swept
    tasks, prompts, seen = load_task("flowlearn/sim-char/num_nodes", data), find_prompts("short-1"), []
    model = SimpleNamespace(answer=lambda image, questions, max_new_tokens: seen.append(image))
    names = [question.image for question in tasks.questions]
    assert len(time_prefill(model, tasks, data, prompts, warmup=1, repeats=3, without=names[:1])) == 3
    assert set(seen) == {data / names[1]}
    seen.clear()
    time_prefill(model, tasks, data, prompts, warmup=0, repeats=3, limit=1)
    assert set(seen) == {data / names[0]}, "pictures beyond the limit need not be there"
    with pytest.raises(ValueError, match="failed on every picture"):
        time_prefill(model, tasks, data, prompts, warmup=0, repeats=1, without=names)


def test_another_checkpoint_in_the_same_folder_has_another_name(tmp_path):
    """Also where weights differ behind the first megabytes only, as when the encoder was frozen."""
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20) + b"one")
    first = model_name(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20) + b"two")
    second = model_name(str(tmp_path))
    assert second != first and model_name("owner/name") == "owner/name"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")  # other words around every question
    assert model_name(str(tmp_path)) != second
