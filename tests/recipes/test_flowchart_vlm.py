"""The flowchart recipe: packed questions cost what each costs alone, and the saved model answers through the runner."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from headrace.datasets.flowlearn.prompts import PROMPT_SETS
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.auto import load_vlm
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
    write_dataset(GenerateConfig(count=4, seed=1, renderer="pillow", variant="char"), folder)
    return folder


@pytest.fixture(scope="module")
def recipe(script, charts, tmp_path_factory):
    return script.Recipe(
        data=(charts,), out=tmp_path_factory.mktemp("run"), size=64, width=64, vision_layers=2, text_layers=2, steps=2,
        batch_size=2, long_share=1.0, threads=1, precision="fp32",
    )  # fmt: skip


def test_tokenizer_gives_every_answer_back(script, charts):
    tokenizer = script.tiny_tokenizer()
    for question in load_task("flowlearn/sim-char", charts).questions:
        for text in (question.answer, question.question):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_packed_questions_cost_what_each_costs_alone(script, recipe):
    model, processor = script.build(recipe)
    trained = script.Trained(model).eval()
    batch = script.ChartBatches(script.read_rows(recipe.data), processor.tokenizer, recipe).at(0)
    with torch.no_grad():
        packed = trained.loss(batch, 0.0)["total"]
        pixels = (batch["images"].permute(0, 3, 1, 2).float() - trained.mean) / trained.std
        losses = []
        for image in range(recipe.batch_size):
            for number in range(int(batch["block"][image].max()) + 1):
                here = batch["block"][image] == number
                ids, target = batch["ids"][image][here], batch["target"][image][here]
                prefix = torch.tensor([1] + [model.config.image_token_id] * 16)
                whole = torch.cat([prefix, ids])[None]
                logits = model(input_ids=whole, pixel_values=pixels[image : image + 1]).logits[0, -len(ids) :]
                losses += torch.nn.functional.cross_entropy(logits, target, reduction="none")[target != -100].tolist()
    assert packed.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_two_steps_give_a_model_that_the_runner_scores(script, recipe, charts):
    folder = script.main(recipe)
    tasks, prompts = load_task("flowlearn/sim-char/num_nodes", charts), PROMPT_SETS["short-1"]
    identity = run_identity(tasks, prompts, model="tiny", pruning=None, data=charts, split="test")
    out = recipe.out / "eval"
    samples = run(tasks, lambda: load_vlm(folder), data=charts, out=out, identity=identity, prompts=prompts)
    assert len(samples) == 4 and not any(s.error for s in samples)
    assert json.loads((out / "results.json").read_text())["tasks"]["num_nodes"]["count"] == 4
