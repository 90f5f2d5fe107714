"""Generate a data folder: pictures, normalised questions, and the release's own file layout."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.datasets.flowlearn.chart_picture import draw_red_box
from headrace.datasets.flowlearn.generate import Chart, Protocol, Variant, make_chart, make_questions
from headrace.datasets.flowlearn.records import Question
from headrace.datasets.flowlearn.render import RendererName, open_renderer
from headrace.datasets.flowlearn.tasks import TASKS

QUESTIONS_FILE = "questions.jsonl"
CHARTS_FILE = "charts.jsonl"
MANIFEST_FILE = "manifest.json"
IMAGE_FOLDER = {"word": "mermaid_word", "char": "mermaid_char_v2"}
JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to generate.

    Attributes:
        count: Number of charts, at least 1.
        seed: Base seed; chart k of seed s is always the same.
        first: Number of the first chart; splits of one set use different ranges.
        variant: `word` or `char` labels.
        protocol: `clean` labels, or `released` with the original's flaws.
        split: Name of the split.
        renderer: `auto` takes Mermaid where it can run, else Graphviz, else Pillow; the manifest says which it was.
        nodes: Fixed number of nodes; drawn from 3..10 when None.
    """

    count: int
    seed: int = 0
    first: int = 0
    variant: Variant = "word"
    protocol: Protocol = "clean"
    split: Literal["train", "test"] = "test"
    renderer: RendererName = "auto"
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.first < 0:
            raise ValueError(f"first must be at least 0, got {self.first}")


def image_paths(variant: Variant, name: str) -> tuple[str, str]:
    """Where the plain and the red-box picture of a chart lie in a data folder, as in the release."""
    root = "SimFlowchart/images"
    return f"{root}/{IMAGE_FOLDER[variant]}/jpeg/{name}.jpeg", f"{root}/{variant}_TextOCR/images/{name}.jpeg"


def released_entry(questions: list[Question]) -> dict[str, Any]:
    """One chart's entry of the release's VQA file."""
    entry: dict[str, Any] = {"Arrow_AtoB": {}, "Arrow_betweenAB": {}}
    for question in questions:
        key = TASKS[question.task].released
        if question.task in ("num_nodes", "num_arrows"):
            entry[key] = int(question.answer)
        elif TASKS[question.task].kind == "truth":
            group = "Arrow_AtoB" if question.task.endswith("a_to_b") else "Arrow_betweenAB"
            a, b = question.question.split("'")[1::2]
            entry[group][question.answer] = {"a": a, "b": b}
        else:
            entry[key] = question.answer
    return entry


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def charts_of(config: GenerateConfig, words: list[str] | None = None) -> Iterator[Chart]:
    """The charts, not yet drawn."""
    for index in range(config.first, config.first + config.count):
        yield make_chart(config.seed, index, variant=config.variant, nodes=config.nodes, words=words)


def write_dataset(
    config: GenerateConfig,
    out: Path,
    *,
    words: list[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Draw all charts and write the folder; pictures that are there already and belong to the same set are kept.

    Args:
        config: What to generate.
        out: Folder; made if missing.
        words: Words for the labels instead of pseudo-words.
        progress: Called with the number of finished charts.

    Returns:
        Path of the questions file, written last: its presence marks completeness.

    Raises:
        ValueError: `out` holds a set that was generated otherwise; says what differs.
    """
    renderer = open_renderer(config.renderer)
    try:
        listed = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12] if words else None
        manifest = {**asdict(config), "renderer": renderer.name, "words": len(words or ()), "words_hash": listed}
        _refuse_other_set(out, manifest)
        _write_text(out / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
        questions: list[Question] = []
        rows, entries = [], {}
        for done, chart in enumerate(charts_of(config, words), start=1):
            plain, boxed = image_paths(config.variant, chart.name)
            kept = out / "charts" / f"{chart.name}.json"
            if not kept.is_file():
                picture = renderer.draw(chart)
                _save_jpeg(picture.image, out / plain)
                _save_jpeg(draw_red_box(picture, chart.boxed), out / boxed)
                row = {"name": chart.name, "graph": picture.graph.to_dict(), "bg": chart.background,
                       "boxed": chart.boxed, "renderer": picture.renderer}  # fmt: skip
                _write_text(kept, json.dumps(row, ensure_ascii=False))
            made = make_questions(chart, image=plain, boxed_image=boxed, split=config.split, protocol=config.protocol)
            questions += made
            rows.append(kept.read_text(encoding="utf-8"))
            entries[f"{chart.name}.jpeg"] = released_entry(made)
            if progress:
                progress(done)
    finally:
        renderer.close()
    vqa = out / "SimFlowchart" / config.variant / "VQA" / f"{config.split}.json"
    _write_text(vqa, json.dumps(entries, indent=4, ensure_ascii=False) + "\n")
    _write_text(out / CHARTS_FILE, "\n".join(rows) + "\n")
    _write_text(out / QUESTIONS_FILE, "".join(q.to_json() + "\n" for q in questions))
    return out / QUESTIONS_FILE


def _save_jpeg(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(temporary, format="JPEG", quality=JPEG_QUALITY)
    temporary.replace(path)


def _refuse_other_set(out: Path, manifest: dict[str, Any]) -> None:
    path = out / MANIFEST_FILE
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [f"{key}: there {found.get(key)!r}, asked {value!r}" for key, value in manifest.items()
                 if key != "count" and found.get(key) != value]  # fmt: skip
    if differing:
        raise ValueError(f"{out} holds another set ({'; '.join(differing)}); choose another folder")
    if found["count"] > manifest["count"]:
        raise ValueError(f"{out} holds {found['count']} charts of this set, more than the {manifest['count']} asked")
