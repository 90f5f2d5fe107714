"""The simulated set's sampler, re-made from the released charts' statistics. Chart k depends on (seed, k).

Only `random.Random` draws are used, so a seed gives the same JSON on every platform.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from headrace.datasets.flowlearn.mermaid import format_mermaid
from headrace.datasets.flowlearn.records import DIRECTIONS, STYLES, Edge, Graph, LabelIssue, Node, Question, Style
from headrace.datasets.flowlearn.words import letter_labels, unique_word_labels

Variant = Literal["word", "char"]
Protocol = Literal["clean", "released"]
NODE_COUNTS = range(3, 11)
_MUTATED_SHARE = 0.4  # of released charts with three nodes: 5 of 100 charts overall carry a label that is not drawn


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One simulated flowchart before it is drawn.

    Attributes:
        name: File stem, the chart's number as in the release.
        background: RGB as six hexadecimal digits.
        boxed: Id of the node that carries the red rectangle of the OCR task.
        seed: Seed of the draws that belong to this chart.
    """

    name: str
    variant: Variant
    graph: Graph
    background: str
    boxed: str
    seed: int


def chart_seed(seed: int, index: int) -> int:
    """64 bits from (seed, index); independent of how many charts are made or in which order."""
    return int.from_bytes(hashlib.sha256(f"flowlearn:{seed}:{index}".encode()).digest()[:8], "big")


def sample_links(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Ordered pairs among `count` nodes: one forward draw per node, then a few backward ones; sorted by source."""
    links: list[tuple[int, int]] = []
    for i in range(count):
        j = rng.choice([k for k in range(count) if k != i])
        pair = (min(i, j), max(i, j))
        if pair not in links:
            links.append(pair)
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        u, v = rng.sample(range(count), 2)
        pair = (max(u, v), min(u, v))
        if pair not in links:
            links.append(pair)
    return sorted(links, key=lambda pair: pair[0])


def make_chart(
    seed: int, index: int, *, variant: Variant = "word", nodes: int | None = None, words: list[str] | None = None
) -> Chart:
    """Draw chart number `index` of the set `seed`.

    Args:
        seed, index: Together decide everything.
        variant: `word` (one to three words, three arrow styles) or `char` (a capital letter, thick arrows only).
        nodes: Number of nodes; drawn from 3..10 when left out.
        words: Words for the labels instead of pseudo-words.

    Raises:
        ValueError: `nodes` is below 2, or above 26 for letters; or `words` give too few different labels.
    """
    rng = random.Random(chart_seed(seed, index))
    direction = rng.choice(DIRECTIONS)
    count = rng.choice(NODE_COUNTS)
    count = nodes if nodes is not None else count
    if count < 2 or (variant == "char" and count > 26):
        raise ValueError(
            f"a {variant} chart needs 2 to {26 if variant == 'char' else 'any number of'} nodes, got {count}"
        )
    labels = letter_labels(rng, count) if variant == "char" else unique_word_labels(rng, count, words)
    pairs = sample_links(rng, count)
    styles: list[Style] = ["thick" if variant == "char" else rng.choice(STYLES) for _ in pairs]
    shade = rng.choice(("FFFFFF", "C0C0C0", f"{rng.randrange(1 << 24):06X}"))
    graph = Graph(
        nodes=tuple(Node(f"entity{i}", label) for i, label in enumerate(labels)),
        edges=tuple(Edge(f"entity{a}", f"entity{b}", s) for (a, b), s in zip(pairs, styles, strict=True)),
        direction=direction,
    )
    boxed = rng.choice(graph.nodes).id
    return Chart(name=str(index), variant=variant, graph=graph, background=shade, boxed=boxed, seed=rng.getrandbits(64))


def describe(graph: Graph) -> str:
    """One sentence per arrow, in the arrows' order."""
    label = graph.label
    return "".join(f"{label[e.source]} points to {label[e.target]}. " for e in graph.edges)


def points_to(a: str, b: str) -> str:
    """The benchmark's statement about an arrow's direction; a format that answers depend on."""
    return f"Arrow points from node '{a}' to node '{b}'."


def exists_between(a: str, b: str) -> str:
    """The benchmark's statement about an arrow's existence; a format that answers depend on."""
    return f"Arrow exists between node '{a}' and node '{b}'."


class _Statement(tuple[str, str]):
    """Two labels, in order."""

    issue: LabelIssue | None = None


def _statement(a: str, b: str, issue: LabelIssue | None = None) -> _Statement:
    made = _Statement((a, b))
    made.issue = issue
    return made


def sample_statements(chart: Chart, protocol: Protocol) -> dict[str, _Statement]:
    """Labels for the four statement tasks; a task is absent where the chart has no such pair.

    `clean`: a false direction is the reversal of a lone arrow, a false existence has no arrow either way.
    `released`: as the authors drew them, with their flaws marked by `issue`.
    """
    rng = random.Random(chart.seed)
    label, links = chart.graph.label, [(e.source, e.target) for e in chart.graph.edges]
    ids = [node.id for node in chart.graph.nodes]
    taken = set(links)
    made = {}
    for task in ("true_a_to_b", "true_between"):
        a, b = rng.choice(links)
        made[task] = _statement(label[a], label[b])
    lone = [(b, a) for a, b in links if (b, a) not in taken]
    mutate = protocol == "released" and (not lone or (len(ids) == 3 and rng.random() < _MUTATED_SHARE))
    if mutate:
        a, b = rng.choice(links)
        made["false_a_to_b"] = _statement(label[a], label[b][:-1] + "z", "mutated_label")
    elif lone:
        a, b = rng.choice(lone)
        made["false_a_to_b"] = _statement(label[a], label[b])
    absent = [(a, b) for a in ids for b in ids if a != b and (a, b) not in taken]
    if protocol == "clean":
        absent = [(a, b) for a, b in absent if (b, a) not in taken]
    if absent:
        a, b = rng.choice(absent)
        made["false_between"] = _statement(label[a], label[b], "reverse_edge_exists" if (b, a) in taken else None)
    return made


def make_questions(
    chart: Chart, *, image: str, boxed_image: str, split: str = "test", protocol: Protocol = "clean"
) -> list[Question]:
    """All questions on one chart, in a fixed order.

    Args:
        chart: The chart.
        image, boxed_image: Paths of the pictures relative to the data folder; the second carries the red rectangle.
        split: Name of the split, stored with each question.
        protocol: Which label profile, see `sample_statements`.
    """
    graph, variant = chart.graph, f"sim-{chart.variant}"
    answers = {
        "num_nodes": str(len(graph.nodes)),
        "num_arrows": str(len(graph.edges)),
        "ocr": graph.label[chart.boxed],
        "mermaid": format_mermaid(graph),
        "description": describe(graph),
    }
    asked: dict[str, tuple[str, str, LabelIssue | None]] = {task: ("", text, None) for task, text in answers.items()}
    for task, pair in sample_statements(chart, protocol).items():
        text = (points_to if task.endswith("a_to_b") else exists_between)(*pair)
        asked[task] = (text, task.split("_")[0], pair.issue)
    meta = {"graph": graph.to_dict(), "bg": chart.background, "protocol": protocol}
    return [
        Question(
            uid=f"flowlearn/{variant}/{split}/{chart.name}/{task}",
            dataset="flowlearn",
            variant=variant,
            split=split,
            image=boxed_image if task == "ocr" else image,
            task=task,
            question=question,
            answer=answer,
            label_issue=issue,
            meta=meta,
        )
        for task, (question, answer, issue) in asked.items()
    ]
