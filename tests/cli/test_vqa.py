"""The flowchart commands from the command line: exit statuses, files, and messages."""

import json
import re

import pytest

from headrace.cli.main import main
from headrace.datasets.flowlearn.prompts import find_prompts
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


def arguments(charts, out, *more):
    task = "flowlearn/sim-word/num_nodes"
    return ["vqa", "run", "--task", task, "--data", str(charts), "--model", "any", "--out", str(out), *more]


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
