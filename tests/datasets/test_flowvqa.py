"""FlowVQA's files as records, and its offline scores."""

import json

import pytest

from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowvqa import load_flowvqa, repair_mermaid, score_flowvqa, task_of

CHART = {
    "key": "code_1", "title": "Sort", "mermaid": "```mermaid\nflowchart TD\nA(`start`) --> B(end)\n```",
    "qa": {"1": {"Q": "What comes first?", "A1": "The start box", "A2": "start", "A3": "Start.",
                 "type": "Fact Retrieval"},
           "2": {"Q": "How many edges?", "A1": "1", "type": "topological_3"}},
}  # fmt: skip


@pytest.mark.parametrize("as_list", [True, False])
def test_charts_become_questions(tmp_path, as_list):
    (tmp_path / "test.json").write_text(json.dumps([CHART] if as_list else {"code_1": CHART}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "code_1.jpg").touch()
    first, second = load_flowvqa(tmp_path)
    assert (first.task, second.task) == ("fact_retrieval", "topological")
    assert first.image == "images/code_1.jpg" and first.meta["answers"] == ["The start box", "start", "Start."]
    assert len(first.meta["graph"]["edges"]) == 1


def test_any_reference_counts(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps({"code_1": CHART}))
    question = load_flowvqa(tmp_path)[0]
    assert score_flowvqa(question, "Start").parts == {"exact": 1.0, "contains": 1.0}
    assert score_flowvqa(question, "the end box").score == pytest.approx(2 / 3)
    assert not score_flowvqa(question, " ").parsed


def test_stray_backticks_are_removed():
    assert parse_mermaid(repair_mermaid(CHART["mermaid"])).graph.link_set() == {("start", "end")}


def test_other_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.json is missing"):
        load_flowvqa(tmp_path)
    (tmp_path / "test.json").write_text('{"a": {}}')
    with pytest.raises(ValueError, match="keys key and qa"):
        load_flowvqa(tmp_path)
    for wrong in ('[{"qa": {}}]', '{"a": {"qa": []}}', '{"a": {"qa": {"1": {"A1": "x"}}}}', "3"):
        (tmp_path / "test.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"test\.json: every chart needs"):
            load_flowvqa(tmp_path)
    (tmp_path / "test.json").write_text("{")
    with pytest.raises(ValueError, match=r"test\.json is not valid JSON"):
        load_flowvqa(tmp_path)
    with pytest.raises(ValueError, match="unknown FlowVQA question type"):
        task_of("riddle")
