"""FlowLearn's scorer: pure functions from answers to scores. No model is imported.

The protocol ("paper") was recovered from the predictions that the authors released: it gives the figures they
printed (docs/flowlearn.md). Raw answers stay untouched; reading an answer is its own step with a version.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from headrace.datasets.flowlearn.intervals import Interval, mean_interval
from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowlearn.published import Read, read_mermaid, read_sentences
from headrace.datasets.flowlearn.tasks import Task

READING = "flowlearn-reading-1"  # version of how answers are read; stored with results
Profile = Literal["paper", "lenient"]
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen",
)  # fmt: skip
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS)}


class Verdict(NamedTuple):
    """What one answer is worth.

    Attributes:
        score: In 0..1.
        parsed: Whether an answer of the asked kind was found at all; if not, the score is 0.
        read: The answer as it was read, for people to look at.
        parts: Other scores of the same answer, by name.
    """

    score: float
    parsed: bool
    read: str
    parts: dict[str, float]


class Score(NamedTuple):
    """The mean over answers of one task.

    Attributes:
        score: Mean of the verdicts, a fraction.
        interval: 95 %: Wilson's for right/wrong, bootstrap over questions for F1.
        count: Number of answers, unreadable ones included.
        unparsed: Number of answers that could not be read.
        parts: Mean and interval of the other scores, by name.
    """

    score: float
    interval: Interval
    count: int  # type: ignore[assignment]
    unparsed: int
    parts: dict[str, tuple[float, Interval]]


def f1(predicted: set[Any], reference: set[Any]) -> float:
    """Harmonic mean of precision and recall of two sets; two empty sets agree."""
    if not predicted and not reference:
        return 1.0
    return 2 * len(predicted & reference) / (len(predicted) + len(reference))


def read_count(text: str, profile: Profile = "paper") -> str:
    """The first integer in the answer, "" if there is none; the lenient profile also knows number words up to 15."""
    if profile == "lenient":
        text = re.sub(r"[a-z]+", lambda m: _NUMBER_WORDS.get(m[0], m[0]), text.lower())
    match = re.search(r"\d+", text)
    if match is None:
        return ""
    return str(int(match[0])) if len(match[0]) < 20 else match[0]  # Python refuses to convert thousands of digits


def read_truth(text: str, profile: Profile = "paper") -> str:
    """The first whole word `true` or `false`, "" if there is none; the lenient profile also takes yes and no."""
    words = r"\b(true|false|yes|no)\b" if profile == "lenient" else r"\b(true|false)\b"
    match = re.search(words, text, re.I)
    return {"yes": "true", "no": "false"}.get(match[0].lower(), match[0].lower()) if match else ""


def read_lines(text: str) -> set[tuple[str, str]]:
    """Pairs (X, Y) of the sentences `X points to Y`, where a line break also ends a sentence."""
    text = re.sub(r"(?i)\bthe answer is:?\s*", "", text)
    found = set()
    for sentence in re.split(r"\.(?:\s|$)|\n", text):
        ends = re.split(r"\s+points?\s+to\s+", sentence.strip(), maxsplit=1)
        if len(ends) == 2 and all(end.strip() for end in ends):
            found.add((ends[0].strip().lower(), ends[1].strip().lower()))
    return found


def _score_text(answer: str, reference: str, profile: Profile) -> Verdict:
    got, want = answer.strip().lower(), reference.strip().lower()
    if profile == "lenient":
        got, want = (re.sub(r"[\s\"'.`]+", " ", text).strip() for text in (got, want))
    parts = {"contains": float(bool(want) and want in got), "edit_similarity": edit_similarity(got, want)}
    return Verdict(float(bool(got) and got == want), bool(got), got, parts)


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for two empty texts."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a[:2000], start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return 1.0 - row[-1] / max(len(a[:2000]), len(b), 1)


def _score_count(answer: str, reference: str, profile: Profile) -> Verdict:
    got, want = read_count(answer, profile), read_count(reference)
    error = abs(int(got) - int(want)) if got and want and max(len(got), len(want)) < 20 else None
    return Verdict(float(bool(got) and got == want), bool(got), got, {"within_one": float(error in (0, 1))})


def _score_truth(answer: str, reference: str, profile: Profile) -> Verdict:
    got = read_truth(answer, profile)
    return Verdict(float(bool(got) and got == read_truth(reference)), bool(got), got, {})


def _score_mermaid(answer: str, reference: str, profile: Profile) -> Verdict:
    graph, wanted = parse_mermaid(answer).graph, parse_mermaid(reference).graph
    grammar = Read(graph.label_set(), graph.link_set()), Read(wanted.label_set(), wanted.link_set())
    got, want = grammar if profile == "lenient" else (read_mermaid(answer), read_mermaid(reference))
    nodes, links = _said_f1(got.nodes, want.nodes, bool(got.nodes)), _said_f1(got.links, want.links, bool(got.nodes))
    undirected = [{frozenset(pair) for pair in read.links} for read in (got, want)]
    declared = bool(grammar[0].nodes)
    parts = {
        "node_f1": nodes,
        "link_f1": links,
        "undirected_link_f1": _said_f1(undirected[0], undirected[1], bool(got.nodes)),
        "grammar_node_f1": _said_f1(grammar[0].nodes, grammar[1].nodes, declared),
        "grammar_link_f1": _said_f1(grammar[0].links, grammar[1].links, declared),
    }
    return Verdict(nodes, bool(got.nodes or got.links), f"{len(got.nodes)} nodes, {len(got.links)} links", parts)


def _said_f1(got: set[Any], want: set[Any], said: bool) -> float:
    """F1, but 0 for an answer that says nothing at all, even where nothing is what is wanted."""
    return f1(got, want) if said else 0.0


def _score_description(answer: str, reference: str, profile: Profile) -> Verdict:
    read = read_lines if profile == "lenient" else read_sentences
    got, want, lines = read(answer), read(reference), read_lines(answer)
    parts = {
        "rouge_l": rouge_l(answer, reference),
        "by_line_f1": _said_f1(lines, read_lines(reference), bool(lines)),
    }
    return Verdict(_said_f1(got, want, bool(got)), bool(got), f"{len(got)} sentences", parts)


def _score_caption(answer: str, reference: str, _: Profile) -> Verdict:
    return Verdict(rouge_l(answer, reference), bool(answer.strip()), answer.strip()[:200], {})


def rouge_l(answer: str, reference: str) -> float:
    """F1 over the longest common subsequence of lower-case words (Lin 2004), without stemming."""
    got, want = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not got or not want:
        return 0.0
    row = [0] * (len(want) + 1)
    for word in got:
        previous = 0
        for j, other in enumerate(want, start=1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(got) + len(want))


_SCORERS = {"text": _score_text, "count": _score_count, "truth": _score_truth, "mermaid": _score_mermaid,
            "description": _score_description, "caption": _score_caption}  # fmt: skip


def score_answer(task: Task, answer: str, reference: str, *, profile: Profile = "paper") -> Verdict:
    """Score one answer.

    Args:
        task: Says how the answer is read.
        answer: A model's raw text.
        reference: The label.
        profile: `paper` is the authors' protocol; `lenient` also reads number words, yes/no and stray punctuation.
    """
    return _SCORERS[task.kind](answer, reference, profile)


def summarise(verdicts: Iterable[Verdict]) -> Score:
    """Mean, interval and counts over verdicts of one task; a score of 0 over (0, 1) when there are none."""
    verdicts = list(verdicts)
    values = [v.score for v in verdicts]
    parts = {}
    for name in sorted({name for v in verdicts for name in v.parts}):
        column = [v.parts.get(name, 0.0) for v in verdicts]
        parts[name] = (sum(column) / len(column), mean_interval(column))
    mean = sum(values) / len(values) if values else 0.0
    return Score(mean, mean_interval(values), len(values), sum(not v.parsed for v in verdicts), parts)
