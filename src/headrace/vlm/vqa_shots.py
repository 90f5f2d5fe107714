"""Few-shot prompts: worked examples before every question, drawn once per run from charts that are not asked about.

FlowLearn's own scores are 2-shot. There the last example of a true/false question always has its own answer, so that
copying it is right each time; here both questions of a pair see the same examples, false and true in turn.
"""

import hashlib
import inspect
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.load import require_images
from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.datasets.flowlearn.records import Graph, Question
from headrace.datasets.flowlearn.tasks import BALANCED
from headrace.vlm.vqa_data import TaskSet, load_task


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Worked examples of a run.

    Attributes:
        folder: Folder of their pictures.
        by_task: Task to its examples, in the order in which they are shown.
        identity: What tells them from others; stored with results.
    """

    folder: Path
    by_task: dict[str, tuple[Question, ...]]
    identity: dict[str, Any]

    @property
    def count(self) -> int:
        """Examples before each question."""
        return int(self.identity["count"])

    def pictures(self, task: str) -> tuple[Path, ...]:
        """Pictures of a task's examples."""
        return tuple(self.folder / question.image for question in self.by_task[task])

    def turns(self, task: str, prompts: PromptSet) -> list[tuple[str, str]]:
        """Question and answer of a task's examples, worded as the questions are."""
        return [(prompts.ask(question), question.answer) for question in self.by_task[task]]


def draw_shots(tasks: TaskSet, data: Path, *, count: int, folder: Path, split: str, seed: int) -> Shots:
    """Draw `count` charts in an order that follows from the seed, the same for all tasks where all have all tasks.

    A chart is never taken that is asked about: one with the same boxes and arrows, or with the same picture file.

    Args:
        tasks: What the run asks; all its questions count as asked about, whatever the run's limit and shard.
        data: Folder of the run's pictures.
        count: Examples per question.
        folder, split: Where the examples come from.
        seed: Of the draw.

    Raises:
        ValueError: `count` is below 1, or there are too few charts.
        FileNotFoundError: No such data, or pictures of the examples are missing; they are named.
    """
    if count < 1:
        raise ValueError(f"worked examples: at least 1, got {count}")
    parts = tasks.name.strip("/").split("/")
    family = "/".join(parts[:2] if parts[0] == "flowlearn" else parts[:1])
    charts: dict[str, list[Question]] = {}
    for question in load_task(family, folder, split=split).questions:
        charts.setdefault(Path(question.image).stem, []).append(question)
    order = sorted(charts)
    random.Random(seed).shuffle(order)
    asked = _marks(tasks.questions, data)
    free = [charts[name] for name in order]
    chosen: dict[str, tuple[Question, ...]] = {}
    for task in dict.fromkeys(question.task for question in tasks.questions):
        pair = next((pair for pair in BALANCED.values() if task in pair), (task, task))
        found: list[Question] = []
        for chart in free:
            wanted = pair[(len(found) + 1) % 2]
            fitting = [q for q in chart if q.task == wanted and q.label_issue is None]
            if fitting and not _marks(chart, folder) & asked:
                found.append(fitting[0])
            if len(found) == count:
                break
        if len(found) < count:
            raise ValueError(
                f"{folder} holds {len(found)} charts for {task!r} in the split {split!r} that are not asked about, "
                f"{count} are wanted; give another folder or split"
            )
        chosen[task] = tuple(found)
    require_images(folder, [question for examples in chosen.values() for question in examples])
    listed = "\n".join(f"{task} {q.uid} {q.question} {q.answer}" for task, row in chosen.items() for q in row)
    identity = {
        "count": count, "seed": seed, "from": os.path.basename(os.path.abspath(folder)), "split": split,
        "hash": hashlib.sha256(listed.encode()).hexdigest()[:12],
    }  # fmt: skip
    return Shots(folder=folder, by_task=chosen, identity=identity)


def require_worked(model: Any, count: int) -> None:
    """Find out before the first picture whether a model can be shown `count` worked examples.

    Raises:
        ValueError: It takes one picture.
    """
    if "worked" not in inspect.signature(model.answer).parameters:
        raise ValueError(f"{type(model).__name__} takes one picture, no worked examples; run without --shots")
    if hasattr(model, "require_worked"):
        model.require_worked(count)


def _marks(questions: list[Question], folder: Path) -> set[Any]:
    """What charts are known by: their boxes and arrows, and what is in their picture files."""
    found: set[Any] = set()
    for image in dict.fromkeys(question.image for question in questions):
        if (folder / image).is_file():
            found.add(hashlib.sha256((folder / image).read_bytes()).hexdigest())
    for question in {question.image: question for question in questions}.values():
        if "graph" in question.meta:
            graph = Graph.from_dict(question.meta["graph"])
            found.add((frozenset(graph.label_set()), frozenset(graph.link_set())))
    return found
