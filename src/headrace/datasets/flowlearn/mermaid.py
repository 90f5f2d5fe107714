"""Mermaid flowcharts: text to `Graph` and back. Reading never raises; what cannot be read becomes a warning.

Grammar: what Mermaid 10 accepts for nodes and links in a `flowchart`, plus what language models write by mistake.
"""

import re
from typing import NamedTuple

from headrace.datasets.flowlearn.records import DIRECTIONS, Edge, Graph, Node, Style

LINK_TEXT: dict[Style, str] = {"plain": "-->", "thick": "==>", "dotted": "-..->"}
# Longest opening first; each with its closing.
_SHAPES = (("(((", ")))"), ("((", "))"), ("([", "])"), ("[[", "]]"), ("[(", ")]"), ("{{", "}}"), ("[/", "/]"),
           ("[\\", "\\]"), ("(", ")"), ("[", "]"), ("{", "}"), (">", "]"))  # fmt: skip
_ID = re.compile(r"\w+(?:[-.:/]\w+)*")
_BODY = r"(?:-{2,}|={2,}|-\.+-)"
_LINK = re.compile(rf"(?P<left><|[ox](?=-|=))?(?P<body>{_BODY})(?P<right>>|[ox](?=[\s|&]))?(?:\s*\|(?P<text>[^|]*)\|)?")
_TEXT_LINK = re.compile(
    r"(?P<left><|[ox](?=-|=))?(?P<body>--|==|-\.)(?![->=.])(?P<text>[^\n|]*?)(?:-{2,}|={2,}|\.+-)(?P<right>>|[ox](?=\s))?"
)
_HEADER = re.compile(r"^\s*(?:flowchart|graph)(?:-elk)?\b[ \t]*(?P<direction>TB|BT|RL|LR|TD)?[ \t]*", re.I)
_IGNORED = re.compile(r"^(?:subgraph|end|classDef|class|style|linkStyle|click|direction|accTitle|accDescr)\b|^%%", re.I)
_FENCE = re.compile(r"```+[ \t]*\n?[ \t]*(?:mermaid)?[ \t]*\n?(?P<code>.*?)(?P<close>```+|\Z)", re.S | re.I)
_SHAPE_NOTE = re.compile(r"@\{(?P<inside>[^}]*)\}")
_LABEL_NOTE = re.compile(r"label\s*:\s*(\"[^\"]*\"|'[^']*'|[^,]+)")


class Parsed(NamedTuple):
    """A graph and what could not be read on the way to it; `warnings` is empty for well-formed text."""

    graph: Graph
    warnings: tuple[str, ...]


class _Reader:
    """Collects declarations and links over the lines of one chart."""

    def __init__(self) -> None:
        self.labels: dict[str, str | None] = {}
        self.edges: list[Edge] = []
        self.direction = "TB"
        self.warnings: list[str] = []

    def line(self, text: str) -> bool:
        """Read one statement; adds nothing unless the whole of it is understood."""
        nodes: dict[str, str | None] = {}
        edges: list[Edge] = []
        group, at = _node_group(text, 0, nodes)
        while group and at < len(text):
            link, at = _link(text, at)
            if link is None:
                group = []
                break
            following, at = _node_group(text, at, nodes)
            if following and link.drawn:
                edges += [edge for a in group for b in following for edge in link.edges(a, b)]
            group = following
        if not group:
            self.warnings.append(f"not understood: {text[:80]!r}")
            return False
        for key, label in nodes.items():
            if label is not None or key not in self.labels:
                self.labels[key] = label
        self.edges += edges
        return True

    def graph(self) -> Graph:
        nodes = tuple(Node(key, key if label is None else label) for key, label in self.labels.items())
        direction = self.direction.upper()
        assert direction in DIRECTIONS
        return Graph(nodes=nodes, edges=tuple(self.edges), direction=direction)  # type: ignore[arg-type]


class _Link(NamedTuple):
    style: Style
    both: bool
    backward: bool
    text: str
    drawn: bool = True

    def edges(self, a: str, b: str) -> list[Edge]:
        if self.backward:
            return [Edge(b, a, self.style, self.text)]
        first = Edge(a, b, self.style, self.text)
        return [first, Edge(b, a, self.style, self.text)] if self.both else [first]


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _clean(label: str) -> str:
    label = re.sub(r"<br\s*/?>", " ", label.strip())
    for quote in ('"', "'", "`"):
        if len(label) >= 2 and label[0] == quote == label[-1]:
            label = label[1:-1].strip()
    return re.sub(r"\s+", " ", label)


def _shape(text: str, at: int) -> tuple[str | None, int]:
    """Label of the shape that opens at `at` and the position behind it; (None, at) for none, (None, -1) if unclosed."""
    note = _SHAPE_NOTE.match(text, at)
    if note:
        label = _LABEL_NOTE.search(note["inside"])
        return (_clean(label[1]) if label else None), note.end()
    for opening, closing in _SHAPES:
        if not text.startswith(opening, at):
            continue
        start = at + len(opening)
        quoted = re.compile(r'\s*"([^"]*)"\s*').match(text, start)
        if quoted and text.startswith(closing, quoted.end()):
            return _clean(quoted[1]), quoted.end() + len(closing)
        depth, end = 0, start
        while end < len(text):
            if depth == 0 and text.startswith(closing, end):
                return _clean(text[start:end]), end + len(closing)
            depth += (text[end] == opening[-1] and opening != ">") - (text[end] == closing[0] and depth > 0)
            end += 1
    return None, (-1 if at < len(text) and text[at] in "([{" else at)


def _node(text: str, at: int, nodes: dict[str, str | None]) -> tuple[str, int]:
    """Id of the node at `at`, "" if there is none, and the position behind it."""
    match = _ID.match(text, at)
    if not match:
        return "", at
    key = match[0]
    label, at = _shape(text, match.end())
    if at < 0:
        return "", len(text)
    if label is not None or key not in nodes:
        nodes[key] = label
    classed = re.compile(r":::\w[\w-]*").match(text, at)
    return key, classed.end() if classed else at


def _node_group(text: str, at: int, nodes: dict[str, str | None]) -> tuple[list[str], int]:
    """Ids in `A & B & C` at `at`; an empty list when one of them cannot be read."""
    group: list[str] = []
    while True:
        key, at = _node(text, _skip(text, at), nodes)
        if not key:
            return [], at
        group.append(key)
        at = _skip(text, at)
        if not text.startswith("&", at):
            return group, at
        at += 1


def _link(text: str, at: int) -> tuple[_Link | None, int]:
    invisible = re.compile(r"~{3,}").match(text, at)
    if invisible:
        return _Link("plain", False, False, "", drawn=False), invisible.end()
    match = _LINK.match(text, at)
    if match and len(match["body"]) == 2 and not match["right"] and not match["left"]:
        match = None
    match = match or _TEXT_LINK.match(text, at)
    if not match:
        return None, at
    body = match["body"]
    style: Style = "thick" if "=" in body else "dotted" if "." in body else "plain"
    left, right = match["left"] == "<", match["right"] == ">"
    return _Link(style, left and right, left and not right, _clean(match["text"] or "")), match.end()


def code_of(text: str) -> tuple[str, bool]:
    """The Mermaid code in a model's answer, and whether its fence was opened and never closed.

    The first fenced block that has a header or a link is taken; without fences, everything from the header on, or the
    whole text.
    """
    blocks = [(m["code"], not m["close"]) for m in _FENCE.finditer(text)]
    for code, is_open in blocks:
        if code.strip() and (_HEADER.search(code) or re.search(_BODY, code)):
            return code, is_open
    header = re.search(r"^[ \t]*(?:flowchart|graph)[ \t]+(?:TB|BT|RL|LR|TD)\b", text, re.I | re.M)
    return (text[header.start() :] if header else text), False


def _statements(code: str) -> list[str]:
    """Lines, cut at semicolons outside quotes; comments at the end of a line are removed."""
    found = []
    for line in code.splitlines():
        found += re.split(r";(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", re.sub(r"%%.*$", "", line))
    return [text.strip() for text in found if text.strip()]


def parse_mermaid(text: str) -> Parsed:
    """Read a flowchart out of Mermaid text or out of an answer that contains some.

    A line that cannot be read whole adds nothing and gives a warning; so does a last line that looks cut off. Ids that
    are never declared carry their id as label. Never raises.
    """
    code, is_open = code_of(text)
    reader = _Reader()
    statements = _statements(code)
    for index, statement in enumerate(statements):
        header = _HEADER.match(statement)
        if header and (header["direction"] or header.end() == len(statement)):
            reader.direction = header["direction"] or "TB"
            statement = statement[header.end() :].strip()
        if not statement or _IGNORED.match(statement) or statement.strip("`") in ("", "mermaid"):
            continue
        if is_open and index == len(statements) - 1 and _is_cut(statement, reader):
            reader.warnings.append(f"cut off: {statement[:80]!r}")
            continue
        reader.line(statement)
    return Parsed(reader.graph(), tuple(reader.warnings))


def _is_cut(statement: str, reader: _Reader) -> bool:
    """Whether the last line names, without a label, an id that the labelled rest does not know."""
    nodes: dict[str, str | None] = {}
    for match in _ID.finditer(re.sub(r"[(\[{].*?[)\]}]", "", statement)):
        nodes[match[0]] = None
    labelled = any(label is not None for label in reader.labels.values())
    return labelled and any(key not in reader.labels for key in nodes) and "(" not in statement


def format_mermaid(graph: Graph, *, fence: bool = True) -> str:
    """Write a graph as the authors do: header, one `id(label)` line per node, one line per arrow.

    Labels with characters that would end the shape are quoted.
    """
    rows = [f"flowchart {graph.direction}"]
    for node in graph.nodes:
        plain = re.fullmatch(r"[^\"()\[\]{};%&|<>`]*", node.label) and node.label.strip() == node.label != ""
        rows.append(f"{node.id}({node.label})" if plain else f'{node.id}("{node.label.replace(chr(34), chr(39))}")')
    for edge in graph.edges:
        text = f"|{edge.text}|" if edge.text else ""
        rows.append(f"{edge.source} {LINK_TEXT[edge.style]}{text} {edge.target}")
    code = "\n".join(rows)
    return f"```mermaid\n{code}\n```" if fence else code
