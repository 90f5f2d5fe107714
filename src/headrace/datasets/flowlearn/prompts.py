"""What a model is told for each task. Our own wording, or a user's file; the hash of the wording goes into results."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headrace.datasets.flowlearn.records import Question
from headrace.datasets.json_file import read_object

_JUDGE = "Is this statement about the flowchart correct? {question} Reply with true or false only."
_DEFAULT = {
    "num_nodes": "The picture shows a flowchart. Count its boxes that hold text. Reply with the number only.",
    "num_arrows": "The picture shows a flowchart. Count its arrows. Reply with the number only.",
    "ocr": "One box of this flowchart is framed in red. Reply with exactly the text in it, nothing else.",
    "true_a_to_b": _JUDGE,
    "false_a_to_b": _JUDGE,
    "true_between": _JUDGE,
    "false_between": _JUDGE,
    "true_statement": _JUDGE,
    "false_statement": _JUDGE,
    "mermaid": "Write this flowchart as Mermaid code: one line entity0(text) for each box, then one line per arrow, "
    "such as entity0 --> entity1. Reply with the code only.",
    "description": "Describe every arrow of this flowchart with one sentence of the form: X points to Y.",
    "caption": "Write a caption for this figure.",
}
_SHORT = {
    "num_nodes": "nodes?", "num_arrows": "arrows?", "ocr": "red?", "mermaid": "mermaid:", "description": "describe:",
    "caption": "caption:", "true_a_to_b": "{question}", "false_a_to_b": "{question}", "true_between": "{question}",
    "false_between": "{question}", "true_statement": "{question}", "false_statement": "{question}",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Texts by task; `{question}` stands for the question's own text.

    A task that is not listed is asked with the question's text alone, which is what data sets with free questions want.
    """

    name: str = "headrace-1"
    texts: dict[str, str] = field(default_factory=lambda: dict(_DEFAULT))

    def ask(self, question: Question) -> str:
        """The text that goes to the model with the picture."""
        return self.texts.get(question.task, "{question}").replace("{question}", question.question)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change with any text."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


PROMPT_SETS = {
    "headrace-1": PromptSet(),
    "short-1": PromptSet(name="short-1", texts=_SHORT),
}


def find_prompts(name: str) -> PromptSet:
    """A set by name, or from a JSON file: task to text.

    Raises:
        ValueError: Neither a known name nor a readable file of that form.
    """
    if name in PROMPT_SETS:
        return PROMPT_SETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"unknown prompt set {name!r} (known: {', '.join(PROMPT_SETS)}, or a JSON file: task to text)")
    texts = read_object(path, wanted="an object: task to text", hint="it must hold one object: task to text")
    wrong = [task for task, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{path}: the text of {wrong[0]!r} must be a string, got {texts[wrong[0]]!r}")
    return PromptSet(name=path.name, texts=texts)
