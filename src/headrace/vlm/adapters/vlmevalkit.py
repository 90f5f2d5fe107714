"""VLMEvalKit: our data as a TSV with a dataset class, and a launcher that makes our models known to its `run.py`.

    headrace vqa export --to vlmevalkit --task flowlearn/sim-word --data charts --out $LMUData
    python -m headrace.vlm.adapters.vlmevalkit --run VLMEvalKit/run.py --source MODEL --name headrace -- \
        --data flowlearn_sim_word --model headrace

VLMEvalKit has no entry points, so the launcher inserts both into its tables and then runs its script.
"""

import base64
import csv
import runpy
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from headrace.datasets.flowlearn.load import require_images
from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.vlm.adapters.lmms_eval import document, process_results, task_name
from headrace.vlm.vqa_data import TaskSet
from headrace.vlm.vqa_model import opener, pruning_of

COLUMNS = ("index", "image", "question", "answer", "category", "split", "uid", "record", "new_tokens")


def write_tsv(tasks: TaskSet, data: Path, out: Path, *, prompts: PromptSet) -> Path:
    """Write the questions as VLMEvalKit's table, pictures inside as base64.

    Raises:
        FileNotFoundError: Pictures are missing; they are named.
    """
    require_images(data, tasks.questions)
    path = out / f"{task_name(tasks)}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(COLUMNS)
        for index, question in enumerate(tasks.questions):
            row = document(question, data, prompts)
            picture = base64.b64encode((data / question.image).read_bytes()).decode()
            writer.writerow([index, picture, row["prompt"], row["answer"], question.task, question.split,
                             row["uid"], row["record"], tasks.new_tokens[question.task]])  # fmt: skip
    return path


def score_table(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric per task over rows with `record`, `category` and `prediction`, by the same scorer."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        said = row["prediction"]
        text = "" if said is None or said != said else str(said)  # tables hold NaN for an empty answer
        for metric, value in process_results({"record": row["record"]}, [text]).items():
            columns.setdefault(f"{row['category']}:{metric}", []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def dataset_class(names: list[str]) -> type:
    """A VLMEvalKit dataset class for tables that `write_tsv` wrote."""
    base = import_module("vlmeval.dataset.image_base").ImageBaseDataset
    load = import_module("vlmeval.smp").load

    class FlowchartQuestions(base):  # type: ignore[misc, valid-type]
        """Flowchart questions, scored by headrace."""

        TYPE = "VQA"
        DATASET_URL = dict.fromkeys(names, "")
        DATASET_MD5 = dict.fromkeys(names)

        @classmethod
        def supported_datasets(cls) -> list[str]:
            return list(names)

        def build_prompt(self, line: Any) -> list[dict[str, Any]]:
            if isinstance(line, int):
                line = self.data.iloc[line]
            pictures = self.dump_image(line)
            text = {"type": "text", "value": line["question"]}
            if "new_tokens" in line:  # for `HeadraceModel`; other models set their own limit
                text["new_tokens"] = int(line["new_tokens"])
            return [*({"type": "image", "value": path} for path in pictures), text]

        def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
            return score_table(load(eval_file).to_dict("records"))

    return FlowchartQuestions


class HeadraceModel:
    """A headrace or Hugging Face model in VLMEvalKit's form.

    Attributes:
        new_tokens: Longest answer [tokens] where the message does not say, as those of other data sets.
    """

    is_api = False
    INTERLEAVE = False

    def __init__(
        self, source: str, *, prune: str | None = None, keep: float | None = None, device: str = "cpu"
    ) -> None:
        self.answerer = opener(source, device=device, pruning=pruning_of(prune, keep))()
        self.new_tokens = 512

    def set_dump_image(self, dump_image: Any) -> None:
        """VLMEvalKit hands over how it writes pictures; prompts are built by the dataset, so it is only kept."""
        self.dump_image = dump_image

    def use_custom_prompt(self, dataset: str) -> bool:
        """No: the dataset builds the prompt."""
        return False

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message of pictures (paths) and texts."""
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """As `generate`."""
        pictures = [Path(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        limit = max((part["new_tokens"] for part in message if "new_tokens" in part), default=self.new_tokens)
        return self.answerer.answer(pictures, [text], max_new_tokens=limit)[0]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Run VLMEvalKit's script with our model and data known to it.

    Attributes:
        run: Path of VLMEvalKit's run.py.
        source: Folder or Hub id of the model.
        name: Name under which it is known.
        data: Names of tables written by `write_tsv`.
        prune, keep: Pruning method and budget.
        device: Where the model runs.
    """

    run: Path
    source: str
    name: str = "headrace"
    data: tuple[str, ...] = ("flowlearn_sim_word", "flowlearn_sim_char", "flowlearn_sci", "flowvqa")
    prune: str | None = None
    keep: float | None = None
    device: str = "cpu"


def register(launch: Launch) -> None:
    """Insert the model and the dataset class into VLMEvalKit's tables."""
    models = import_module("vlmeval.config").supported_VLM
    models[launch.name] = lambda **_: HeadraceModel(
        launch.source, prune=launch.prune, keep=launch.keep, device=launch.device
    )
    datasets = import_module("vlmeval.dataset")
    made = dataset_class(list(launch.data))
    datasets.DATASET_CLASSES.append(made)
    datasets.SUPPORTED_DATASETS += made.supported_datasets()  # type: ignore[attr-defined]


def main(arguments: list[str]) -> None:
    """`... --run run.py --source MODEL -- ARGUMENTS OF run.py`."""
    import tyro

    split = arguments.index("--") if "--" in arguments else len(arguments)
    launch = tyro.cli(Launch, args=arguments[:split])
    if not launch.run.is_file():
        raise FileNotFoundError(f"no {launch.run}; give the path of VLMEvalKit's run.py")
    register(launch)
    sys.argv = [str(launch.run), *arguments[split + 1 :]]
    runpy.run_path(str(launch.run), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
