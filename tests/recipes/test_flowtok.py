import importlib.util
from pathlib import Path

import pytest
import torch

from headrace.tokenizers.flowtok import FlowTok

RECIPE = Path(__file__).parents[2] / "recipes" / "flowtok.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("flowtok_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_stage_trains_its_own_part_and_leaves_a_model(recipe, tmp_path, capsys):
    settings = recipe.Recipe(out=tmp_path, steps=2, batch=8, pictures=72)
    recipe.main(settings)
    assert capsys.readouterr().out.count('"stage"') == 4
    model, start = FlowTok.from_pretrained(tmp_path / "model"), recipe.new_model(settings)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert {name.split(".")[0] for name in moved} == {"image", "to_image", "to_text"}
    assert model.scale != 1
    assert len(model.caption(torch.rand(1, 3, 32, 32), steps=1)) == 1


def test_the_critic_trains_beside_the_image_tokenizer(recipe, tmp_path, monkeypatch):
    class Plain(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).square().mean((1, 2, 3))

    monkeypatch.setattr(recipe.EfficientNetLite0, "from_package", lambda: Plain())
    settings = recipe.Recipe(out=tmp_path, steps=2, batch=4, pictures=36, perceptual="efficientnet")
    model = recipe.new_model(settings)
    assert recipe.train_stage(settings, "image-tokenizer", model) > 0
    with pytest.raises(SystemExit, match="--vgg"):
        recipe.with_critic(recipe.Recipe(out=tmp_path, perceptual="lpips"), model)


def test_published_settings_cover_every_stage(recipe):
    assert set(recipe.PUBLISHED) == set(recipe.TINY) == set(recipe.STAGES)
    assert recipe.PUBLISHED["text-to-image"].batch == 4096
