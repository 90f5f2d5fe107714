"""Sweep pruning methods and budgets over one open model: scores by the runner, prefill times by repeated calls."""

import json
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.vlm.vqa_data import TaskSet
from headrace.vlm.vqa_model import note_kept, pruning_identity, pruning_of, set_pruning, token_counts
from headrace.vlm.vqa_run import PICTURES_FILE, groups_of, run, run_identity
from headrace.vlm.vqa_samples import Sample, write_json

PREFILL_FILE = "prefill.json"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to sweep.

    Attributes:
        methods: Pruning methods by name, or JSON files of all settings, whose budget `keep` replaces.
        keep: Budgets: tokens, or shares below 1.
        limit: Questions per task.
        repeats: Timed calls per setting, after `warmup` untimed ones; each reads another picture.
    """

    methods: tuple[str, ...]
    keep: tuple[float, ...]
    limit: int | None = None
    repeats: int = 20
    warmup: int = 5

    def __post_init__(self) -> None:
        if not self.methods or not self.keep:
            raise ValueError("a sweep needs at least one method and one budget")
        if self.repeats < 1 or self.warmup < 0:
            raise ValueError(f"repeats must be at least 1 and warmup not negative, got {self.repeats}, {self.warmup}")
        labels = [label for label, _ in self.settings()]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise ValueError(f"two settings would be written to one folder {twice!r}; name each method and budget once")

    def settings(self) -> list[tuple[str, Any]]:
        """Folder name and pruning of every point; the first is no pruning."""
        points: list[tuple[str, Any]] = [("full", None)]
        named = [(Path(m).stem if m.endswith(".json") else m, m) for m in self.methods]
        points += [(f"{name}-{k:g}", pruning_of(m, k)) for name, m in named for k in self.keep]
        return points


def time_prefill(
    model: Any,
    tasks: TaskSet,
    data: Path,
    prompts: PromptSet,
    *,
    warmup: int,
    repeats: int,
    limit: int | None = None,
    without: Collection[str] = (),
) -> list[float]:
    """Milliseconds of encoding a picture and reading one question up to the first token, once per picture in turn.

    Pictures named in `without` are left out, and those that only questions beyond `limit` are about.

    Raises:
        ValueError: No picture is left.
    """
    questions = [group.questions[0] for group in groups_of(tasks, limit=limit) if group.image not in without]
    if not questions:
        raise ValueError("the model failed on every picture, so that there is nothing to time; see the errors above")
    times = []
    for index in range(warmup + repeats):
        question = questions[index % len(questions)]
        started = time.perf_counter()
        model.answer(data / question.image, [prompts.ask(question)], max_new_tokens=1)
        if index >= warmup:
            times.append(1000 * (time.perf_counter() - started))
    return times


def kept_of(model: Any) -> dict[str, Any]:
    """Visual tokens before and after pruning in the last call, and the share that stayed."""
    before, after = token_counts(model)
    return {"tokens_before": before, "tokens_kept": after, "share": round(after / before, 6) if before else 1.0}


def sweep(
    config: SweepConfig,
    tasks: TaskSet,
    model: Any,
    *,
    name: str,
    data: Path,
    out: Path,
    prompts: PromptSet,
    split: str = "test",
    progress: Callable[[str, list[Sample]], None] | None = None,
) -> list[Path]:
    """Run every setting into a folder of its own, resuming what is there, and time its prefill.

    Settings are timed one after the other in one process, so a machine that is busy disturbs all alike; the files keep
    every single time.

    Args:
        config: Methods and budgets.
        tasks: Questions.
        model: An open model that takes `pruning`.
        name: The model's name with fingerprint, stored with results.
        data, out, prompts, split: As for `vqa_run.run`.
        progress: Called with the folder's name and new samples.

    Returns:
        The run folders, the unpruned one first.
    """
    folders = []
    for label, pruning in config.settings():
        folder = out / label
        set_pruning(model, pruning)
        identity = run_identity(tasks, prompts, model=name, pruning=pruning_identity(pruning), data=data, split=split)
        notes = folder / PICTURES_FILE

        def note(opened: Any, image: str, notes: Path = notes) -> None:
            note_kept(opened, data, image, notes)

        def tell(samples: list[Sample], label: str = label) -> None:
            if progress:
                progress(label, samples)

        samples = run(tasks, lambda: model, data=data, out=folder, identity=identity, prompts=prompts,
                      limit=config.limit, after_picture=note, progress=tell)  # fmt: skip
        failed = {sample.image for sample in samples if sample.error}
        times = time_prefill(model, tasks, data, prompts, warmup=config.warmup, repeats=config.repeats,
                             limit=config.limit, without=failed)  # fmt: skip
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        facts = {"median_ms": statistics.median(times), "quartiles_ms": [low, high], "times_ms": times}
        write_json(folder / PREFILL_FILE, {**facts, **kept_of(model)})
        folders.append(folder)
    set_pruning(model, None)
    return folders


def sweep_table(folders: list[Path]) -> list[dict[str, Any]]:
    """One row per setting: kept tokens, mean score over tasks, failed answers, prefill time, speed-up."""
    rows: list[dict[str, Any]] = []
    for folder in folders:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        prefill = json.loads((folder / PREFILL_FILE).read_text(encoding="utf-8"))
        base = rows[0]["prefill_ms"] if rows else prefill["median_ms"]
        rows.append({
            "setting": folder.name, "tokens": prefill["tokens_kept"], "of": prefill["tokens_before"],
            "mean_score": results["mean_over_tasks"], "errors": results["errors"],
            "prefill_ms": round(prefill["median_ms"], 2), "times_faster": round(base / prefill["median_ms"], 3),
            **{task: numbers["score"] for task, numbers in results["tasks"].items()},
        })  # fmt: skip
    return rows
