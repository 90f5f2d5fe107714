"""From samples to the numbers of `results.json`. Depends on nothing but the samples, so it can be redone any time."""

from collections import Counter, defaultdict
from typing import Any

from headrace.datasets.flowlearn.intervals import mean_interval
from headrace.datasets.flowlearn.score import Verdict, summarise
from headrace.datasets.flowlearn.tasks import BALANCED
from headrace.vlm.vqa_samples import Sample


def _numbers(samples: list[Sample]) -> dict[str, Any]:
    result = summarise(Verdict(s.score, s.parsed, s.read, s.parts) for s in samples)
    numbers: dict[str, Any] = {
        "score": round(result.score, 6),
        "interval": [round(end, 6) for end in result.interval],
        "count": result.count,
        "unparsed": result.unparsed,
        "errors": sum(bool(s.error) for s in samples),
    }
    if result.parts:
        numbers["parts"] = {
            name: {"score": round(mean, 6), "interval": [round(end, 6) for end in interval]}
            for name, (mean, interval) in result.parts.items()
        }
    return numbers


def majority(samples: list[Sample]) -> float:
    """What always giving the most frequent reference would score."""
    return Counter(s.reference for s in samples).most_common(1)[0][1] / len(samples)


def by_nodes(samples: list[Sample]) -> dict[str, dict[str, Any]]:
    """Score by number of nodes in the chart, where it is known."""
    groups: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.nodes is not None:
            groups[sample.nodes].append(sample.score)
    return {
        str(nodes): {
            "score": round(sum(values) / len(values), 6),
            "interval": [round(end, 6) for end in mean_interval(values)],
            "count": len(values),
        }
        for nodes, values in sorted(groups.items())
    }


def results_of(samples: list[Sample]) -> dict[str, Any]:
    """Scores per task, with intervals; balanced means of the true/false pairs; what clean labels alone give.

    `majority` is what one constant answer would score; read every score against it.
    """
    tasks: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        tasks[sample.task].append(sample)
    table = {}
    for task, rows in tasks.items():
        numbers = _numbers(rows)
        numbers["majority"] = round(majority(rows), 6)
        numbers["by_nodes"] = by_nodes(rows)
        clean = [row for row in rows if row.label_issue is None]
        if len(clean) != len(rows):
            numbers["clean_labels"] = _numbers(clean)
        table[task] = numbers
    result: dict[str, Any] = {"tasks": table}
    pairs = {name: pair for name, pair in BALANCED.items() if all(task in table for task in pair)}
    if pairs:
        result["balanced"] = {
            name: round((table[a]["score"] + table[b]["score"]) / 2, 6) for name, (a, b) in pairs.items()
        }
    result["mean_over_tasks"] = round(sum(t["score"] for t in table.values()) / len(table), 6) if table else 0.0
    result["questions"] = len(samples)
    result["errors"] = sum(bool(s.error) for s in samples)
    result["milliseconds_per_question"] = (
        round(sum(s.milliseconds for s in samples) / len(samples), 3) if samples else 0.0
    )
    return result
