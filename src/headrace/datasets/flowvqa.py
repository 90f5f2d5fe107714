"""FlowVQA (Findings of ACL 2024): 2,272 flowcharts with free questions and three reference answers each.

The paper scores with a language model as judge. Offline we report token overlap (ROUGE-L, best of the references) and
normalised equality; the judge's figure is not comparable with either.
"""

import re
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowlearn.records import Question
from headrace.datasets.flowlearn.score import Verdict, rouge_l
from headrace.datasets.json_file import read_json

TASKS = ("fact_retrieval", "applied_scenario", "flow_referential", "topological")
NEW_TOKENS = 100


def task_of(kind: str) -> str:
    """A question type as the files write it (`Fact Retrieval`, `flow_referential_2`) as one of `TASKS`.

    Raises:
        ValueError: Another type.
    """
    key = re.sub(r"[^a-z]+", "_", kind.lower()).strip("_")
    for task in TASKS:
        if key.startswith(task) or key.startswith(task.split("_")[0]):
            return task
    raise ValueError(f"unknown FlowVQA question type {kind!r} (known: {', '.join(TASKS)})")


def repair_mermaid(code: str) -> str:
    """The release's `mermaid` fields carry stray backticks; the code without them."""
    return re.sub(r"`{1,3}(?:mermaid)?", "", code or "").strip()


def load_flowvqa(folder: Path, *, split: str = "test") -> list[Question]:
    """All questions of one split.

    Args:
        folder: Holds `<split>.json` (an object or list of charts) and `images/<key>.png` (or jpg, jpeg).
        split: Name of the split.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, or an unknown question type.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; wanted FlowVQA's {split}.json beside images/")
    data = read_json(path, hint="download it again")
    charts = list(data.values()) if isinstance(data, dict) else data
    if not isinstance(charts, list) or not all(_is_chart(chart, named=isinstance(data, dict)) for chart in charts):
        raise ValueError(f"{path}: every chart needs the keys key and qa, and every question in qa the key Q")
    names = list(data) if isinstance(data, dict) else [str(chart["key"]) for chart in charts]
    found: list[Question] = []
    for name, chart in zip(names, charts, strict=True):
        found += _chart_questions(folder, str(chart.get("key", name)), chart, split)
    return found


def _is_chart(chart: Any, *, named: bool) -> bool:
    if not isinstance(chart, dict) or not isinstance(chart.get("qa"), dict) or not (named or "key" in chart):
        return False
    return all(isinstance(row, dict) and "Q" in row for row in chart["qa"].values())


def _chart_questions(folder: Path, key: str, chart: dict[str, Any], split: str) -> list[Question]:
    names = [f"images/{key}{end}" for end in (".png", ".jpg", ".jpeg")]
    image = next((name for name in names if (folder / name).is_file()), names[0])
    graph = parse_mermaid(repair_mermaid(chart.get("mermaid", ""))).graph
    rows = []
    for number, row in chart["qa"].items():
        answers = [str(row[name]) for name in ("A1", "A2", "A3") if row.get(name)]
        meta: dict[str, Any] = {"answers": answers, "title": chart.get("title", "")}
        if graph.nodes:
            meta["graph"] = graph.to_dict()
        rows.append(
            Question(
                uid=f"flowvqa/all/{split}/{key}/{number}",
                dataset="flowvqa",
                variant="all",
                split=split,
                image=image,
                task=task_of(row.get("type", "fact_retrieval")),
                question=str(row["Q"]),
                answer=answers[0] if answers else "",
                meta=meta,
            )
        )
    return rows


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def score_flowvqa(question: Question, answer: str) -> Verdict:
    """Best ROUGE-L over the references; `exact` and `contains` beside it."""
    references = question.meta.get("answers") or [question.answer]
    got = _plain(answer)
    exact = float(any(got == _plain(text) for text in references)) if got else 0.0
    contains = float(any(_plain(text) and _plain(text) in got for text in references))
    overlap = max(rouge_l(answer, text) for text in references)
    return Verdict(overlap, bool(got), answer.strip()[:200], {"exact": exact, "contains": contains})
