"""From a task's path such as `flowlearn/sim-word/num_nodes` to its questions and their scorer."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from headrace.datasets import flowvqa
from headrace.datasets.flowlearn.load import VARIANTS, load_questions
from headrace.datasets.flowlearn.records import Question
from headrace.datasets.flowlearn.score import READING, Profile, Verdict, score_answer
from headrace.datasets.flowlearn.tasks import TASKS, find_task

Scorer = Callable[[Question, str], Verdict]


class TaskSet(NamedTuple):
    """Questions to ask.

    Attributes:
        name: The path that was asked for.
        questions: In the data set's order.
        scorer: Verdict on an answer to one of them.
        new_tokens: Longest answer by task [tokens].
        reading: Version of the scorer, stored with results.
    """

    name: str
    questions: list[Question]
    scorer: Scorer
    new_tokens: dict[str, int]
    reading: str


def load_task(name: str, data: Path, *, split: str = "test", profile: Profile = "paper") -> TaskSet:
    """Read the questions of a task path.

    Args:
        name: `flowlearn/VARIANT/TASK`, `flowlearn/VARIANT`, `flowvqa` or `flowvqa/TASK`; VARIANT is sim-word, sim-char
            or sci; a missing TASK, or `all`, means all tasks.
        data: Folder of the data set.
        split: Which split.
        profile: How FlowLearn's answers are read.

    Raises:
        ValueError: No such data set, variant or task, or the data holds no such question.
        FileNotFoundError: The data is not there.
    """
    parts = name.strip("/").split("/")
    wanted = parts[-1] if len(parts) == (3 if parts[0] == "flowlearn" else 2) else "all"
    if parts[0] == "flowlearn":
        variant = parts[1] if len(parts) > 1 else "sim-word"
        if variant not in VARIANTS:
            raise ValueError(f"unknown FlowLearn variant {variant!r} (known: {', '.join(VARIANTS)})")
        task = None if wanted == "all" else find_task(wanted).name
        questions = load_questions(data, variant=variant, split=split)
        tokens, reading = {t.name: t.new_tokens for t in TASKS.values()}, f"{READING}/{profile}"

        def scorer(question: Question, answer: str) -> Verdict:
            return score_answer(TASKS[question.task], answer, question.answer, profile=profile)

    elif parts[0] == "flowvqa":
        task = None if wanted == "all" else flowvqa.task_of(wanted)
        questions, scorer = flowvqa.load_flowvqa(data, split=split), flowvqa.score_flowvqa
        tokens, reading = dict.fromkeys(flowvqa.TASKS, flowvqa.NEW_TOKENS), "flowvqa-reading-1"
    else:
        near = difflib.get_close_matches(parts[0], ("flowlearn", "flowvqa"), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data set {parts[0]!r}{hint} (known: flowlearn, flowvqa)")
    chosen = [q for q in questions if task is None or q.task == task]
    if not chosen:
        there = ", ".join(sorted({q.task for q in questions})) or "no question at all"
        raise ValueError(f"{data} holds no question for {name!r} in the split {split!r}; it holds {there}")
    return TaskSet(name, chosen, scorer, tokens, reading)
