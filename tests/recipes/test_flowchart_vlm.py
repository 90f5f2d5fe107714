"""The flowchart recipe: packed questions cost what each costs alone, and the trained model answers in the runner."""

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.datasets.flowlearn.generate import make_chart
from headrace.datasets.flowlearn.prompts import PROMPT_SETS
from headrace.datasets.flowlearn.published import read_mermaid
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.auto import load_vlm
from headrace.vlm.chart_questions import canonical, chart_tokenizer, training_questions
from headrace.vlm.sequence import pad_sequences
from headrace.vlm.vqa_data import load_task
from headrace.vlm.vqa_run import run, run_identity

SCRIPT = Path(__file__).parents[2] / "recipes" / "flowchart_vlm.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("flowchart_vlm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    write_dataset(GenerateConfig(count=16, seed=1, renderer="pillow", variant="char"), folder)
    return folder


@pytest.fixture(scope="module")
def recipe(script, charts, tmp_path_factory):
    return script.Recipe(
        stage="joint", data=(charts,), out=tmp_path_factory.mktemp("run"), width=64, vision_layers=3, text_width=48,
        text_layers=2, stem=(4, 8, 8, 16, 16), steps=2, batch_size=2, long_share=1.0, precision="fp32",
    )  # fmt: skip


def test_tokenizer_gives_every_answer_back(charts):
    tokenizer = chart_tokenizer()
    for question in load_task("flowlearn/sim-char", charts).questions:
        for text in (question.answer, question.question):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_canonical_mermaid_says_what_the_chart_says():
    for index in range(30):
        graph = make_chart(0, index, variant="char").graph
        said = dict(training_questions(
            graph, None, PROMPT_SETS["short-1"], random.Random(index), statements=1, long_share=1.0
        ))  # fmt: skip
        read = read_mermaid(said["mermaid:"])
        assert read.nodes == graph.label_set() and read.links == graph.link_set()
        assert canonical(graph).link_set() == graph.link_set()
        for node in (n for n in graph.nodes if f"{n.label}?" in said):
            reached = {graph.label[e.target] for e in graph.edges if e.source == node.id}
            assert set(said[f"{node.label}?"].split()) == (reached or {"-"})


def test_packed_questions_cost_what_each_costs_alone(script, recipe):
    model = script.build(recipe)
    training = script.Training(model).eval()
    facts = make_chart(0, 1, variant="char")
    asked = training_questions(facts.graph, facts.boxed, script.PROMPTS, random.Random(0), statements=1, long_share=1.0)
    count = model.encoder.tokens_per_picture
    rows = torch.randn(1, count, recipe.text_width)
    packed = script.pack([asked], model.tokenizer, after=script.TEMPLATE.after)
    batch = packed._asdict() | script._stacked([script.node_facts(facts.graph, facts.boxed)])
    with torch.no_grad():
        together = training._answers(rows, batch)["answers"].item()
        total, scored = 0.0, 0
        for question, answer in asked:
            one = model.example(question, answer)
            loss = model(pad_sequences([one]), {"picture": rows[0]}).by_modality["text"].item()
            length = int((one.loss_weight > 0).sum())
            total, scored = total + loss * length, scored + length
    assert together == pytest.approx(total / scored, rel=1e-4)


def test_canvas_of_a_few_cells_is_the_whole_one_where_it_lies(script, recipe):
    """With the whole canvas the recipe's encoder is the model's own."""
    model = script.build(recipe)
    training = script.Training(model).eval()
    images = torch.randint(0, 256, (2, 512, 512, 3), dtype=torch.uint8)
    with torch.no_grad():
        rows, cls, _ = training.encode(images, torch.zeros(2, 2, dtype=torch.int64))
        own = model.encoder.inner.forward_features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(torch.cat([cls[:, None], rows], dim=1), own, atol=1e-5)


def test_windows_hold_the_letter_that_they_name(script, recipe, charts):
    """The box's middle lies in the patch that is told its letter, wherever the window was cut."""
    drawn = [chart._replace(pixels=chart.pixels.copy()) for chart in script.read_drawn(charts, longest=512)]
    for number, chart in enumerate(drawn):  # paint each box's middle in a colour that says its letter
        for node in chart.graph.nodes:
            x, y = (int((node.box[i] + node.box[i + 2]) / 2) for i in (0, 1))
            chart.pixels[y, x] = (1, 2, script.LETTERS.index(node.label))
        drawn[number] = chart
    source = script.ChartBatches(drawn, replace(recipe, batch_size=4), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "varied", lambda chart, letters, rng, framed_share: chart)
        batch = script.WindowBatches(source).at(3)
    images, letter = batch["images"], batch["letter"]
    assert images.shape[1:] == (64, 64, 3) and (letter >= 0).any() and batch["head"].any()
    cells = images.reshape(-1, 2, 32, 2, 32, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 32 * 32, 3)
    marked = (cells[..., 0] == 1) & (cells[..., 1] == 2)
    assert torch.equal(marked.any(-1), letter >= 0)
    for window, cell in (letter >= 0).nonzero().tolist():
        assert (cells[window, cell][marked[window, cell]][:, 2] == letter[window, cell]).all()


def test_a_patch_knows_the_sides_that_a_line_crosses_and_the_head(script):
    line = script.np.array([[-1, 0], [0, 0], [0, 0], [1, 0], [1, 1]])  # from the left, over the top, down to the corner
    told = script.window_targets([(script.np.array([1, 1]), 4, True), (script.np.array([2, 0]), 5, False)], [line])
    assert told["framed"].tolist() == [0, 0, 0, 1]
    assert told["letter"].tolist() == [-100, -100, -100, 4] and told["head"].tolist() == [0, 0, 0, 1]
    left, right, top, bottom = told["sides"].T
    assert left.tolist() == [1, 1, 0, 0] and right.tolist() == [1, 0, 0, 0]
    assert top.tolist() == [0, 0, 0, 1] and bottom.tolist() == [0, 1, 0, 0]


def test_stages_give_a_model_that_the_runner_scores(script, recipe, charts):
    for stage in ("language", "stem", "encoder"):
        assert script.main(replace(recipe, stage=stage)) == recipe.out / stage
    before = (recipe.out / "language" / "weights.safetensors").stat().st_size
    assert before > 0
    folder = script.main(recipe)
    again = replace(recipe, out=recipe.out / "again", start=recipe.out / "joint" / "weights.safetensors")
    assert script.main(again) == again.out / "model"
    tasks, prompts = load_task("flowlearn/sim-char/num_nodes", charts), PROMPT_SETS["short-1"]
    identity = run_identity(tasks, prompts, model="tiny", pruning=None, data=charts, split="test")
    out = recipe.out / "eval"
    samples = run(tasks, lambda: load_vlm(folder), data=charts, out=out, identity=identity, prompts=prompts)
    assert len(samples) == 16 and not any(s.error for s in samples)
    assert json.loads((out / "results.json").read_text())["tasks"]["num_nodes"]["count"] == 16


def test_joint_stage_asks_for_the_other_two(script, recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="run --stage language first"):
        script.main(replace(recipe, out=tmp_path))


def test_lookup_heads_ask_for_the_box_of_each_letter_and_its_arrows_with_the_first(script):
    from headrace.vlm.chart_heads import Facts, LookupHeads

    letter = torch.tensor([[0, 1, 2, -100]])  # A -> B, C -> A
    out, into = torch.zeros(2, 1, 4, 26)
    out[0, 0, 1] = into[0, 1, 0] = out[0, 2, 0] = into[0, 0, 2] = 1
    facts = Facts(letter, out, into, torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1))
    heads = LookupHeads(8)
    letters = torch.tensor([[0, -1, 1, 2, 25, 0]])
    block = torch.tensor([[0, 0, 0, 1, 1, -1]])
    hidden = torch.randn(1, 6, 8)

    def losses(known, pair):
        answers = (heads.known.register_forward_hook(lambda module, args, result: known.expand_as(result)),
                   heads.pair.register_forward_hook(lambda module, args, result: pair.expand_as(result)))  # fmt: skip
        found = heads.losses(hidden, hidden, letters, block, facts)
        for answer in answers:
            answer.remove()
        return found["known"].item(), found["pair"].item()

    # A, B and C are asked, with 2, 1 and 1 neighbours that -20 denies; Z is no box, the last A is padding.
    # Of pairs there is B after A, an arrow from A only; C is its question's first.
    denied, right = losses(torch.full((52,), -20.0), torch.tensor([20.0, -20.0]))
    assert denied == pytest.approx(20 * 4 / 3, rel=1e-4) and right == pytest.approx(0, abs=1e-6)
    truth = torch.full((1, 6, 52), -20.0)
    truth[0, 0, [1, 26 + 2]] = truth[0, 2, 26 + 0] = truth[0, 3, 0] = 20.0  # leads to, comes from, by place in the text
    exact, wrong = losses(truth, torch.tensor([-20.0, 20.0]))
    assert exact == pytest.approx(0, abs=1e-5) and wrong == pytest.approx(20, rel=1e-4)


def test_frozen_stages_stay_and_the_others_learn(script, recipe):
    model = script.build(recipe)
    stages = model.encoder.inner.patch_embed.stages
    script.freeze(model.encoder.inner.patch_embed, 3)
    convolutions = [m for m in stages if isinstance(m, torch.nn.Conv2d)]
    assert [all(p.requires_grad for p in m.parameters()) for m in convolutions] == [False, False, False, True, True]
    assert not any(p.requires_grad for m in list(stages)[:8] for p in m.parameters())  # the residual block is in it
    assert all(p.requires_grad for m in list(stages)[8:] for p in m.parameters())


def test_frozen_stages_are_refused_where_nothing_else_would_learn(script, recipe):
    with pytest.raises(ValueError, match="--frozen is for the stages encoder and joint"):
        script.main(replace(recipe, stage="stem", frozen=2))
