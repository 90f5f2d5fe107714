"""The flowchart commands from the command line: exit statuses, files, and messages."""

import json
import re

import pytest

from headrace.cli.main import main
from headrace.datasets.flowlearn.prompts import find_prompts
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm import vqa_model


class Reader:
    """Answers from the data set's references."""

    def __init__(self, data):
        self.lines = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]

    def answer(self, images, questions, *, max_new_tokens):
        prompts = find_prompts("headrace-1").texts
        found = []
        for text in questions:
            rows = (q for q in self.lines if str(images).endswith(q["image"]))
            found.append(
                next(q["answer"] for q in rows if prompts[q["task"]].replace("{question}", q["question"]) == text)
            )
        return found


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    assert main(["flowlearn", "generate", "--count", "4", "--renderer", "pillow", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def reading(monkeypatch, charts):
    monkeypatch.setattr(vqa_model, "opener", lambda source, *, device, pruning: lambda: Reader(charts))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a small model with random weights: 16 visual tokens per picture."""
    from headrace.vlm.chart_questions import chart_tokenizer
    from headrace.vlm.video_language_model import VideoLanguageConfig, VideoLanguageModel

    model, folder = VideoLanguageModel(VideoLanguageConfig.tiny()), tmp_path_factory.mktemp("tiny")
    model.tokenizer = chart_tokenizer()
    model.save_pretrained(folder)
    return folder


def arguments(charts, out, *more, model="any", command="run"):
    task = "flowlearn/sim-word/num_nodes"
    return ["vqa", command, "--task", task, "--data", str(charts), "--model", str(model), "--out", str(out), *more]


def notes_of(out):
    return [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]


def settings(tmp_path, **more):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"pruning": "FlowCutConfig", "budget": {"tokens": 5}, **more}))
    return str(path)


def test_run_compare_and_report(charts, reading, tmp_path, capsys):
    for name in ("a", "b"):
        assert main(arguments(charts, tmp_path / name)) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["tasks"]["num_nodes"]["score"] == 1.0
    assert (tmp_path / "a" / "samples.jsonl").read_text().count("\n") == 4
    assert (tmp_path / "a" / "report.html").is_file()
    capsys.readouterr()
    assert main(["vqa", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--as-json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["num_nodes"]["difference"] == 0.0
    page = tmp_path / "both.html"
    assert main(["vqa", "report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page)]) == 0
    assert page.is_file()


def test_dry_run_loads_no_model_and_writes_nothing(charts, tmp_path, capsys):
    assert main(arguments(charts, tmp_path / "x", "--dry-run")) == 0
    assert "num_nodes: 4 questions" in capsys.readouterr().out and not (tmp_path / "x").exists()
    assert main(arguments(charts, tmp_path / "x", "--dry-run", "--limit", "3")) == 0
    assert "num_nodes: 3 questions" in capsys.readouterr().out
    counts = []
    for part in ("0/2", "1/2"):
        assert main(arguments(charts, tmp_path / "x", "--dry-run", "--shard", part)) == 0
        counts += [int(n) for n in re.findall(r"num_nodes: (\d+) questions", capsys.readouterr().out)]
    assert sum(counts) == 4


def test_shards_and_merge(charts, reading, tmp_path):
    for part in ("0/2", "1/2"):
        assert main(arguments(charts, tmp_path, "--shard", part)) == 0
    assert main(["vqa", "merge", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["questions"] == 4


def test_missing_pictures_are_named_with_a_bad_status(charts, reading, tmp_path, capsys):
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "questions.jsonl").write_bytes((charts / "questions.jsonl").read_bytes())
    assert main(arguments(lost, tmp_path / "out")) != 0
    assert "4 pictures are missing" in capsys.readouterr().err


def test_a_resumed_run_with_another_prompt_is_refused(charts, reading, tmp_path, capsys):
    assert main(arguments(charts, tmp_path, "--limit", "2")) == 0
    assert main(arguments(charts, tmp_path, "--prompts", "short-1")) != 0
    said = capsys.readouterr().err
    assert "prompts: there 'headrace-1', asked 'short-1'" in said


def test_a_failing_model_ends_with_a_bad_status(charts, monkeypatch, tmp_path, capsys):
    class Broken:
        def answer(self, images, questions, *, max_new_tokens):
            raise RuntimeError("no memory left")

    monkeypatch.setattr(vqa_model, "opener", lambda source, *, device, pruning: Broken)
    assert main(arguments(charts, tmp_path)) == 1
    assert "no memory left" in capsys.readouterr().err


def test_a_sweep_with_failed_answers_ends_with_a_bad_status(charts, monkeypatch, tmp_path, capsys):
    class Broken:
        pruning = None

        def answer(self, images, questions, *, max_new_tokens):
            if str(images).endswith("/1.jpeg"):
                raise RuntimeError("no memory left")
            return ["3"] * len(questions)

    monkeypatch.setattr(vqa_model, "opener", lambda source, *, device, pruning: Broken)
    given = ["--task", "flowlearn/sim-word/num_nodes", "--data", str(charts), "--model", "any", "--out", str(tmp_path)]
    more = ["--methods", "fastv", "--keep", "8", "--repeats", "2", "--warmup", "0"]
    assert main(["vqa", "bench-prune", *given, *more]) == 1
    assert "2 answers failed" in capsys.readouterr().err
    assert [row["errors"] for row in json.loads((tmp_path / "bench.json").read_text())] == [1, 1]


@pytest.mark.parametrize("more", [("--prune", "flowcut"), ("--keep", "8"), ("--prune", "nothing", "--keep", "8")])
def test_wrong_pruning_arguments_are_refused(charts, tmp_path, more):
    assert main(arguments(charts, tmp_path, *more)) == 2


def test_a_file_of_pruning_settings_is_run_and_stored(charts, tiny, tmp_path):
    given = arguments(charts, tmp_path / "run", "--prune", settings(tmp_path, every=1), "--no-report", model=tiny)
    assert main(given) == 0
    pruning = json.loads((tmp_path / "run" / "results.json").read_text())["run"]["pruning"]
    assert (pruning["method"], pruning["every"], pruning["budget"]["tokens"]) == ("flowcut (every=1)", 1, 5)
    assert [(note["before"], note["after"]) for note in notes_of(tmp_path / "run")] == [(16, 5)] * 4


def test_a_sweep_over_a_file_of_settings_stays_in_its_folder(charts, tiny, tmp_path, capsys):
    more = ["--methods", settings(tmp_path, every=1), "--keep", "5", "--repeats", "2", "--warmup", "0", "--limit", "2"]
    assert main(arguments(charts, tmp_path / "sweep", *more, model=tiny, command="bench-prune")) == 0
    rows = json.loads((tmp_path / "sweep" / "bench.json").read_text())
    assert [(row["setting"], row["tokens"]) for row in rows] == [("full", 16), ("mine-5", 5)]
    assert (tmp_path / "sweep" / "mine-5" / "results.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "sweep"}
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    twice = [settings(tmp_path), settings(tmp_path / "other")]
    given = arguments(charts, tmp_path / "x", "--methods", *twice, "--keep", "5", model=tiny, command="bench-prune")
    assert main(given) == 2 and "one folder 'mine-5'" in capsys.readouterr().err


WRONG = {
    "{": "not valid JSON", "[]": "holds a list", '{"pruning": ["FlowCutConfig"]}': "unknown pruning settings",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 5}, "evry": 2}': "does not know evry",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 5}, "every": "four"}': "must be a whole number, got 'four'",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 5}, "decoder": 1}': "decoder must be true or false, got 1",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 5}, "criteria": "attention"}': "criteria must be a list",
    '{"pruning": "FlowCutConfig", "budget": 64}': "budget must be an object (tokens: a whole number or null",
    '{"pruning": "FlowCutConfig", "budget": null}': "budget must be an object",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 1.5}}': "got {'tokens': 1.5}",
    '{"pruning": "FlowCutConfig", "budget": {"tokens": 0}}': "tokens must be at least 1",
    '{"pruning": "FlowCutConfig"}': "needs budget",
}  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_wrong_pruning_settings_give_one_error_and_write_nothing(charts, tmp_path, capsys, content):
    path, out = tmp_path / "mine.json", tmp_path / "out"
    path.write_text(content)
    given = [arguments(charts, out, "--prune", str(path))]
    if "budget" not in WRONG[content] and "tokens" not in WRONG[content]:  # a sweep brings budgets of its own
        given.append(arguments(charts, out, "--methods", str(path), "--keep", "8", command="bench-prune"))
    for one in given:
        assert main(one) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "mine.json" in said and WRONG[content] in said and not out.exists()


def test_a_model_that_cannot_be_opened_leaves_nothing_behind(charts, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    given = arguments(charts, out, "--prune", settings(tmp_path, last_layer=99), "--no-report", model=tiny)
    assert main(given) == 2 and "last_layer must lie in" in capsys.readouterr().err and not out.exists()
    assert main(arguments(charts, out, "--prune", settings(tmp_path), "--no-report", model=tiny)) == 0


def test_worked_examples_come_from_another_folder_and_are_part_of_the_run(charts, tiny, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    write_dataset(GenerateConfig(count=4, seed=8, renderer="pillow"), other)
    more = ("--shots", "2", "--shots-from", str(other), "--no-report")
    assert main(arguments(charts, tmp_path / "x", *more, "--dry-run")) == 0
    assert len(re.findall(r"behind SimFlowchart.*Count its boxes.* -> '\d+'", capsys.readouterr().out)) == 2
    assert main(arguments(charts, out, *more, "--prune", "random", "--keep", "5", model=tiny)) == 0
    shots = json.loads((out / "results.json").read_text())["run"]["shots"]
    assert (shots["count"], shots["seed"], shots["from"], shots["split"]) == (2, 0, "other", "test")
    assert all((note["before"], note["after"], len(note["kept"])) == (48, 15, 5) for note in notes_of(out))
    for changed in (("--shots", "1", *more[2:]), (*more, "--shots-seed", "1"), ("--no-report",)):
        capsys.readouterr()
        assert main(arguments(charts, out, *changed, "--prune", "random", "--keep", "5", model=tiny)) == 2
        assert "shots: there {'count': 2" in capsys.readouterr().err


def test_worked_examples_that_cannot_be_are_refused(charts, reading, tmp_path, capsys):
    for more, said in (
        (("--shots", "2"), "go together"),
        (("--shots-from", str(charts)), "go together"),
        (("--shots", "-1", "--shots-from", str(charts)), "at least 1"),
        (("--shots", "1", "--shots-from", str(charts)), "holds 0 charts for 'num_nodes'"),
        (("--shots", "1", "--shots-from", str(tmp_path)), "is missing"),
    ):
        assert main(arguments(charts, tmp_path / "out", *more)) == 2 and said in capsys.readouterr().err
    write_dataset(GenerateConfig(count=2, seed=8, renderer="pillow"), tmp_path / "other")
    assert main(arguments(charts, tmp_path / "out", "--shots", "1", "--shots-from", str(tmp_path / "other"))) == 2
    assert "Reader takes one picture" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_for_other_frameworks(charts, tmp_path, capsys):
    for to in ("lmms-eval", "vlmevalkit"):
        given = ["--task", "flowlearn/sim-word", "--data", str(charts), "--out", str(tmp_path), "--to", to]
        assert main(["vqa", "export", *given]) == 0
    assert (tmp_path / "flowlearn_sim_word" / "_group.yaml").is_file()
    assert (tmp_path / "flowlearn_sim_word.tsv").is_file()


def test_score_prints_one_json_object(tmp_path, capsys):
    path = tmp_path / "gpt_Num_Nodes_2-shot.json"
    path.write_text(json.dumps({"1.jpeg": {"prediction": "5", "reference": "5"}}))
    assert main(["flowlearn", "score", str(path), "--task", "num_nodes"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 1.0
    assert main(["flowlearn", "score", str(path), "--task", "nodes_of_num"]) == 2
