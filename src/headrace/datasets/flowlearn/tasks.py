"""The tasks of FlowLearn: their names here and in the authors' files, and what kind of answer each wants."""

import difflib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "count", "truth", "mermaid", "description", "caption"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: The name used by `headrace` commands.
        released: The name in the authors' files and in their prediction file names.
        kind: How an answer is read and scored.
        new_tokens: Longest answer [tokens].
        boxed: Whether the picture is the one with a red rectangle around a node.
        subset: Which of FlowLearn's subsets has the task.
    """

    name: str
    released: str
    kind: Kind
    new_tokens: int = 100
    boxed: bool = False
    subset: Literal["sim", "sci", "both"] = "sim"


_ALL = (
    Task(name="num_nodes", released="Num_Nodes", kind="count"),
    Task(name="num_arrows", released="Num_Arrows", kind="count"),
    Task(name="ocr", released="ocr", kind="text", boxed=True, subset="both"),
    Task(name="true_a_to_b", released="Flowchart-isTrue-AtoB", kind="truth"),
    Task(name="false_a_to_b", released="Flowchart-isFalse-AtoB", kind="truth"),
    Task(name="true_between", released="Flowchart-isTrue-betweenAB", kind="truth"),
    Task(name="false_between", released="Flowchart-isFalse-betweenAB", kind="truth"),
    Task(name="mermaid", released="Flowchart-to-Mermaid", kind="mermaid", new_tokens=500),
    Task(name="description", released="Flowchart-to-Description", kind="description", new_tokens=500),
    Task(name="true_statement", released="Flowchart-isTrue", kind="truth", subset="sci"),
    Task(name="false_statement", released="Flowchart-isFalse", kind="truth", subset="sci"),
    Task(name="caption", released="Flowchart-to-Caption", kind="caption", new_tokens=500, subset="sci"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
SIM_TASKS = tuple(task.name for task in _ALL if task.subset in ("sim", "both"))
SCI_TASKS = tuple(task.name for task in _ALL if task.subset in ("sci", "both"))
# Pairs whose mean is the balanced accuracy: answering one word always gives 0.5.
BALANCED = {
    "a_to_b": ("true_a_to_b", "false_a_to_b"),
    "between": ("true_between", "false_between"),
    "statement": ("true_statement", "false_statement"),
}
# What a user may also write: the subset's short names.
_SHORT = {
    "is_true": "true_statement", "is_false": "false_statement", "true": "true_statement", "false": "false_statement",
    "statement_true": "true_statement", "statement_false": "false_statement", "sci_true": "true_statement",
    "sci_false": "false_statement", "sci_ocr": "ocr", "sci_caption": "caption", "to_caption": "caption",
    "to_mermaid": "mermaid", "to_description": "description",
}  # fmt: skip


def find_task(name: str) -> Task:
    """The task of this name, or of the authors' name for it (`Flowchart-isTrue-AtoB`), in any case.

    Raises:
        ValueError: No such task; names a near match and lists all.
    """
    key = name.strip().lower().replace("-", "_")
    spelled = {task.released.lower().replace("-", "_"): task.name for task in _ALL} | _SHORT
    key = spelled.get(key, key)
    if key in TASKS:
        return TASKS[key]
    near = difflib.get_close_matches(key, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown FlowLearn task {name!r}{hint} (known: {', '.join(TASKS)})")
