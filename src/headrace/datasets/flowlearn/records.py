"""What a flowchart and a question about it are. Source: FlowLearn (arXiv 2407.05183) and its released files.

No model and no picture library is imported here; everything is plain data that JSON can hold.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Direction = Literal["TB", "BT", "RL", "LR", "TD"]
Style = Literal["plain", "thick", "dotted"]
LabelIssue = Literal["reverse_edge_exists", "mutated_label"]
DIRECTIONS: tuple[Direction, ...] = ("TB", "BT", "RL", "LR", "TD")
STYLES: tuple[Style, ...] = ("plain", "thick", "dotted")


class Node(NamedTuple):
    """A box. `box` is (x0, y0, x1, y1) in picture pixels [px], empty where no picture was drawn."""

    id: str
    label: str
    box: tuple[float, ...] = ()


class Edge(NamedTuple):
    """An arrow from the node with id `source` to the node with id `target`.

    `path` holds points (x, y) along the drawn line from tail to head [px], empty where no picture was drawn.
    """

    source: str
    target: str
    style: Style = "plain"
    text: str = ""
    path: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Boxes and arrows in the order in which they were written."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    direction: Direction = "TB"

    @property
    def label(self) -> dict[str, str]:
        """Node id to its label."""
        return {node.id: node.label for node in self.nodes}

    def label_set(self) -> set[str]:
        """Labels as the scorer compares them: stripped, lower case, without the empty one."""
        return {key for node in self.nodes if (key := node.label.strip().lower())}

    def link_set(self) -> set[tuple[str, str]]:
        """Ordered pairs of labels as the scorer compares them; style and multiplicity are dropped."""
        label = self.label
        pairs = ((label.get(e.source, e.source), label.get(e.target, e.target)) for e in self.edges)
        return {(a.strip().lower(), b.strip().lower()) for a, b in pairs}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {
            "direction": self.direction,
            "nodes": [{"id": n.id, "label": n.label, **({"bbox": list(n.box)} if n.box else {})} for n in self.nodes],
            "edges": [
                {"src": e.source, "dst": e.target, "style": e.style, "text": e.text}
                | ({"path": [list(point) for point in e.path]} if e.path else {})
                for e in self.edges
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Graph":
        """Rebuild from `to_dict`."""
        return cls(
            nodes=tuple(Node(n["id"], n["label"], tuple(n.get("bbox", ()))) for n in data["nodes"]),
            edges=tuple(
                Edge(
                    e["src"],
                    e["dst"],
                    e.get("style", "plain"),
                    e.get("text", ""),
                    tuple((x, y) for x, y in e.get("path", ())),
                )
                for e in data["edges"]
            ),
            direction=data.get("direction", "TB"),
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question on one picture, with its answer: a line of the normalised JSONL.

    Attributes:
        uid: Unique in the data set, such as `flowlearn/sim-word/num_nodes/9380.jpeg`.
        image: Path of the picture relative to the data folder.
        task: A key of `tasks.TASKS`, or of another data set's own table.
        question: Text given with the picture; empty where the task's instruction says everything.
        answer: The reference.
        label_issue: Why the reference contradicts the picture, or None.
        meta: What else is known, such as the graph.
    """

    uid: str
    dataset: str
    variant: str
    split: str
    image: str
    task: str
    question: str
    answer: str
    label_issue: LabelIssue | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> "Question":
        """Read a line of `to_json`.

        Raises:
            ValueError: Not JSON, or keys are missing or unknown; says which line.
        """
        try:
            return cls(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"not a question record ({error}): {line[:120]!r}") from error
