"""The runner: nothing is asked twice, nothing is lost, nothing is mixed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import headrace
from headrace.datasets.flowlearn.prompts import PromptSet, find_prompts
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.vqa_compare import compare
from headrace.vlm.vqa_data import load_task
from headrace.vlm.vqa_run import Shard, groups_of, merge_shards, run, run_identity
from headrace.vlm.vqa_samples import read_samples
from headrace.vlm.vqa_shots import draw_shots

SOURCE = str(Path(headrace.__file__).parents[1])


class Reader:
    """Answers from the references, or wrongly where `wrong` says so; counts how often a picture is encoded."""

    def __init__(self, tasks, prompts, wrong=lambda question: False):
        self.answers = {}
        for question in tasks.questions:
            text = "no idea" if wrong(question) else question.answer
            self.answers[Path(question.image).as_posix(), prompts.ask(question)] = text
        self.encoded = []

    def answer(self, images, questions, *, max_new_tokens):
        self.encoded.append(str(images))
        key = next(k for k, _ in self.answers if str(images).endswith(k))
        return [self.answers[key, text] for text in questions]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    write_dataset(GenerateConfig(count=8, seed=5, renderer="pillow", protocol="released"), folder)
    return folder


@pytest.fixture
def tasks(data):
    return load_task("flowlearn/sim-word/all", data)


PROMPTS = find_prompts("headrace-1")


def identity_of(tasks, data, prompts=PROMPTS, model="fake", pruning=None):
    return run_identity(tasks, prompts, model=model, pruning=pruning, data=data, split="test")


def start(tasks, data, out, model, **more):
    return run(tasks, lambda: model, data=data, out=out, identity=identity_of(tasks, data), prompts=PROMPTS, **more)


def test_a_perfect_reader_scores_one_on_every_task(tasks, data, tmp_path):
    model = Reader(tasks, PROMPTS)
    start(tasks, data, tmp_path, model)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {t["score"] for t in results["tasks"].values()} == {1.0}
    assert results["tasks"]["mermaid"]["parts"]["link_f1"]["score"] == 1.0
    assert results["balanced"] == {"a_to_b": 1.0, "between": 1.0}
    assert sum(t["count"] for t in results["tasks"].values()) == len(tasks.questions) == results["questions"]
    assert "clean_labels" in results["tasks"]["false_between"] or not any(q.label_issue for q in tasks.questions)


def test_questions_on_one_picture_are_asked_together(tasks, data, tmp_path):
    model = Reader(tasks, PROMPTS)
    start(tasks, data, tmp_path, model)
    assert len(model.encoded) == 8 * 2  # the picture and the one with the red box


def test_short_and_long_answers_on_one_picture_encode_and_read_it_once(tasks, data, tmp_path, tiny_vlm):
    from headrace.vlm.huggingface import HuggingFaceVLM

    model, vlm = tiny_vlm("llava")[0], HuggingFaceVLM(*tiny_vlm("llava"))
    lengths = {name: 7 if count > 100 else 3 for name, count in tasks.new_tokens.items()}
    encoded, read = [], []
    count = (
        model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1)),
        model.model.language_model.layers[0].register_forward_hook(lambda _, given, out: read.append(out.shape)),
    )
    samples = start(tasks._replace(new_tokens=lengths), data, tmp_path, vlm, limit=1)
    for handle in count:
        handle.remove()
    assert len(samples) == 9 and not any(sample.error for sample in samples)
    alone = [shape for shape in read if shape[0] == 1 and shape[1] >= 36]  # other passes read the ends of several
    assert len(encoded) == len(alone) == 2
    questions = {question.uid: question for question in tasks.questions}
    for sample in samples:
        question = questions[sample.uid]
        alone = vlm.answer(data / question.image, [PROMPTS.ask(question)], max_new_tokens=lengths[question.task])
        assert alone == [sample.answer]


def test_resume_asks_only_what_is_left_and_drops_a_torn_line(tasks, data, tmp_path):
    whole = start(tasks, data, tmp_path / "whole", Reader(tasks, PROMPTS))
    part = tmp_path / "part"
    start(tasks, data, part, Reader(tasks, PROMPTS), limit=3)
    with (part / "samples.jsonl").open("a") as file:
        file.write('{"uid": "torn')
    with (part / "samples.jsonl").open("ab") as file:
        file.write("é".encode()[:1])  # in the middle of a letter
    before = len(read_samples(part))
    model = Reader(tasks, PROMPTS)
    again = start(tasks, data, part, model)
    assert before == 3 * 9 and 0 < len(model.encoded) < 16
    plain = [(s.uid, s.answer, s.score) for s in whole]
    assert [(s.uid, s.answer, s.score) for s in again] == plain
    assert {s.uid for s in read_samples(part)} == {s.uid for s in whole}
    assert start(tasks, data, part, None) == again  # nothing is left: the model is not opened


@pytest.mark.parametrize("what", ["model", "prompt", "pruning"])
def test_another_model_prompt_or_pruning_is_refused(tasks, data, tmp_path, what):
    start(tasks, data, tmp_path, Reader(tasks, PROMPTS), limit=1)
    other = {
        "model": identity_of(tasks, data, model="other"),
        "prompt": identity_of(tasks, data, prompts=PromptSet(name="mine")),
        "pruning": identity_of(tasks, data, pruning={"method": "random"}),
    }[what]
    with pytest.raises(ValueError, match=rf"holds a run that differs: .*{what}.*there .*asked"):
        run(tasks, lambda: None, data=data, out=tmp_path, identity=other, prompts=PROMPTS)


def test_shards_join_to_the_whole(tasks, data, tmp_path):
    whole = start(tasks, data, tmp_path / "whole", Reader(tasks, PROMPTS))
    out = tmp_path / "parts"
    start(tasks, data, out, Reader(tasks, PROMPTS), shard=Shard(index=0, count=3))
    start(tasks, data, out, Reader(tasks, PROMPTS), shard=Shard(index=2, count=3))
    with pytest.raises(FileNotFoundError, match="lacks the shards 1/3"):
        merge_shards(out, identity_of(tasks, data))
    start(tasks, data, out, Reader(tasks, PROMPTS), shard=Shard.parse("1/3"))
    merged = merge_shards(out, identity_of(tasks, data))
    assert merged["questions"] == len(whole)
    assert {(s.uid, s.score) for s in read_samples(out)} == {(s.uid, s.score) for s in whole}


def test_a_shard_that_was_stopped_is_named_by_merge(tasks, data, tmp_path):
    class Stopped(Reader):
        def answer(self, images, questions, *, max_new_tokens):
            if len(self.encoded) == 2:
                raise KeyboardInterrupt
            return super().answer(images, questions, max_new_tokens=max_new_tokens)

    for index, kind in enumerate((Reader, Stopped)):
        model, shard = kind(tasks, PROMPTS), Shard(index=index, count=2)
        try:
            start(tasks, data, tmp_path, model, shard=shard)
        except KeyboardInterrupt:
            assert kind is Stopped
    with pytest.raises(FileNotFoundError, match="did not end: 1/2"):
        merge_shards(tmp_path, identity_of(tasks, data))
    start(tasks, data, tmp_path, Reader(tasks, PROMPTS), shard=Shard(index=1, count=2))
    assert merge_shards(tmp_path, identity_of(tasks, data))["questions"] == len(tasks.questions)


def test_shards_with_different_limits_are_not_joined(tasks, data, tmp_path):
    for index, limit in enumerate((3, None)):
        start(tasks, data, tmp_path, Reader(tasks, PROMPTS), shard=Shard(index=index, count=2), limit=limit)
    with pytest.raises(ValueError, match=r"different limits .*limit 3.*limit None"):
        merge_shards(tmp_path, identity_of(tasks, data))
    assert not (tmp_path / "samples.jsonl").exists()
    start(tasks, data, tmp_path, Reader(tasks, PROMPTS), shard=Shard(index=0, count=2))
    assert merge_shards(tmp_path, identity_of(tasks, data))["questions"] == len(tasks.questions)


def test_a_model_that_does_not_open_leaves_no_run(tasks, data, tmp_path):
    def broken():
        raise FileNotFoundError("no such model")

    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no such model"):
        run(tasks, broken, data=data, out=out, identity=identity_of(tasks, data, model="typo"), prompts=PROMPTS)
    assert not out.exists()


def test_worked_examples_are_never_a_chart_that_is_asked_about(tasks, data, tmp_path):
    write_dataset(GenerateConfig(count=12, seed=5, renderer="pillow", protocol="released"), tmp_path)  # 8 are in `data`
    shots = draw_shots(tasks, data, count=2, folder=tmp_path, split="test", seed=0)
    every = draw_shots(tasks, data, count=4, folder=tmp_path, split="test", seed=1)
    for task, examples in every.by_task.items():
        numbers = {int(Path(question.image).stem) for question in examples}
        assert len(numbers) == 4 and min(numbers) >= 8, task
    assert draw_shots(tasks, data, count=2, folder=tmp_path, split="test", seed=0) == shots
    assert shots.identity != draw_shots(tasks, data, count=2, folder=tmp_path, split="test", seed=4).identity
    with pytest.raises(ValueError, match=r"holds 4 charts for .* 5 are wanted"):
        draw_shots(tasks, data, count=5, folder=tmp_path, split="test", seed=0)


def test_worked_examples_go_before_every_question(tasks, data, tmp_path):
    class Shown(Reader):
        def answer(self, images, questions, *, max_new_tokens, worked):
            seen.append((images, questions, worked))
            return super().answer(images[-1], questions, max_new_tokens=max_new_tokens)

    seen, other = [], tmp_path / "other"
    write_dataset(GenerateConfig(count=5, seed=77, renderer="pillow"), other)
    shots = draw_shots(tasks, data, count=2, folder=other, split="test", seed=0)
    identity = run_identity(tasks, PROMPTS, model="fake", pruning=None, data=data, split="test", shots=shots)
    model = Shown(tasks, PROMPTS)
    run(tasks, lambda: model, data=data, out=tmp_path / "run", identity=identity, prompts=PROMPTS, shots=shots)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["shots"]["count"] == 2 and results["mean_over_tasks"] == 1.0
    assert len(seen) == 8 * 2, "one call per picture, as without examples"
    for images, questions, worked in seen:
        assert (
            len(images) == 3 and all(other in image.parents for image in images[:2]) and len(worked) == len(questions)
        )
        boxed = ["OCR" in str(image) for image in images]
        assert boxed in ([True] * 3, [False] * 3), "examples of the red-box task have red boxes"
    for first, second in (("true_a_to_b", "false_a_to_b"), ("true_between", "false_between")):
        turns = shots.turns(first, PROMPTS)
        assert turns == shots.turns(second, PROMPTS) and [said for _, said in turns] == ["false", "true"]
    assert shots.turns("mermaid", PROMPTS)[0][1].startswith("```mermaid")


def test_a_failing_picture_is_recorded_and_can_be_tried_again(tasks, data, tmp_path):
    class Broken(Reader):
        def answer(self, images, questions, *, max_new_tokens):
            if str(images).endswith("jpeg/3.jpeg"):
                raise RuntimeError("out of memory")
            return super().answer(images, questions, max_new_tokens=max_new_tokens)

    noted = []
    samples = start(tasks, data, tmp_path, Broken(tasks, PROMPTS), after_picture=lambda _, image: noted.append(image))
    assert len(noted) == 8 * 2 - 1 and not any(image.endswith("jpeg/3.jpeg") for image in noted)
    failed = [s for s in samples if s.error]
    assert len(samples) == len(tasks.questions) and failed and all("out of memory" in s.error for s in failed)
    assert json.loads((tmp_path / "results.json").read_text())["errors"] == len(failed)
    again = start(tasks, data, tmp_path, Reader(tasks, PROMPTS), retry_errors=True)
    assert not any(s.error for s in again) and all(s.score == 1.0 for s in again)


def test_answers_with_line_separators_are_read_again(tasks, data, tmp_path):
    class Odd(Reader):
        def answer(self, images, questions, *, max_new_tokens):
            return ["a\u2028b\u2029c\u0085d\x1ce\r\nf"] * len(questions)

    whole = start(tasks, data, tmp_path, Odd(tasks, PROMPTS))
    assert read_samples(tmp_path) == whole and start(tasks, data, tmp_path, None) == whole


def test_odd_answers_are_counted(tasks, data, tmp_path):
    model = Reader(tasks, PROMPTS, wrong=lambda q: q.task == "num_nodes" and "jpeg/1." in q.image)
    start(tasks, data, tmp_path, model)
    numbers = json.loads((tmp_path / "results.json").read_text())["tasks"]["num_nodes"]
    assert (numbers["unparsed"], numbers["count"], numbers["score"]) == (1, 8, 7 / 8)


def test_missing_pictures_stop_the_run_before_any_question(tasks, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"16 pictures are missing .*0\.jpeg"):
        start(tasks, tmp_path, tmp_path / "out", None)


def test_limit_counts_per_task(tasks):
    kept = [q.task for g in groups_of(tasks, limit=2) for q in g.questions]
    assert {kept.count(task) for task in set(kept)} == {2}
    with pytest.raises(ValueError, match="limit must be at least 1"):
        groups_of(tasks, limit=0)
    with pytest.raises(ValueError, match="i/n"):
        Shard.parse("one")


def test_unknown_tasks_are_named(data):
    with pytest.raises(ValueError, match="did you mean 'num_nodes'"):
        load_task("flowlearn/sim-word/num_node", data)
    with pytest.raises(ValueError, match="did you mean 'flowlearn'"):
        load_task("flowlern/sim-word", data)


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from test_vqa_run import PROMPTS, Reader, load_task, start
tasks = load_task("flowlearn/sim-word/all", Path({data!r}))
class Slow(Reader):
    def answer(self, images, questions, *, max_new_tokens):
        time.sleep(0.15)
        return super().answer(images, questions, max_new_tokens=max_new_tokens)
start(tasks, Path({data!r}), Path({out!r}), Slow(tasks, PROMPTS))
"""


def test_a_run_killed_in_the_middle_ends_with_the_same_answers(tasks, data, tmp_path):
    out = tmp_path / "killed"
    code = KILLED.format(here=str(Path(__file__).parent), data=str(data), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SOURCE})
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 60
    while not (samples.is_file() and samples.read_bytes().count(b"\n") >= 10) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = len(read_samples(out))
    assert 10 <= answered < len(tasks.questions)
    again = start(tasks, data, out, Reader(tasks, PROMPTS))
    assert [s.uid for s in again] == [q.uid for g in groups_of(tasks) for q in g.questions]
    lines = samples.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["uid"] for line in lines}) == len(tasks.questions)


def test_comparison_sees_a_paired_difference(tasks, data, tmp_path):
    start(tasks, data, tmp_path / "a", Reader(tasks, PROMPTS, wrong=lambda q: q.task == "ocr"))
    start(tasks, data, tmp_path / "b", Reader(tasks, PROMPTS))
    found = compare(tmp_path / "a", tmp_path / "b")
    _, _, ocr = found.tasks["ocr"]
    assert (ocr.difference, ocr.better, ocr.worse) == (1.0, 8, 0) and ocr.p_value == pytest.approx(2 / 2**8)
    assert found.tasks["num_nodes"][2].difference == 0.0 and found.tasks["mermaid:link_f1"][1] == 1.0
    assert found.only_a == found.only_b == 0


def test_runs_on_other_questions_of_the_same_names_are_not_compared(tasks, data, tmp_path):
    write_dataset(GenerateConfig(count=8, seed=6, renderer="pillow"), tmp_path / "other")
    for name, folder in (("a", data), ("b", tmp_path / "other")):
        mine = load_task("flowlearn/sim-word/true_a_to_b", folder)
        start(mine, folder, tmp_path / name, Reader(mine, PROMPTS))
    with pytest.raises(ValueError, match="8 questions or references differ"):  # every answer is `true` in both
        compare(tmp_path / "a", tmp_path / "b")
