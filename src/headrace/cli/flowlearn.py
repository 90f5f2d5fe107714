"""`headrace flowlearn ...`: score released predictions and generate an equivalent of the simulated set."""

import json
import sys
from pathlib import Path
from typing import Any, Literal


def score(
    file: Path, /, *, task: str = "", profile: Literal["paper", "lenient"] = "paper", show_unparsed: int = 3
) -> int:
    """Score a predictions file in the layout that FlowLearn's authors released; prints one JSON object.

    Args:
        file: JSON object, picture name to `prediction` and `reference`.
        task: num_nodes, num_arrows, ocr, true_a_to_b, false_a_to_b, true_between, false_between, mermaid, description,
            or true_statement, false_statement, caption of the scientific subset. Taken from a released file's name
            when left out.
        profile: `paper` is the authors' protocol; `lenient` also reads number words, yes/no and stray punctuation.
        show_unparsed: How many answers that could not be read are shown on standard error.
    """
    from headrace.datasets.flowlearn.predictions import read_predictions, score_predictions, task_of_file
    from headrace.datasets.flowlearn.score import READING
    from headrace.datasets.flowlearn.tasks import TASKS, find_task

    chosen = find_task(task) if task else task_of_file(file)
    if chosen is None:
        raise ValueError(f"the name {file.name!r} does not tell the task; give --task, one of {', '.join(TASKS)}")
    rows = read_predictions(file)
    result, verdicts = score_predictions(rows, chosen, profile=profile)
    report: dict[str, Any] = {
        "task": chosen.name,
        "score": round(result.score, 6),
        "interval": [round(end, 6) for end in result.interval],
        "count": result.count,
        "unparsed": result.unparsed,
        "profile": profile,
        "reading": READING,
    }
    for name, (mean, interval) in result.parts.items():
        report[name] = round(mean, 6)
        report[f"{name}_interval"] = [round(end, 6) for end in interval]
    print(json.dumps(report, indent=2))
    unread = [row for row, verdict in zip(rows, verdicts, strict=True) if not verdict.parsed]
    for row in unread[:show_unparsed]:
        print(f"not read: {row.image}: {row.answer[:120]!r}", file=sys.stderr)
    return 0 if rows else 1
