import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.datasets.captioned_shapes import CAPTIONS
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.tokenflow_critic import PatchCritic
from headrace.training.log import read_log

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
    # going on with an earlier stage leaves what later stages have trained
    recipe.main(dataclasses.replace(settings, stage="text-to-image", resume=True))
    again = FlowTok.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, again.to_text.get_parameter(name)) for name, p in model.to_text.named_parameters())
    assert torch.equal(again.to_image.velocity.out.weight, model.to_image.velocity.out.weight)


def test_what_was_trained_since_outlives_the_checkpoint_of_a_stage_that_goes_on(recipe, tmp_path, monkeypatch):
    flow = dataclasses.replace(recipe.TINY["text-to-image"], cosine=False)
    monkeypatch.setitem(recipe.TINY, "text-to-image", flow)
    recipe.new_model(recipe.Recipe(out=tmp_path)).save_pretrained(tmp_path / "model")
    settings = recipe.Recipe(out=tmp_path, stage="text-to-image", steps=1, batch=4, pictures=8)
    recipe.main(settings)
    model = FlowTok.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.scale.fill_(7.0)
        model.image.decoder.mask_token.fill_(0.5)
    model.save_pretrained(tmp_path / "model")
    seen, loss = [], recipe.text_to_image_loss

    def watched(model, *inputs, **options):
        seen.append((model.scale.item(), model.image.decoder.mask_token.mean().item()))
        return loss(model, *inputs, **options)

    monkeypatch.setattr(recipe, "text_to_image_loss", watched)
    recipe.main(dataclasses.replace(settings, steps=2, resume=True))
    again = FlowTok.from_pretrained(tmp_path / "model")
    assert seen == [(7.0, 0.5)]
    assert again.scale == 7 and again.image.decoder.mask_token.mean() == 0.5


def test_an_earlier_model_goes_on_with_other_data_and_keeps_its_size(recipe, tmp_path):
    model = recipe.new_model(recipe.Recipe(out=tmp_path, image_size=64))
    with torch.no_grad():
        model.image.decoder.mask_token.fill_(0.5)
    model.save_pretrained(tmp_path / "first")
    begun = recipe.first_model(recipe.Recipe(out=tmp_path / "new", start=tmp_path / "first"))
    assert torch.equal(begun.image.decoder.mask_token, model.image.decoder.mask_token)
    flow = {"out": tmp_path / "second", "start": tmp_path / "first", "stage": "text-to-image"}
    recipe.main(recipe.Recipe(**flow, steps=1, batch=4, pictures=8))
    again = FlowTok.from_pretrained(tmp_path / "second" / "model")
    assert again.config.image.image_size == 64
    assert torch.equal(again.image.decoder.mask_token, model.image.decoder.mask_token)
    with pytest.raises(SystemExit, match=r"--size xl, but the model in .*first has tiny; leave --size out"):
        recipe.main(recipe.Recipe(**flow, size="xl"))
    with pytest.raises(SystemExit, match=r"--image-size 32, but the model in .*first has 64"):
        recipe.main(recipe.Recipe(**flow, image_size=32))
    with pytest.raises(SystemExit, match="--size b"):
        recipe.main(recipe.Recipe(out=tmp_path / "second", stage="image-to-text", size="b"))


def test_the_critic_trains_beside_the_image_tokenizer(recipe, tmp_path, monkeypatch):
    class Plain(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).square().mean((1, 2, 3))

    critics = []

    def critic():
        made = PatchCritic(width=8, layers=2)
        critics.append((made, made.net[0].weight.detach().clone()))
        return made

    monkeypatch.setattr(recipe.EfficientNetLite0, "from_package", lambda: Plain())
    monkeypatch.setattr(recipe, "PatchCritic", critic)
    tiny = recipe.TINY["image-tokenizer"]
    assert tiny.adversarial_start < tiny.steps
    monkeypatch.setitem(recipe.TINY, "image-tokenizer", dataclasses.replace(tiny, adversarial_start=2))
    settings = recipe.Recipe(out=tmp_path, steps=3, batch=4, pictures=36, perceptual="efficientnet")
    model = recipe.new_model(settings)
    assert recipe.train_stage(settings, "image-tokenizer", model) > 0
    ((trained, before),) = critics
    assert not torch.equal(trained.net[0].weight, before)
    assert [row["critic"] > 0 for row in read_log(tmp_path / "image-tokenizer" / "log.jsonl")] == [False, True, True]
    assert recipe.with_critic(settings, tiny, model).config.kl == tiny.divergence
    assert recipe.with_critic(recipe.Recipe(out=tmp_path), tiny, model) is None
    with pytest.raises(SystemExit, match="--vgg"):
        recipe.with_critic(recipe.Recipe(out=tmp_path, perceptual="lpips"), tiny, model)
    with pytest.raises(SystemExit, match="--vgg is read by --perceptual lpips only"):
        recipe.with_critic(dataclasses.replace(settings, vgg=tmp_path / "vgg.pth"), tiny, model)


def test_published_settings_cover_every_stage(recipe):
    assert set(recipe.PUBLISHED) == set(recipe.TINY) == set(recipe.STAGES)
    assert recipe.PUBLISHED["text-to-image"].batch == 4096


def test_flowcharts_are_a_second_source_beside_the_shapes(recipe, tmp_path):
    write_dataset(GenerateConfig(count=6, variant="char", renderer="pillow"), tmp_path / "charts")
    settings = recipe.Recipe(
        out=tmp_path / "run", source="both", charts=tmp_path / "charts", pictures=4, steps=1, batch=4, image_size=64
    )
    joined = recipe.pictures_of(settings, 64)
    images, label = joined.batch(np.array([9, 1, 4]))
    assert len(joined) == 10
    assert torch.equal(images[0], joined.first.batch(np.array([1])).images[0])
    assert torch.equal(images[1:], joined.second.batch(np.array([5, 0])).images)
    assert "flowchart" in joined.captions[label[1]]
    assert "flowchart" not in joined.captions[label[0]]
    recipe.main(settings)
    model = FlowTok.from_pretrained(tmp_path / "run" / "model")
    assert model.generate(["white flowchart down three boxes", "red square top left"], steps=1).shape[-1] == 64
    with pytest.raises(SystemExit, match="--charts"):
        recipe.pictures_of(recipe.Recipe(out=tmp_path, source="charts"), 32)


def test_stored_posteriors_are_those_of_the_pictures(recipe, tmp_path):
    model = recipe.new_model(recipe.Recipe(out=tmp_path)).eval()
    pictures = recipe.CaptionedShapes(size=32, count=7)
    coded = recipe.CodedPictures(model, pictures, size=3).batch(np.array([5, 2]))
    with torch.no_grad():
        wanted = model.posterior(pictures.batch(np.array([5, 2])).images)
    torch.testing.assert_close(coded.mean, wanted.mean)
    torch.testing.assert_close(coded.logvar, wanted.logvar)
    assert coded.label.tolist() == [5, 2]


def test_uncaptioned_pictures_are_decoded_with_the_empty_caption(recipe, tmp_path, monkeypatch):
    model = recipe.new_model(recipe.Recipe(out=tmp_path))
    empty, seen = model.captions.ids([""]), []
    monkeypatch.setattr(model.captions, "forward", lambda ids: seen.append(ids) or torch.zeros(len(ids), 12, 32))
    batch = recipe.CaptionedShapes(size=32, count=40).batch(np.arange(40))
    for share in (0.0, 0.5, 1.0):
        loss = recipe.StageLoss("image-tokenizer", model.captions.ids(CAPTIONS), empty, uncaptioned=share)
        loss(model, batch, torch.Generator().manual_seed(0))
    bare = [int((ids == empty).all(1).sum()) for ids in seen]
    assert bare[0] == 0
    assert 10 < bare[1] < 30
    assert bare[2] == 40
