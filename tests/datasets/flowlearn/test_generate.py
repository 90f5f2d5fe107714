"""The sampler has the released set's statistics, and its labels fit the graph."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from scipy.stats import chisquare

import headrace
from headrace.datasets.flowlearn.generate import make_chart, make_questions
from headrace.datasets.flowlearn.load import label_issue
from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowlearn.records import DIRECTIONS, STYLES
from headrace.datasets.flowlearn.words import LONGEST_LABEL

COUNT = 2000


@pytest.fixture(scope="module")
def charts():
    return [make_chart(0, index) for index in range(COUNT)]


def questions_of(chart, protocol="clean"):
    return {q.task: q for q in make_questions(chart, image="a.jpeg", boxed_image="b.jpeg", protocol=protocol)}


def test_uniform_choices_are_uniform(charts):
    backgrounds = Counter({"FFFFFF": 0, "C0C0C0": 0, "other": 0})
    for chart in charts:
        backgrounds[chart.background if chart.background in backgrounds else "other"] += 1
    for counts, choices in (
        (Counter(len(c.graph.nodes) for c in charts), 8),
        (Counter(c.graph.direction for c in charts), len(DIRECTIONS)),
        (Counter(e.style for c in charts for e in c.graph.edges), len(STYLES)),
        (backgrounds, 3),
    ):
        assert len(counts) == choices
        assert chisquare(list(counts.values())).pvalue > 0.001


def test_arrows_per_node_count_are_the_released_ones(charts):
    released = {3: 3.23, 4: 4.44, 5: 5.57, 6: 6.56, 7: 7.62, 8: 8.56, 9: 9.66, 10: 10.67}
    for nodes, wanted in released.items():
        assert mean(len(c.graph.edges) for c in charts if len(c.graph.nodes) == nodes) == pytest.approx(
            wanted, abs=0.25
        )


def test_graphs_have_no_loops_duplicates_or_lonely_nodes(charts):
    cycles = 0
    for chart in charts:
        pairs = [(e.source, e.target) for e in chart.graph.edges]
        assert len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs)
        assert {end for pair in pairs for end in pair} == {n.id for n in chart.graph.nodes}
        cycles += any((b, a) in pairs for a, b in pairs)
    assert cycles / COUNT == pytest.approx(0.352, abs=0.04)


def test_labels_look_like_the_released_ones(charts):
    labels = [n.label for c in charts for n in c.graph.nodes]
    assert all(3 - 1 <= len(label) <= LONGEST_LABEL and label == label.lower().strip() for label in labels)
    words = Counter(len(label.split()) for label in labels)
    assert words[1] / len(labels) == pytest.approx(0.47, abs=0.08)
    assert words[2] / len(labels) == pytest.approx(0.51, abs=0.08)
    assert all(len({n.label for n in c.graph.nodes}) == len(c.graph.nodes) for c in charts)


def test_letter_charts_have_thick_arrows_and_single_capitals():
    for index in range(50):
        graph = make_chart(0, index, variant="char").graph
        assert all(len(n.label) == 1 and n.label.isupper() for n in graph.nodes)
        assert {e.style for e in graph.edges} == {"thick"}


def test_answers_follow_from_the_graph(charts):
    for chart in charts[:300]:
        asked = questions_of(chart)
        assert asked["num_nodes"].answer == str(len(chart.graph.nodes))
        assert asked["num_arrows"].answer == str(len(chart.graph.edges))
        assert parse_mermaid(asked["mermaid"].answer).graph == chart.graph
        assert asked["description"].answer.count(" points to ") == len(chart.graph.edges)
        for task in ("true_a_to_b", "true_between"):
            a, b = (text.lower() for text in asked[task].question.split("'")[1::2])
            assert (a, b) in chart.graph.link_set() and asked[task].answer == "true"


def test_clean_labels_never_contradict_the_picture(charts):
    seen = 0
    for chart in charts[:1000]:
        asked, links = questions_of(chart), chart.graph.link_set()
        for task in ("false_a_to_b", "false_between"):
            if task in asked:
                a, b = asked[task].question.split("'")[1::2]
                assert (a, b) not in links and asked[task].label_issue is None
                assert ((b, a) in links) == (task == "false_a_to_b")
                seen += 1
    assert seen > 1900


def test_released_labels_have_marked_flaws(charts):
    issues = Counter()
    for chart in charts[:1000]:
        for question in questions_of(chart, "released").values():
            if question.answer == "false":
                a, b = question.question.split("'")[1::2]
                assert question.label_issue == label_issue(question.task, a, b, chart.graph)
                issues[question.label_issue] += 1
    assert 10 < issues["mutated_label"] < 150 and issues["reverse_edge_exists"] > 0


def test_a_chart_depends_on_seed_and_number_only():
    code = "from headrace.datasets.flowlearn.generate import *; print(make_chart(5, 77))"
    source = str(Path(headrace.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True)
    printed = done.stdout.strip()
    assert printed == str(make_chart(5, 77)) != str(make_chart(6, 77))


def test_too_few_words_are_refused():
    make_chart(0, 0, nodes=5, words=["cat"])  # one to five cats
    with pytest.raises(ValueError, match="1 words gave 5 different labels"):
        make_chart(0, 0, nodes=6, words=["cat"])
