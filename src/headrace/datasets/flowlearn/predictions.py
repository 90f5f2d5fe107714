"""Prediction files as the authors released them: one JSON object, picture name to `prediction` and `reference`."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from headrace.datasets.flowlearn.score import Profile, Score, Verdict, score_answer, summarise
from headrace.datasets.flowlearn.tasks import TASKS, Task


class Prediction(NamedTuple):
    """One row: the picture's file name, the model's raw answer, the label."""

    image: str
    answer: str
    reference: str


def as_text(value: Any) -> str:
    """An answer in whatever JSON form as text; null is empty.

    A list gives its last text: the scientific subset's OCR labels are PaddleOCR's `[box, [text, confidence]]`.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        flat = [item for item in _flatten(value) if isinstance(item, str)]
        return flat[-1] if flat else " ".join(str(item) for item in _flatten(value))
    return json.dumps(value)


def _flatten(value: Any) -> list[Any]:
    return [x for item in value for x in _flatten(item)] if isinstance(value, list) else [value]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def read_predictions(path: Path) -> list[Prediction]:
    """Read a released prediction file, in its order. A row without an answer is kept as an empty answer.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file; says what was found instead.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no predictions file {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_twins)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); wanted an object: picture name to prediction") from error
    except KeyError as error:
        raise ValueError(
            f"{path} names {error} twice, so that one answer would be lost; give each its own name"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; wanted an object: picture name to prediction")
    rows = []
    for image, row in data.items():
        if not isinstance(row, dict) or "reference" not in row:
            raise ValueError(f"{path}: {image!r} needs the keys prediction and reference, got {json.dumps(row)[:80]}")
        rows.append(Prediction(image, as_text(row.get("prediction")), as_text(row["reference"])))
    return rows


def task_of_file(path: Path) -> Task | None:
    """The task that a released file's name tells (`gpt4v_Num_Nodes_2-shot.json`), or None."""
    found = [task for task in TASKS.values() if re.search(rf"(^|_){re.escape(task.released)}(_|\.|$)", path.name)]
    return found[0] if len(found) == 1 else None


def score_predictions(rows: list[Prediction], task: Task, *, profile: Profile = "paper") -> tuple[Score, list[Verdict]]:
    """Score every row; nothing is dropped."""
    verdicts = [score_answer(task, row.answer, row.reference, profile=profile) for row in rows]
    return summarise(verdicts), verdicts
