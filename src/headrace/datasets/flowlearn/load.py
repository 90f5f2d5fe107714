"""Read FlowLearn: the dataset as users download it, the 50/100-picture selection with questions, or a generated set.

Every reader gives the same `Question` records. Labels that contradict the picture are marked, never dropped.
"""

import re
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.generate import exists_between, points_to
from headrace.datasets.flowlearn.mermaid import parse_mermaid
from headrace.datasets.flowlearn.predictions import as_text, read_predictions, task_of_file
from headrace.datasets.flowlearn.records import Graph, LabelIssue, Question
from headrace.datasets.flowlearn.tasks import TASKS, find_task
from headrace.datasets.flowlearn.write import QUESTIONS_FILE, image_paths
from headrace.datasets.json_file import read_object

VARIANTS = ("sim-word", "sim-char", "sci")
_PAIR = re.compile(r"node '(.+)' (?:to|and) node '(.+)'")  # of a statement; a label may hold an apostrophe
_SUBJECTS = {"Arrow_AtoB": "a_to_b", "Arrow_betweenAB": "between"}


def load_questions(folder: Path, *, variant: str = "sim-word", split: str = "test") -> list[Question]:
    """All questions of one variant and split, in the order of the files.

    Args:
        folder: A generated folder (`questions.jsonl`), a download of the dataset (`SimFlowchart/`, `SciFlowchart/`), or
            a selection with `questions.json` and `images/`.
        variant: `sim-word`, `sim-char` or `sci`.
        split: `test`, `train` or `support`.

    Raises:
        FileNotFoundError: The folder holds none of these; says what was looked for.
        ValueError: Unknown variant, or a file of another form.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown FlowLearn variant {variant!r} (known: {', '.join(VARIANTS)})")
    if (folder / QUESTIONS_FILE).is_file():
        lines = (folder / QUESTIONS_FILE).read_text(encoding="utf-8").split("\n")
        every = [Question.from_json(line) for line in lines if line]
        return [q for q in every if q.variant == variant and q.split == split]
    if (folder / "questions.json").is_file():
        return _selection(folder) if variant == "sim-word" and split == "test" else []
    if variant == "sci":
        return _scientific(folder, split)
    return _simulated(folder, variant.removeprefix("sim-"), split)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: not a generated folder ({QUESTIONS_FILE}), not a selection (questions.json), and not "
            "this part of the dataset. Download it with the layout kept, or run `headrace flowlearn generate`."
        )
    return read_object(path, wanted="an object keyed by picture name", hint="download it again")


def _question(variant: str, split: str, image: str, task: str, question: str, answer: str, **more: Any) -> Question:
    uid = f"flowlearn/{variant}/{split}/{Path(image).stem}/{task}"
    return Question(uid=uid, dataset="flowlearn", variant=variant, split=split, image=image, task=task,
                    question=question, answer=answer, **more)  # fmt: skip


def label_issue(task: str, a: str, b: str, graph: Graph) -> LabelIssue | None:
    """Why a false statement about `a` and `b` contradicts the picture, or None."""
    if not task.startswith("false"):
        return None
    if not {a.strip().lower(), b.strip().lower()} <= graph.label_set():
        return "mutated_label"
    reverse = (b.strip().lower(), a.strip().lower()) in graph.link_set()
    return "reverse_edge_exists" if task == "false_between" and reverse else None


def _simulated(folder: Path, variant: str, split: str) -> list[Question]:
    data = _read(folder / "SimFlowchart" / variant / "VQA" / f"{split}.json")
    name, found = f"sim-{variant}", []
    for key, entry in data.items():
        plain, boxed = image_paths(variant, Path(key).stem)  # type: ignore[arg-type]
        code = entry.get("Flowchart-to-Mermaid", "")
        graph = parse_mermaid(code).graph
        meta = {"graph": graph.to_dict()} if graph.nodes else {}
        for task in TASKS.values():
            if task.released in entry and task.subset in ("sim", "both"):
                image, answer = (boxed if task.boxed else plain), as_text(entry[task.released])
                found.append(_question(name, split, image, task.name, "", answer, meta=meta))
        for group, subject in _SUBJECTS.items():
            for truth, pair in entry.get(group, {}).items():
                task_name, a, b = f"{truth}_{subject}", pair["a"], pair["b"]
                text = (points_to if subject == "a_to_b" else exists_between)(a, b)
                issue = label_issue(task_name, a, b, graph) if graph.nodes else None
                found.append(_question(name, split, plain, task_name, text, truth, label_issue=issue, meta=meta))
    return found


def _scientific(folder: Path, split: str) -> list[Question]:
    root = folder / "SciFlowchart"
    names = {"test": ("test_vqa_query.json", "test_vqa.json"), "support": ("test_vqa_support.json",),
             "train": ("all_vqa.json",)}  # fmt: skip
    if split not in names:
        raise ValueError(f"unknown split {split!r} (known: {', '.join(names)})")
    path = next((root / name for name in names[split] if (root / name).is_file()), root / names[split][0])
    found = []
    for key, entry in _read(path).items():
        plain, boxed = f"SciFlowchart/images/{key}", f"SciFlowchart/images_ocr/{key}"
        for field, task in (("True_Statements", "true_statement"), ("False_Statements", "false_statement")):
            if entry.get(field):
                found.append(_question("sci", split, plain, task, as_text(entry[field][0]), task.split("_")[0]))
        if entry.get("Flowchart-to-Caption"):
            found.append(_question("sci", split, plain, "caption", "", as_text(entry["Flowchart-to-Caption"])))
        if entry.get("ocr"):
            found.append(_question("sci", split, boxed, "ocr", "", as_text(entry["ocr"])))
    return found


def _selection(folder: Path) -> list[Question]:
    """TextFlow's selection: six questions per chart; the statement stands behind a question of its own wording.

    Where the authors' predictions for the Mermaid task lie beside it, their references tell what is drawn.
    """
    graphs, found = _released_graphs(folder / "predictions"), []
    for key, entry in _read(folder / "questions.json").items():
        graph = graphs.get(key)
        meta = {"graph": graph.to_dict()} if graph else {}
        for row in entry["qa"].values():
            task, issue = find_task(row["type"]), None
            text = row["Q"].split("? ", 1)[-1] if task.kind == "truth" else ""
            if graph and (pair := _PAIR.search(text)):
                issue = label_issue(task.name, pair[1], pair[2], graph)
            found.append(_question("sim-word", "test", f"images/{key}.jpeg", task.name, text, row["A1"],
                                   label_issue=issue, meta=meta))  # fmt: skip
    return found


def _released_graphs(folder: Path) -> dict[str, Graph]:
    """Graphs of the `word` variant by picture stem, from the references of released Mermaid predictions."""
    found: dict[str, Graph] = {}
    for path in sorted(folder.glob("*.json")):
        task = task_of_file(path)
        if task is not None and task.name == "mermaid" and not path.name.startswith("char_"):
            graphs = {Path(row.image).stem: parse_mermaid(row.reference).graph for row in read_predictions(path)}
            found |= {key: graph for key, graph in graphs.items() if graph.nodes}
    return found


def missing_images(folder: Path, questions: list[Question]) -> list[str]:
    """Pictures that the questions name and the folder lacks, in order, each once."""
    names = dict.fromkeys(question.image for question in questions)
    return [name for name in names if not (folder / name).is_file()]


def require_images(folder: Path, questions: list[Question]) -> None:
    """Refuse to go on when pictures are missing.

    Raises:
        FileNotFoundError: Names up to ten of them and says how many there are.
    """
    missing = missing_images(folder, questions)
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise FileNotFoundError(f"{len(missing)} pictures are missing in {folder}: {shown}")
