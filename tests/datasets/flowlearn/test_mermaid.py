"""Reading Mermaid: what was written comes back; nothing raises."""

import random

import pytest

from headrace.datasets.flowlearn.mermaid import format_mermaid, parse_mermaid
from headrace.datasets.flowlearn.records import DIRECTIONS, STYLES, Edge, Graph, Node


def random_graph(rng: random.Random) -> Graph:
    count = rng.randint(1, 12)
    labels = rng.sample(range(10_000), count)
    extra = ["", " two words", " (round)", ' "quoted"', "; semi", " a|b", " über"]
    nodes = tuple(Node(f"entity{i}", f"w{label}{rng.choice(extra)}") for i, label in enumerate(labels))
    pairs = [(a.id, b.id) for a in nodes for b in nodes if a is not b]
    chosen = rng.sample(pairs, min(len(pairs), rng.randint(0, 14)))
    edges = tuple(Edge(a, b, rng.choice(STYLES), rng.choice(["", "yes", "if so"])) for a, b in chosen)
    return Graph(nodes=nodes, edges=edges, direction=rng.choice(DIRECTIONS))


def test_a_written_graph_reads_back_the_same():
    rng = random.Random(0)
    for _ in range(1000):
        graph = random_graph(rng)
        parsed = parse_mermaid(format_mermaid(graph, fence=rng.random() < 0.5))
        wanted = tuple(Node(n.id, n.label.replace('"', "'")) for n in graph.nodes)
        assert parsed.warnings == ()
        assert parsed.graph == Graph(nodes=wanted, edges=graph.edges, direction=graph.direction)


def test_no_text_makes_it_raise():
    rng = random.Random(1)
    text = '--> ==> -.-> (( )) [ ] { } | " & ; A b1 é ``` mermaid subgraph end %% < > -- ~~~ \x00 @{ :::'
    pieces = [*text.split(" "), "\n", " ", "flowchart TD"]
    for _ in range(10_000):
        parse_mermaid("".join(rng.choices(pieces, k=rng.randint(0, 25))))


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("A-->B-->C", {("a", "b"), ("b", "c")}),
        ("A & B --> C & D", {("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")}),
        ("A(one) --> B[two words]; B ==> C{three}", {("one", "two words"), ("two words", "three")}),
        ("A -->|yes| B", {("a", "b")}),
        ("A -- yes or no --> B", {("a", "b")}),
        ("A == yes ==> B", {("a", "b")}),
        ("A -. yes .-> B", {("a", "b")}),
        ("A --- B", {("a", "b")}),
        ("A ----> B\nA -...-> C\nA ====> D", {("a", "b"), ("a", "c"), ("a", "d")}),
        ("A <--> B", {("a", "b"), ("b", "a")}),
        ("A --o B\nA --x C", {("a", "b"), ("a", "c")}),
        ("A ~~~ B", set()),
        ("A((disc)) --> B([stadium])\nB --> C[[sub]]\nC --> D[(store)]\nD --> E{{hex}}",
         {("disc", "stadium"), ("stadium", "sub"), ("sub", "store"), ("store", "hex")}),
        ('A["with (brackets)"] --> B("q")', {("with (brackets)", "q")}),
        ("A:::red --> B", {("a", "b")}),
        ("node-1 --> node.2", {("node-1", "node.2")}),
        ("subgraph one\nA --> B\nend\nclassDef x fill:#fff\nstyle A fill:#000\nclick A foo\n%% note\nB --> C %% tail",
         {("a", "b"), ("b", "c")}),
    ],
)  # fmt: skip
def test_forms_of_links(text, links):
    parsed = parse_mermaid("flowchart LR\n" + text)
    assert parsed.warnings == ()
    assert parsed.graph.link_set() == links


def test_code_is_found_inside_an_answer():
    answer = "Nodes are A and B.\n```mermaid\ngraph TD\nA(x) --> B(y)\n```\nThat is all."
    assert parse_mermaid(answer).graph.link_set() == {("x", "y")}
    assert parse_mermaid("Sure:\nflowchart LR\nA(x) --> B(y)").graph.direction == "LR"


def test_a_line_that_is_cut_off_is_dropped_with_a_warning():
    parsed = parse_mermaid("```mermaid\nflowchart LR\nentity0(a)\nentity1(b)\nentity0 --> entity1\nentity1 --> ent")
    assert parsed.graph.link_set() == {("a", "b")}
    assert parsed.graph.label_set() == {"a", "b"}
    assert len(parsed.warnings) == 1


def test_a_malformed_line_adds_nothing_and_is_named():
    parsed = parse_mermaid("flowchart LR\nA(x --> B\nB --> C\n??? what")
    assert parsed.graph.link_set() == {("b", "c")}
    assert len(parsed.warnings) == 2 and "what" in parsed.warnings[1]
