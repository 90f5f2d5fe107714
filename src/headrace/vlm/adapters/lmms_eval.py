"""lmms-eval: a task folder for any of our data sets, and our models under the entry point `lmms_eval.models`.

    headrace vqa export --to lmms-eval --task flowlearn/sim-word --data charts --out tasks
    lmms_eval --model headrace --model_args source=MODEL,prune=flowcut,keep=64 \\
        --include_path tasks --tasks flowlearn_sim_word

`prune` and `keep` belong into `model_args`: lmms-eval's response cache is keyed by them. Written for lmms-eval 0.7.
"""

import json
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.load import require_images
from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.datasets.flowlearn.records import Question
from headrace.vlm.vqa_data import TaskSet

PARTS = ("link_f1", "contains", "within_one", "rouge_l", "exact")
_UTILS = """# Written by headrace: everything is in the library, so that lmms-eval and `headrace vqa` give one number.
from headrace.vlm.adapters.lmms_eval import doc_to_messages, doc_to_text, doc_to_visual, process_results
"""


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="headrace", chat_class_path="headrace.vlm.adapters.lmms_eval_model.HeadraceModel")


def task_name(tasks: TaskSet, task: str | None = None) -> str:
    """Name of the group, or of one of its tasks."""
    parts = [part for part in tasks.name.strip("/").split("/") if part != "all"]
    parts = parts[:2] if parts[0] == "flowlearn" else parts[:1]
    return "_".join([*parts, *([task] if task else [])]).replace("-", "_")


def document(question: Question, data: Path, prompts: PromptSet) -> dict[str, str]:
    """One row of a task's data: all texts, and the whole record, so that scoring needs nothing else."""
    return {
        "uid": question.uid,
        "image_path": str((data / question.image).resolve()),
        "prompt": prompts.ask(question),
        "answer": question.answer,
        "record": question.to_json(),
    }


def doc_to_visual(doc: dict[str, str]) -> list[Any]:
    """The picture."""
    from PIL import Image

    with Image.open(doc["image_path"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, str]) -> str:
    """The prompt."""
    return doc["prompt"]


def doc_to_messages(doc: dict[str, str]) -> list[dict[str, Any]]:
    """Picture and prompt as one user turn."""
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": doc["prompt"]}]
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Our scorer's verdict on one answer, by metric."""
    from headrace.datasets.flowlearn.score import score_answer
    from headrace.datasets.flowlearn.tasks import TASKS
    from headrace.datasets.flowvqa import score_flowvqa

    question = Question.from_json(doc["record"])
    if question.dataset == "flowvqa":
        verdict = score_flowvqa(question, results[0])
    else:
        verdict = score_answer(TASKS[question.task], results[0], question.answer)
    kept = {name: verdict.parts[name] for name in PARTS if name in verdict.parts}
    return {"score": verdict.score, "parsed": float(verdict.parsed), **kept}


def _yaml(name: str, rows: Path, new_tokens: int, metrics: list[str]) -> str:
    lines = [
        f"task: {name}",
        "dataset_path: json",
        "dataset_kwargs:",
        "  data_files:",
        f"    test: {json.dumps(str(rows.resolve()))}",
        "test_split: test",
        "output_type: generate_until",
        "doc_to_visual: !function utils.doc_to_visual",
        "doc_to_text: !function utils.doc_to_text",
        "doc_to_messages: !function utils.doc_to_messages",
        'doc_to_target: "answer"',
        "process_results: !function utils.process_results",
        "generation_kwargs:",
        f"  max_new_tokens: {new_tokens}",
        "  temperature: 0",
        "  do_sample: false",
        "metric_list:",
    ]
    for metric in metrics:
        lines += [f"  - metric: {metric}", "    aggregation: mean", "    higher_is_better: true"]
    return "\n".join([*lines, "metadata:", "  version: 1.0"]) + "\n"


def write_task_folder(tasks: TaskSet, data: Path, out: Path, *, prompts: PromptSet) -> str:
    """Write a folder for `--include_path`: one task per kind of question and a group over them.

    Args:
        tasks: Questions.
        data: Folder of their pictures; absolute paths to them are written.
        out: Folder to write.
        prompts: Wording.

    Returns:
        The group's name.

    Raises:
        FileNotFoundError: Pictures are missing; they are named.
    """
    require_images(data, tasks.questions)
    folder = out / task_name(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(_UTILS, encoding="utf-8")
    kinds: dict[str, list[Question]] = {}
    for question in tasks.questions:
        kinds.setdefault(question.task, []).append(question)
    names = []
    for kind, questions in kinds.items():
        rows = folder / f"{kind}.jsonl"
        documents = [json.dumps(document(q, data, prompts), ensure_ascii=False) for q in questions]
        rows.write_text("\n".join(documents) + "\n", encoding="utf-8")
        name, first = task_name(tasks, kind), document(questions[0], data, prompts)
        metrics = list(process_results(first, [questions[0].answer]))
        (folder / f"{kind}.yaml").write_text(_yaml(name, rows, tasks.new_tokens[kind], metrics), encoding="utf-8")
        names.append(name)
    group = task_name(tasks)
    listed = "\n".join(f"  - {name}" for name in names)
    (folder / "_group.yaml").write_text(f"group: {group}\ntask:\n{listed}\n", encoding="utf-8")
    return group
