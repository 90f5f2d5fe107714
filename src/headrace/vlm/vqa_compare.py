"""Two runs on the same questions: paired differences with intervals, per task."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from headrace.datasets.flowlearn.intervals import PairedDifference, paired_difference
from headrace.vlm.vqa_samples import Sample, read_samples


class Comparison(NamedTuple):
    """B against A.

    Attributes:
        tasks: Per task: mean of A, mean of B, the paired difference. `mermaid:link_f1` and the like are parts.
        common: Questions that both runs answered.
        only_a, only_b: Questions in one run only; they are left out.
    """

    tasks: dict[str, tuple[float, float, PairedDifference]]
    common: int
    only_a: int
    only_b: int


def compare(a: Path, b: Path) -> Comparison:
    """Compare two run folders or samples files; questions on one picture are drawn together in the bootstrap.

    Raises:
        FileNotFoundError: A run is not there.
        ValueError: No common question, or the runs hold another question or reference under one name.
    """
    left, right = ({s.uid: s for s in read_samples(path)} for path in (a, b))
    uids = [uid for uid in left if uid in right]
    if not uids:
        raise ValueError(f"{a} and {b} have no question in common")
    asked = [{uid: (s.question, s.reference) for uid, s in side.items()} for side in (left, right)]
    changed = [uid for uid in uids if asked[0][uid] != asked[1][uid]]
    if changed:
        raise ValueError(
            f"{len(changed)} questions or references differ between {a} and {b}, first {changed[0]}; not the same data"
        )
    columns: dict[str, list[tuple[Sample, Sample]]] = defaultdict(list)
    for uid in uids:
        columns[left[uid].task].append((left[uid], right[uid]))
    tasks = {}
    for task, pairs in columns.items():
        tasks[task] = _difference(pairs, None)
        for part in ("link_f1",):
            if all(part in s.parts for pair in pairs for s in pair):
                tasks[f"{task}:{part}"] = _difference(pairs, part)
    every = [pair for pairs in columns.values() for pair in pairs]
    if len(columns) > 1:
        tasks["all questions"] = _difference(every, None)
    return Comparison(tasks, len(uids), len(left) - len(uids), len(right) - len(uids))


def _difference(pairs: list[tuple[Sample, Sample]], part: str | None) -> tuple[float, float, PairedDifference]:
    a, b = ([s.score if part is None else s.parts[part] for s in side] for side in zip(*pairs, strict=True))
    clusters = [x.image for x, _ in pairs]
    return sum(a) / len(a), sum(b) / len(b), paired_difference(a, b, clusters=clusters)


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """JSON-ready form."""
    return {
        "common": comparison.common,
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "tasks": {
            task: {
                "a": round(a, 6), "b": round(b, 6), "difference": round(d.difference, 6),
                "interval": [round(end, 6) for end in d.interval], "better": d.better, "worse": d.worse,
                "p_value": round(d.p_value, 6), "count": d.count,
            }
            for task, (a, b, d) in comparison.tasks.items()
        },
    }  # fmt: skip
