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


def generate(
    *,
    count: int,
    out: Path,
    seed: int = 0,
    first: int = 0,
    variant: Literal["word", "char"] = "word",
    profile: Literal["clean", "released"] = "clean",
    split: Literal["train", "test"] = "test",
    renderer: Literal["auto", "mermaid", "graphviz", "pillow"] = "auto",
    nodes: int | None = None,
    wordlist: Path | None = None,
) -> int:
    """Generate charts with questions like FlowLearn's simulated subset; the same seed gives the same set everywhere.

    Args:
        count: Number of charts.
        out: Folder for pictures, questions.jsonl and the release's own file layout.
        seed: Base seed.
        first: Number of the first chart, so that train and test do not overlap.
        variant: `word` labels and three arrow styles, or `char` labels and thick arrows.
        profile: `clean` labels, or `released` with the original's known flaws, each marked.
        split: Name of the split.
        renderer: Mermaid in Chromium where it can run, else Graphviz, else Pillow.
        nodes: Fixed number of nodes instead of 3 to 10.
        wordlist: Text file with one word per line for the labels instead of made-up words.
    """
    from tqdm import tqdm

    from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset

    config = GenerateConfig(
        count=count,
        seed=seed,
        first=first,
        variant=variant,
        protocol=profile,
        split=split,
        renderer=renderer,
        nodes=nodes,
    )
    words = None
    if wordlist is not None:
        words = [word for word in wordlist.read_text(encoding="utf-8").split() if 2 <= len(word) <= 20]
        if not words:
            raise ValueError(f"{wordlist} holds no word of 2 to 20 letters")
    with tqdm(total=count, unit="chart", file=sys.stderr) as bar:
        path = write_dataset(config, out, words=words, progress=lambda done: bar.update(done - bar.n))
    print(path)
    return 0
