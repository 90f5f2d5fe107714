"""The loader gives the same records for a generated folder, the release's layout and the 50-picture selection."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from headrace.cli.flowlearn import generate as generate_command
from headrace.datasets.flowlearn.load import label_issue, load_questions, missing_images, require_images
from headrace.datasets.flowlearn.mermaid import format_mermaid, parse_mermaid
from headrace.datasets.flowlearn.predictions import read_predictions
from headrace.datasets.flowlearn.prompts import PromptSet, find_prompts
from headrace.datasets.flowlearn.records import Edge, Graph, Node
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset

SHARED = Path(__file__).parents[4] / "shared" / "flowlearn"
needs_selection = pytest.mark.skipif(not SHARED.is_dir(), reason="the real pictures are not here")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_dataset(GenerateConfig(count=6, seed=3, renderer="pillow", protocol="released"), folder)
    return folder


def test_own_records_and_the_release_layout_agree(generated):
    own = load_questions(generated)
    hidden = generated / "questions.jsonl"
    kept = hidden.read_bytes()
    hidden.unlink()
    try:
        release = load_questions(generated)
    finally:
        hidden.write_bytes(kept)
    assert {(q.uid, q.image, q.question, q.answer, q.label_issue) for q in own} == {
        (q.uid, q.image, q.question, q.answer, q.label_issue) for q in release
    }
    assert not missing_images(generated, own)


def test_a_second_run_changes_nothing_and_another_set_is_refused(generated):
    before = {p: p.stat().st_mtime_ns for p in generated.rglob("*.jpeg")}
    write_dataset(GenerateConfig(count=6, seed=3, renderer="pillow", protocol="released"), generated)
    assert before == {p: p.stat().st_mtime_ns for p in generated.rglob("*.jpeg")}
    with pytest.raises(ValueError, match="seed: there 3, asked 4"):
        write_dataset(GenerateConfig(count=6, seed=4, renderer="pillow", protocol="released"), generated)


def test_another_list_of_words_is_another_set(tmp_path):
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    config = GenerateConfig(count=1, renderer="pillow", nodes=3)
    write_dataset(config, tmp_path, words=words)
    write_dataset(config, tmp_path, words=words)
    with pytest.raises(ValueError, match="words_hash: there"):
        write_dataset(config, tmp_path, words=[*words[:-1], "zeta"])


def test_line_separators_in_a_label_do_not_cut_a_record(generated, tmp_path):
    question = load_questions(generated)[0]
    odd = [replace(question, uid=str(n), answer=f"a{mark}b") for n, mark in enumerate("\u2028\u2029\x85")]
    (tmp_path / "questions.jsonl").write_text("".join(q.to_json() + "\n" for q in odd), encoding="utf-8")
    assert load_questions(tmp_path) == odd


def test_missing_pictures_are_named(generated, tmp_path):
    questions = load_questions(generated)
    with pytest.raises(FileNotFoundError, match=r"pictures are missing.*0\.jpeg"):
        require_images(tmp_path, questions)


def test_scientific_subset(tmp_path):
    entry = {"True_Statements": ["A leads to B."], "False_Statements": ["B leads to A."],
             "Flowchart-to-Caption": "Overview.", "ocr": [[[0, 0], [1, 1]], ["encoder", 0.98]]}  # fmt: skip
    folder = tmp_path / "SciFlowchart"
    folder.mkdir()
    (folder / "test_vqa_query.json").write_text(json.dumps({"1v1-Figure2-1.png": entry, "2v1-Figure1-1.png": {}}))
    found = {q.task: q for q in load_questions(tmp_path, variant="sci")}
    assert found["ocr"].answer == "encoder" and found["ocr"].image.startswith("SciFlowchart/images_ocr/")
    assert (found["true_statement"].answer, found["false_statement"].question) == ("true", "B leads to A.")
    assert len(found) == 4


def test_no_data_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="headrace flowlearn generate"):
        load_questions(tmp_path)
    with pytest.raises(ValueError, match="unknown FlowLearn variant"):
        load_questions(tmp_path, variant="sim-words")


def test_command_generates(tmp_path, capsys):
    assert generate_command(count=2, out=tmp_path, renderer="pillow", variant="char") == 0
    assert len(load_questions(tmp_path, variant="sim-char")) >= 14
    assert capsys.readouterr().out.strip().endswith("questions.jsonl")


def test_a_label_with_an_apostrophe_is_read(tmp_path):
    text = "Does this hold? Arrow points from node 'farmer's hut' to node 'beta'."
    rows = {"1": {"Q": text, "A1": "false", "type": "Flowchart-isFalse-AtoB"}}
    (tmp_path / "questions.json").write_text(json.dumps({"7": {"key": "7", "qa": rows}}))
    graph = Graph(nodes=(Node("entity0", "farmer's hut"), Node("entity1", "delta")), edges=())
    (tmp_path / "predictions").mkdir()
    row = {"7.jpeg": {"prediction": "", "reference": format_mermaid(graph)}}
    (tmp_path / "predictions" / "gpt4v_Flowchart-to-Mermaid_2-shot.json").write_text(json.dumps(row))
    assert [q.label_issue for q in load_questions(tmp_path)] == ["mutated_label"]


def test_a_selection_knows_its_faulty_labels_from_released_references(tmp_path):
    rows = {
        "1": {"Q": "Does this hold? Arrow exists between node 'alpha' and node 'beta'.", "A1": "false",
              "type": "Flowchart-isFalse-betweenAB"},
        "2": {"Q": "How many nodes are in the flowchart?", "A1": "2", "type": "Num_Nodes"},
    }  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps({"7": {"key": "7", "qa": rows}}))
    assert [q.label_issue for q in load_questions(tmp_path)] == [None, None]
    graph = Graph(nodes=(Node("entity0", "alpha"), Node("entity1", "beta")), edges=(Edge("entity1", "entity0"),))
    (tmp_path / "predictions").mkdir()
    for name, text in (("gpt4v", format_mermaid(graph)), ("char_gpt4v", "flowchart TB")):
        row = {"7.jpeg": {"prediction": "", "reference": text}}
        (tmp_path / "predictions" / f"{name}_Flowchart-to-Mermaid_2-shot.json").write_text(json.dumps(row))
    questions = load_questions(tmp_path)
    assert [q.label_issue for q in questions] == ["reverse_edge_exists", None]
    assert all(len(q.meta["graph"]["nodes"]) == 2 for q in questions)


@needs_selection
def test_real_selection_fits_the_released_references():
    questions = load_questions(SHARED)
    assert len(questions) == 300 and not missing_images(SHARED, questions)
    graphs = {
        Path(row.image).stem: parse_mermaid(row.reference).graph
        for row in read_predictions(SHARED / "predictions" / "gpt4v_Flowchart-to-Mermaid_2-shot.json")
    }
    issues = []
    for question in questions:
        graph = graphs[Path(question.image).stem]
        Image.open(SHARED / question.image).load()
        if question.task == "num_nodes":
            assert int(question.answer) == len(graph.nodes)
        elif question.task == "num_arrows":
            assert int(question.answer) == len(graph.edges)
        else:
            a, b = question.question.split("'")[1::2]
            if question.answer == "true":
                assert (a, b) in graph.link_set()
            issues.append(label_issue(question.task, a, b, graph))
            assert question.label_issue == issues[-1]
    assert issues.count("reverse_edge_exists") > 5 and issues.count("mutated_label") >= 1


def test_prompts_change_their_hash_with_any_word(generated, tmp_path):
    question = next(q for q in load_questions(generated) if q.task == "true_a_to_b")
    default = find_prompts("headrace-1")
    assert question.question in default.ask(question)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"true_a_to_b": "Right? {question}"}))
    assert find_prompts(str(path)).ask(question) == f"Right? {question.question}"
    assert len({default.hash, find_prompts(str(path)).hash, PromptSet(name="x").hash}) == 3
    for wrong, said in (
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ('{"ocr": 3}', "'ocr' must be a string, got 3"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=rf"mine\.json.*{said}"):
            find_prompts(str(path))
    with pytest.raises(ValueError, match="unknown prompt set"):
        find_prompts("nothing")
