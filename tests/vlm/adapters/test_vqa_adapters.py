"""One scorer, one number: our runner, lmms-eval's own evaluator, and VLMEvalKit's tables."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest

from headrace.datasets.flowlearn.prompts import find_prompts
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.adapters import vlmevalkit
from headrace.vlm.adapters.lmms_eval import manifest, task_name, write_task_folder
from headrace.vlm.adapters.vlmevalkit import HeadraceModel, Launch, register, score_table, write_tsv
from headrace.vlm.vqa_data import load_task
from headrace.vlm.vqa_run import run, run_identity

PROMPTS = find_prompts("headrace-1")


class Erring:
    """Gives the reference, made wrong by a rule that depends on prompt and picture only; counts its calls."""

    def __init__(self, tasks):
        self.answers = {}
        for number, question in enumerate(tasks.questions):
            text = question.answer
            if number % 4 == 0:
                text = text.replace("entity0 ", "entity1 ").replace("true", "false") + "1"
            self.answers[Path(question.image).parts[-3:], PROMPTS.ask(question)] = text
        self.by_prompt = {}
        for (image, prompt), text in self.answers.items():
            self.by_prompt.setdefault(prompt, []).append((image, text))
        self.calls = 0

    def answer(self, images, questions, *, max_new_tokens):
        self.calls += 1
        picture = images if isinstance(images, (str, Path)) else self.names[id_of(images[0])]
        key = Path(picture).parts[-3:]
        return [self.answers[key, text] for text in questions]


def id_of(image):
    return hash(image.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    write_dataset(GenerateConfig(count=10, seed=6, renderer="pillow"), folder)
    return folder


@pytest.fixture(scope="module")
def ours(data, tmp_path_factory):
    """Scores of our own runner."""
    tasks, out = load_task("flowlearn/sim-word", data), tmp_path_factory.mktemp("run")
    identity = run_identity(tasks, PROMPTS, model="erring", pruning=None, data=data, split="test")
    run(tasks, lambda: Erring(tasks), data=data, out=out, identity=identity, prompts=PROMPTS)
    return json.loads((out / "results.json").read_text())["tasks"]


def test_lmms_evals_own_evaluator_gives_the_same_scores(data, ours, tmp_path):
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.tasks import TaskManager
    from PIL import Image

    from headrace.vlm.adapters.lmms_eval_model import HeadraceModel as LmmsModel

    tasks = load_task("flowlearn/sim-word", data)
    group = write_task_folder(tasks, data, tmp_path, prompts=PROMPTS)
    model = Erring(tasks)
    model.names = {id_of(Image.open(data / q.image).convert("RGB")): q.image for q in tasks.questions}
    found = evaluator.simple_evaluate(
        model=LmmsModel(model=model), tasks=[group], task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True, batch_size=1, bootstrap_iters=0,
    )  # fmt: skip
    assert len(ours) == 9
    for task, numbers in ours.items():
        theirs = found["results"][task_name(tasks, task)]
        assert theirs["score,none"] == pytest.approx(numbers["score"], abs=1e-6)
        if task == "mermaid":
            assert theirs["link_f1,none"] == pytest.approx(numbers["parts"]["link_f1"]["score"], abs=1e-6)
        assert len(found["samples"][task_name(tasks, task)]) == numbers["count"]
    assert 0 < ours["num_nodes"]["score"] < 1


def test_the_model_groups_questions_by_picture(data):
    pytest.importorskip("lmms_eval")
    from headrace.vlm.adapters.lmms_eval_model import HeadraceModel as LmmsModel

    class Counting:
        def __init__(self):
            self.calls = []

        def answer(self, images, questions, *, max_new_tokens):
            self.calls.append(list(questions))
            opened.append("answer")
            return [text.upper() for text in questions]

    opened, inner = [], Counting()
    model = LmmsModel(model=inner)
    docs = [{"image_path": f"{i % 2}.png"} for i in range(6)]
    model.task_dict = {"t": {"test": docs}}

    def turn(doc):
        opened.append(doc["image_path"])
        return [{"role": "user", "content": [{"type": "image", "url": None}, {"type": "text", "text": f"q{id(doc)}"}]}]

    requests = [types.SimpleNamespace(args=("", turn, {"max_new_tokens": 5}, i, "t", "test")) for i in range(6)]
    answers = model.generate_until(requests)
    assert answers == [f"Q{id(doc)}" for doc in docs] and [len(call) for call in inner.calls] == [3, 3]
    assert opened == ["0.png"] * 3 + ["answer"] + ["1.png"] * 3 + ["answer"], "pictures are opened group by group"
    with pytest.raises(ValueError, match="generate_until"):
        model.loglikelihood([])


def test_entry_point_is_known_to_lmms_eval():
    pytest.importorskip("lmms_eval")
    made = manifest()
    module, name = made.chat_class_path.rsplit(".", 1)
    assert made.model_id == "headrace" and hasattr(__import__(module, fromlist=[name]), name)
    declared = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert 'headrace = "headrace.vlm.adapters.lmms_eval:manifest"' in declared


def test_vlmevalkit_table_scores_the_same(data, ours, tmp_path):
    tasks = load_task("flowlearn/sim-word", data)
    path = write_tsv(tasks, data, tmp_path, prompts=PROMPTS)
    model = Erring(tasks)
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == len(tasks.questions) and len(rows[0]["image"]) > 1000
    for row, question in zip(rows, tasks.questions, strict=True):
        row["prediction"] = model.answer(data / question.image, [row["question"]], max_new_tokens=9)[0]
    scores = score_table(rows)
    assert {(row["category"], int(row["new_tokens"])) for row in rows} == set(tasks.new_tokens.items()) & {
        (q.task, tasks.new_tokens[q.task]) for q in tasks.questions
    }
    for task, numbers in ours.items():
        assert scores[f"{task}:score"] == pytest.approx(numbers["score"], abs=1e-6)
    ocr = next(row for row in rows if row["category"] == "ocr")
    for empty in (float("nan"), None, ""):  # how tables give an empty answer back
        assert score_table([{**ocr, "prediction": empty}])["ocr:parsed"] == 0.0


def test_vlmevalkit_learns_our_model_and_data(monkeypatch, tmp_path):
    """Against stand-ins with the few names that the launcher touches; VLMEvalKit itself is not on the package index."""

    class ImageBaseDataset:
        data = None

        def dump_image(self, line):
            return [f"{line['index']}.png"]

    names = {"vlmeval": {}, "vlmeval.config": {"supported_VLM": {}}, "vlmeval.smp": {"load": None},
             "vlmeval.dataset": {"DATASET_CLASSES": [], "SUPPORTED_DATASETS": []},
             "vlmeval.dataset.image_base": {"ImageBaseDataset": ImageBaseDataset}}  # fmt: skip
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    opened = []
    monkeypatch.setattr(vlmevalkit, "opener", lambda source, **more: lambda: opened.append((source, more["device"])))
    register(Launch(run=tmp_path, source="model", device="cuda"))
    sys.modules["vlmeval.config"].supported_VLM["headrace"]()
    assert opened == [("model", "cuda")]
    dataset = sys.modules["vlmeval.dataset"]
    made = dataset.DATASET_CLASSES[0]
    assert "headrace" in sys.modules["vlmeval.config"].supported_VLM
    assert "flowlearn_sim_word" in dataset.SUPPORTED_DATASETS and made.TYPE == "VQA"
    prompt = made().build_prompt({"index": 3, "question": "How many?"})
    assert prompt == [{"type": "image", "value": "3.png"}, {"type": "text", "value": "How many?"}]
    assert made().build_prompt({"index": 3, "question": "How many?", "new_tokens": "100"})[1]["new_tokens"] == 100


def test_vlmevalkit_model_reads_a_message():
    model = HeadraceModel.__new__(HeadraceModel)
    model.new_tokens = 7
    model.answerer = types.SimpleNamespace(
        answer=lambda images, questions, max_new_tokens: [f"{images[0].name} {questions[0]} {max_new_tokens}"]
    )
    message = [{"type": "image", "value": "/tmp/a.png"}, {"type": "text", "value": "what"}]
    assert model.generate(message) == "a.png what 7"
    assert model.generate([message[0], message[1] | {"new_tokens": 100}]) == "a.png what 100"
