"""Ask a model a data set's questions: grouped and sharded by picture, resumed by question, scored as it goes."""

import hashlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from headrace.datasets.flowlearn.load import require_images
from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.datasets.flowlearn.records import Question
from headrace.datasets.flowlearn.score import Verdict
from headrace.vlm.vqa_data import TaskSet
from headrace.vlm.vqa_results import results_of
from headrace.vlm.vqa_samples import (
    RESULTS_FILE,
    SAMPLES_FILE,
    Sample,
    SampleWriter,
    claim_run,
    identity_hash,
    read_samples,
    require_same_run,
    write_json,
)
from headrace.vlm.vqa_shots import Shots, require_worked

PICTURES_FILE = "pictures.jsonl"


class Answerer(Protocol):
    """What a run needs of a model."""

    def answer(self, images: Any, questions: list[str], *, max_new_tokens: Any) -> list[str]:
        """One answer per question about the same picture, which is encoded once; `max_new_tokens` has one per question.

        To be shown worked examples it must also take `worked`, see `auto.VisionLanguageModel`.
        """


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`; a picture's part follows from its name alone."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard is i/n with 0 <= i < n, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `i/n`."""
        try:
            index, count = (int(part) for part in text.split("/"))
        except ValueError as error:
            raise ValueError(f"a shard is written i/n, such as 0/4, got {text!r}") from error
        return cls(index=index, count=count)

    def holds(self, image: str) -> bool:
        """Whether this part asks about `image`."""
        return int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big") % self.count == self.index

    @property
    def file(self) -> str:
        """Name of this part's samples file."""
        return SAMPLES_FILE if self.count == 1 else f"samples-{self.index}-of-{self.count}.jsonl"

    @property
    def finished(self) -> str:
        """Name of the file that says that this part was answered to its end, and with which `limit`."""
        return Path(self.file).stem + ".finished"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Questions that are asked in one call: same picture, and same pictures of worked examples before it."""

    image: str
    questions: tuple[Question, ...]
    examples: tuple[Path, ...] = ()


def groups_of(
    tasks: TaskSet, *, limit: int | None = None, shard: Shard = Shard(), shots: Shots | None = None
) -> list[Group]:
    """Questions by picture in the data set's order; `limit` counts questions per task before sharding.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    taken: dict[str, int] = {}
    buckets: dict[tuple[str, tuple[Path, ...]], list[Question]] = {}
    for question in tasks.questions:
        taken[question.task] = taken.get(question.task, 0) + 1
        if limit is not None and taken[question.task] > limit:
            continue
        if shard.holds(question.image):
            examples = shots.pictures(question.task) if shots else ()
            buckets.setdefault((question.image, examples), []).append(question)
    return [Group(image=key[0], questions=tuple(rows), examples=key[1]) for key, rows in buckets.items()]


def versions() -> dict[str, str]:
    """Versions that a score may depend on."""
    found = {"python": platform.python_version()}
    for package in ("headrace", "torch", "transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_identity(
    tasks: TaskSet,
    prompts: PromptSet,
    *,
    model: str,
    pruning: dict[str, Any] | None,
    data: Path,
    split: str,
    shots: Shots | None = None,
) -> dict[str, Any]:
    """What must be the same for answers to belong to one run; stored in `run.json`, compared on resume."""
    listed = hashlib.sha256("\n".join(q.uid + q.question + q.answer for q in tasks.questions).encode()).hexdigest()[:12]
    folder = os.path.basename(os.path.abspath(data))  # `.` has a name, too
    return {
        "task": tasks.name, "split": split, "data": folder, "data_hash": listed, "model": model,
        "prompts": prompts.name, "prompt_hash": prompts.hash, "pruning": pruning, "reading": tasks.reading,
        **({"shots": shots.identity} if shots else {}),
    }  # fmt: skip


def _ask(
    group: Group, model: Answerer, data: Path, prompts: PromptSet, tasks: TaskSet, shots: Shots | None
) -> list[Sample]:
    texts = [prompts.ask(question) for question in group.questions]
    limits = [tasks.new_tokens[question.task] for question in group.questions]
    pictures: Any = [*group.examples, data / group.image] if shots else data / group.image
    more = {"worked": [shots.turns(question.task, prompts) for question in group.questions]} if shots else {}
    started, error = time.perf_counter(), ""
    try:
        answers = model.answer(pictures, texts, max_new_tokens=limits, **more)
        if len(answers) != len(texts):
            raise ValueError(f"the model gave {len(answers)} answers to {len(texts)} questions")
    except (RuntimeError, ValueError, OSError, IndexError, KeyError, TypeError) as failure:
        answers, error = [""] * len(texts), f"{type(failure).__name__}: {failure}"[:500]
    each = 1000 * (time.perf_counter() - started) / len(texts)
    return [
        Sample.of(q, a, Verdict(0.0, False, "", {}) if error else tasks.scorer(q, a), each, error)
        for q, a in zip(group.questions, answers, strict=True)
    ]


def run(
    tasks: TaskSet,
    model: Callable[[], Answerer],
    *,
    data: Path,
    out: Path,
    identity: dict[str, Any],
    prompts: PromptSet,
    limit: int | None = None,
    shard: Shard = Shard(),
    shots: Shots | None = None,
    retry_errors: bool = False,
    after_picture: Callable[[Answerer, str], None] | None = None,
    progress: Callable[[list[Sample]], None] | None = None,
) -> list[Sample]:
    """Ask what is not answered yet and write `samples.jsonl` and `results.json`.

    Each group of answers is on disk before the next picture is opened; a run that was killed goes on where it stopped.
    A picture on which the model fails gives answers that score 0 and carry the error; the run goes on.

    Args:
        tasks: Questions and scorer.
        model: Opens the model; called only when something is left to ask.
        data: Folder of the pictures.
        out: Run folder.
        identity: From `run_identity`.
        prompts: Wording.
        limit: Questions per task.
        shard: Which part of the pictures.
        shots: Worked examples that go before every question; `identity` must name them.
        retry_errors: Ask again where the model failed.
        after_picture: Called with the model and the picture's name after each picture that was asked about; not where
            the model failed, because it then still holds what it knows of an earlier picture.
        progress: Called with the new samples of each group; first with those that were there already.

    Returns:
        All samples of this shard, in order.

    Raises:
        FileNotFoundError: Pictures are missing; they are named.
        ValueError: `out` holds another run, and says what differs; or the model takes no worked examples. Nothing is
            written before the model is open.
    """
    groups = groups_of(tasks, limit=limit, shard=shard, shots=shots)
    asked = [question for group in groups for question in group.questions]
    require_images(data, asked)
    require_same_run(out, identity)
    path = out / shard.file
    done = {s.uid: s for s in read_samples(path)} if path.is_file() else {}
    if retry_errors:
        done = {uid: sample for uid, sample in done.items() if not sample.error}
    if progress:
        progress([done[q.uid] for q in asked if q.uid in done])
    todo = [replace(group, questions=left) for group in groups
            if (left := tuple(q for q in group.questions if q.uid not in done))]  # fmt: skip
    opened = model() if todo else None
    if opened is not None and shots:
        require_worked(opened, shots.count)
    claim_run(out, identity)
    (out / shard.finished).unlink(missing_ok=True)
    writer = SampleWriter(path)
    try:
        for group in todo:
            assert opened is not None
            samples = _ask(group, opened, data, prompts, tasks, shots)
            writer.write(samples)
            done |= {sample.uid: sample for sample in samples}
            if after_picture and not samples[0].error:
                after_picture(opened, group.image)
            if progress:
                progress(samples)
    finally:
        writer.close()
    samples = [done[question.uid] for question in asked]
    if shard.count == 1:
        write_results(out, identity, samples)
    else:
        (out / shard.finished).write_text(f"limit {limit}\n")
    return samples


def write_results(out: Path, identity: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """Write `results.json` of a complete run and return it."""
    results = {"run": identity, "run_hash": identity_hash(identity), **results_of(samples), "versions": versions()}
    write_json(out / RESULTS_FILE, results)
    return results


def merge_shards(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Join the shards of a run into `samples.jsonl` and `results.json`; the shards stay.

    Raises:
        FileNotFoundError: No shards, or parts of the set are missing or were stopped before their end; names them.
        ValueError: Shards of more than one division, or asked with different limits.
    """
    paths = sorted(out.glob("samples-*-of-*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"{out} holds no shards (samples-i-of-n.jsonl)")
    counts = {path.stem.rsplit("-", 1)[1] for path in paths}
    if len(counts) > 1:
        raise ValueError(f"{out} holds shards of different divisions (of {', '.join(sorted(counts))}); keep one")
    count = int(counts.pop())
    shards = [Shard(index=i, count=count) for i in range(count)]
    missing = [s for s in shards if not (out / s.file).is_file()]
    if missing:
        raise FileNotFoundError(f"{out} lacks the shards {', '.join(f'{s.index}/{count}' for s in missing)}")
    stopped = [s for s in shards if not (out / s.finished).is_file()]
    if stopped:
        names = ", ".join(f"{s.index}/{count}" for s in stopped)
        raise FileNotFoundError(
            f"{out} holds shards that did not end: {names}; run them again, they go on where they stopped"
        )
    limits = {(out / shard.finished).read_text().strip() for shard in shards} - {""}  # empty: of an earlier version
    if len(limits) > 1:
        raise ValueError(f"{out} holds shards with different limits ({', '.join(sorted(limits))}); run them with one")
    samples = list(itertools.chain.from_iterable(read_samples(path) for path in paths))
    samples.sort(key=lambda sample: sample.uid)
    whole = out / f".{SAMPLES_FILE}.part"
    whole.unlink(missing_ok=True)
    writer = SampleWriter(whole)
    writer.write(samples)
    writer.close()
    whole.replace(out / SAMPLES_FILE)
    return write_results(out, identity, samples)


def first_prompts(questions: Iterable[Question], prompts: PromptSet) -> Iterator[tuple[str, str, str, int]]:
    """For a dry run: each task's name, first prompt, its picture, and the number of questions."""
    firsts: dict[str, Question] = {}
    counts: dict[str, int] = {}
    for question in questions:
        firsts.setdefault(question.task, question)
        counts[question.task] = counts.get(question.task, 0) + 1
    for task, question in firsts.items():
        yield task, prompts.ask(question), question.image, counts[task]
