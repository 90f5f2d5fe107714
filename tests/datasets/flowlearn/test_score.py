"""The scorer: invariances, known answers, and the figures that FlowLearn's authors printed."""

import json
import random
import time
from pathlib import Path

import pytest

from headrace.cli.flowlearn import score as score_command
from headrace.datasets.flowlearn.mermaid import format_mermaid
from headrace.datasets.flowlearn.predictions import read_predictions, score_predictions, task_of_file
from headrace.datasets.flowlearn.records import Edge, Graph, Node
from headrace.datasets.flowlearn.score import edit_similarity, read_count, read_truth, score_answer, summarise
from headrace.datasets.flowlearn.tasks import TASKS, find_task

RELEASED = Path(__file__).parents[4] / "shared" / "flowlearn" / "predictions"
GRAPH = Graph(
    nodes=tuple(Node(f"entity{i}", label) for i, label in enumerate(("alpha one", "beta", "gamma", "delta"))),
    edges=(
        Edge("entity0", "entity1"),
        Edge("entity0", "entity2", "thick"),
        Edge("entity1", "entity3", "dotted"),
        Edge("entity3", "entity0"),
    ),
)
TEXT = format_mermaid(GRAPH)
MERMAID = TASKS["mermaid"]


def test_the_reference_itself_scores_one_and_nothing_scores_zero():
    sentences = "alpha one points to beta. beta points to delta. "
    references = {"count": "7", "text": "alpha one", "truth": "true", "mermaid": TEXT, "description": sentences,
                  "caption": "An overview of the method."}  # fmt: skip
    for task in TASKS.values():
        reference = references[task.kind]
        for profile in ("paper", "lenient"):
            assert score_answer(task, reference, reference, profile=profile).score == 1.0
            empty = score_answer(task, "", reference, profile=profile)
            assert empty.score == 0.0 and not empty.parsed and not any(empty.parts.values())


def test_renamed_ids_order_and_style_do_not_matter():
    rename = {f"entity{i}": f"n{9 - i}" for i in range(4)}
    nodes = tuple(Node(rename[n.id], n.label.upper()) for n in reversed(GRAPH.nodes))
    edges = tuple(Edge(rename[e.source], rename[e.target], "plain") for e in reversed(GRAPH.edges))
    verdict = score_answer(MERMAID, format_mermaid(Graph(nodes=nodes, edges=edges)), TEXT)
    assert verdict.parts["node_f1"] == verdict.parts["link_f1"] == 1.0


def test_one_reversed_arrow_costs_one_link():
    first, *rest = GRAPH.edges
    wrong = Graph(nodes=GRAPH.nodes, edges=(Edge(first.target, first.source), *rest))
    verdict = score_answer(MERMAID, format_mermaid(wrong), TEXT)
    assert verdict.parts["link_f1"] == pytest.approx(3 / 4)
    assert verdict.parts["undirected_link_f1"] == 1.0


def test_published_reading_and_grammar_differ_only_where_documented():
    chain = "```mermaid\nflowchart LR\nA(alpha one) --> B(beta) --> D(delta)\n```"
    parts = score_answer(MERMAID, chain, TEXT).parts
    assert parts["link_f1"] == pytest.approx(2 / 5) and parts["grammar_link_f1"] == pytest.approx(4 / 6)
    assert parts["node_f1"] == pytest.approx(4 / 6) and parts["grammar_node_f1"] == pytest.approx(6 / 7)


@pytest.mark.parametrize(("text", "paper", "lenient"), [("The answer is 7.", "7", "7"), ("seven", "", "7"),
                         ("entity3 and 5", "3", "3"), ("", "", ""), ("007", "7", "7")])  # fmt: skip
def test_counts(text, paper, lenient):
    assert (read_count(text), read_count(text, "lenient")) == (paper, lenient)


@pytest.mark.parametrize(("text", "paper", "lenient"), [("True.", "true", "true"), ("Untrue, false", "false", "false"),
                         ("Yes", "", "true"), ("no idea, true", "true", "false")])  # fmt: skip
def test_truth(text, paper, lenient):
    assert (read_truth(text), read_truth(text, "lenient")) == (paper, lenient)


def test_edit_similarity_against_hand_counts():
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == 1.0 and edit_similarity("ab", "") == 0.0


def test_shuffled_true_false_answers_are_at_chance():
    rng = random.Random(3)
    words = ("true", "false")
    verdicts = [score_answer(TASKS["true_a_to_b"], rng.choice(words), rng.choice(words)) for _ in range(4000)]
    result = summarise(verdicts)
    assert result.interval.low < 0.5 < result.interval.high and result.count == 4000


def test_task_names_and_near_misses():
    assert find_task("Flowchart-isTrue-AtoB").name == "true_a_to_b"
    assert find_task("NUM_NODES").name == "num_nodes"
    with pytest.raises(ValueError, match="did you mean 'mermaid'"):
        find_task("mermade")


def test_odd_answers_are_counted_and_shown(tmp_path, capsys):
    rows = {"1.jpeg": {"prediction": None, "reference": "3"}, "2.jpeg": {"prediction": 4, "reference": 4},
            "3.jpeg": {"prediction": ["box", ["5", 0.9]], "reference": "5"},
            "4.jpeg": {"prediction": "many", "reference": "6"}, "5.jpeg": {"reference": "6"}}  # fmt: skip
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(rows))
    assert score_command(path, task="num_nodes") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["count"], report["unparsed"], report["score"]) == (5, 3, 0.4)
    assert "4.jpeg: 'many'" in captured.err


@pytest.mark.parametrize("content", ["[]", "{not json", '{"a": "b"}', '{"a": {"prediction": "x"}}'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_predictions(path)


# Printed by the authors, or re-counted from their files (docs/flowlearn.md says which): score, then link F1.
PRINTED = {
    "gpt4v_Num_Nodes": (0.58,), "gpt4v_Num_Arrows": (0.26,), "gpt4v_ocr": (0.75,),
    "gpt4v_Flowchart-isTrue-AtoB": (0.15,), "gpt4v_Flowchart-isFalse-AtoB": (0.61,),
    "gpt4v_Flowchart-isTrue-betweenAB": (0.28,), "gpt4v_Flowchart-isFalse-betweenAB": (0.77,),
    "gpt4v_Flowchart-to-Mermaid": (0.735, 0.227), "gpt4v_Flowchart-to-Description": (0.182,),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("answer", ["\n" * 4000, "9" * 5000, "A(" * 2000, "x --" * 1000, "a points to " * 300,
                                    "A --" + " " * 3000 + "x", "\n" * 20000, " " * 9000 + "x"])  # fmt: skip
def test_a_model_that_loops_costs_little_and_is_counted(task, answer):
    start = time.process_time()
    assert score_answer(task, answer, "").score < 0.1 and score_answer(task, answer, TEXT).score < 0.1
    assert time.process_time() - start < 2.0


def test_a_byte_order_mark_is_read_and_a_name_twice_is_refused(tmp_path):
    row = '"a.jpeg": {"prediction": "4", "reference": "4"}'
    file = tmp_path / "marked.json"
    file.write_text("{" + row + "}", encoding="utf-8-sig")
    assert read_predictions(file)[0].answer == "4"
    file.write_text("{" + row + ", " + row + "}")
    with pytest.raises(ValueError, match="twice"):
        read_predictions(file)


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released predictions are not here")
@pytest.mark.parametrize("name", PRINTED)
def test_released_predictions_give_the_printed_figures(name):
    path = RELEASED / f"{name}_2-shot.json"
    task = task_of_file(path)
    result, verdicts = score_predictions(read_predictions(path), task)
    assert len(verdicts) == result.count == 100
    got = (result.score, *((result.parts["link_f1"][0],) if task.kind == "mermaid" else ()))
    assert tuple(round(value, 3) for value in got) == PRINTED[name]
    assert result.interval.low <= result.score <= result.interval.high


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released predictions are not here")
@pytest.mark.parametrize("name", ["Num_Nodes", "Num_Arrows", "Flowchart-isTrue-AtoB"])
def test_bare_answers_score_like_plain_equality(name):
    path = RELEASED / f"char_qwen-vl_{name}_2-shot.json"
    rows = read_predictions(path)
    result, _ = score_predictions(rows, task_of_file(path))
    assert result.count == 2000
    assert result.score == sum(row.answer == row.reference for row in rows) / 2000
