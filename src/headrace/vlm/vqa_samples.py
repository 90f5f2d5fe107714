"""The samples file of a run: one JSON line per answered question, on disk before the next question is asked."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.records import Question
from headrace.datasets.flowlearn.score import Verdict

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answered question. `error` holds what went wrong when the model gave none."""

    uid: str
    image: str
    task: str
    question: str
    answer: str
    reference: str
    score: float
    parsed: bool
    read: str
    parts: dict[str, float] = field(default_factory=dict)
    label_issue: str | None = None
    nodes: int | None = None
    milliseconds: float = 0.0
    error: str = ""

    @classmethod
    def of(cls, question: Question, answer: str, verdict: Verdict, milliseconds: float, error: str = "") -> "Sample":
        """Put a question, its answer and the verdict together."""
        graph = question.meta.get("graph")
        return cls(
            uid=question.uid, image=question.image, task=question.task, question=question.question, answer=answer,
            reference=question.answer, score=verdict.score, parsed=verdict.parsed, read=verdict.read,
            parts=verdict.parts, label_issue=question.label_issue, nodes=len(graph["nodes"]) if graph else None,
            milliseconds=round(milliseconds, 3), error=error,
        )  # fmt: skip


def read_samples(path: Path) -> list[Sample]:
    """Samples of a file or of a run folder (its `samples.jsonl`, or its shards'); a later line replaces an earlier one.

    A last line that was cut by a crash is left out.

    Raises:
        FileNotFoundError: None there.
        ValueError: A line that is not a sample; says which.
    """
    paths = [path] if path.is_file() else [path / SAMPLES_FILE]
    if path.is_dir() and not paths[0].is_file():
        paths = sorted(path.glob("samples-*-of-*.jsonl"))
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(f"{path} holds no {SAMPLES_FILE}; run `headrace vqa run --out {path}` first")
    found: dict[str, Sample] = {}
    for one in paths:
        # not splitlines(): answers may hold other line separators, which JSON leaves as they are
        for number, line in enumerate(one.read_bytes().split(b"\n")[:-1], start=1):
            try:
                sample = Sample(**json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
                raise ValueError(f"{one}, line {number}, is not a sample ({error})") from error
            found[sample.uid] = sample
    return list(found.values())


class SampleWriter:
    """Appends samples and waits until they are on disk. Removes a half-written last line first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)
        self.file = path.open("ab")

    def write(self, samples: Iterable[Sample]) -> None:
        """Append and sync; returns when a power cut can no longer lose them."""
        for sample in samples:
            self.file.write((json.dumps(asdict(sample), ensure_ascii=False) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def identity_hash(identity: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of a run's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def require_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with another run's answers; writes nothing.

    Raises:
        ValueError: The folder belongs to a run with another model, prompt, pruning or data; names what differs.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    keys = sorted(there.keys() | identity.keys())
    differing = [f"{k}: there {there.get(k)!r}, asked {identity.get(k)!r}" for k in keys
                 if there.get(k) != identity.get(k)]  # fmt: skip
    if differing:
        raise ValueError(
            f"{folder} holds a run that differs: {'; '.join(differing)}. Choose another --out, or ask for the same."
        )


def claim_run(folder: Path, identity: dict[str, Any]) -> None:
    """Write the identity of a new run; as `require_same_run` where another one has come first."""
    require_same_run(folder, identity)
    if not (folder / RUN_FILE).is_file():
        write_json(folder / RUN_FILE, identity)


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
