import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from headrace.cli.tokenizer_pictures import FolderPictures
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS

RECIPE = Path(__file__).parents[2] / "recipes" / "uniflow.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("uniflow_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_run_and_leave_a_model_with_latent_statistics(recipe, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = UniFlow(recipe.tiny_config())
    assert recipe.train_tiny_teacher(model, steps=1, seed=0, batch=4) > 0
    settings = recipe.Recipe(out=tmp_path, steps=2, batch=4, precision="fp32")
    teacher = copy.deepcopy(model.encoder).eval()
    assert max(recipe.drift(model, teacher, count=2).values()) == pytest.approx(0, abs=1e-5)
    model.observe_latents(torch.full((1, 9, 64), 100.0))  # of an encoder that is no more
    monkeypatch.setattr(recipe, "MEASURED", 24)
    recipe.adapt(settings, model, teacher)
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"alpha/1", "weight/4", "flow/t3", "watched/psnr", "watched/seam", "latent/std"} <= set(logged)
    assert logged["watched/psnr"] > 0
    other = UniFlow(recipe.tiny_config()).encoder.eval()
    with pytest.raises(ValueError, match=r"holds another run.*'teacher'"):
        recipe.adapt(dataclasses.replace(settings, resume=True), UniFlow(recipe.tiny_config()), other)
    with pytest.raises(SystemExit, match="name it again: --teacher"):
        recipe.new_model(dataclasses.replace(settings, resume=True))
    again = UniFlow.from_pretrained(tmp_path / "model")
    assert again.latent_count.item() == 24 * 64
    pictures = recipe.ShapesAndPhotos(again.preprocessing, count=48, seed=1)
    with torch.no_grad():
        normal = again.normalise_latents(again.encode(pictures.batch(np.arange(48)))).flatten(0, 1)
    assert normal.mean(0).abs().mean() < 0.2
    assert normal.std(0).mean().item() == pytest.approx(1, abs=0.15)
    assert min(recipe.drift(again, teacher, count=2).values()) > 0
    figures = recipe.report(again, count=2)
    assert {"psnr_shapes_1step", "psnr_photos_4step", "seam_photos"} <= set(figures)
    recipe.save_copies(again, tmp_path / "copies.png", count=3)
    assert Image.open(tmp_path / "copies.png").size == (3 * 64, 4 * 64)


def test_a_kept_teacher_starts_another_run(recipe, tmp_path):
    trained = recipe.new_model(recipe.Recipe(out=tmp_path, teacher_steps=1))
    settings = recipe.Recipe(out=tmp_path / "b", teacher=tmp_path / "teacher", seed=5, weighting="last")
    again = recipe.new_model(settings)
    assert again.config.weighting == "last"
    assert torch.equal(again.encoder.blocks[0].attn.qkv.weight, trained.encoder.blocks[0].attn.qkv.weight)
    # two arms of a comparison begin alike, whether their teacher was trained just now or read
    same = recipe.new_model(recipe.Recipe(out=tmp_path / "c", teacher=tmp_path / "teacher", weighting="last"))
    for name, weight in trained.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    with pytest.raises(SystemExit, match="--teacher is for the tiny"):
        recipe.main(recipe.Recipe(out=tmp_path, encoder="dinov2_l", pictures=tmp_path, teacher=tmp_path))


def small_encoder(monkeypatch):
    """Make `dinov2_l` a few numbers wide and its published weights random; returns the names that were asked for."""
    asked, build = [], timm.create_model

    def create(name, *, pretrained=False, **options):
        asked.append((name, pretrained))
        return build(name.partition(".")[0], pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    vit = dataclasses.replace(ENCODERS["dinov2-l"], image_size=28, width=32, depth=2, heads=4)
    small = UniFlowConfig(
        encoder=vit, latent_channels=8, global_depth=1, global_heads=4, flow_depth=1, flow_width=588, init_gain=1.0
    )
    monkeypatch.setattr(UniFlowConfig, "dinov2_l", lambda: small)
    return asked


def pictures(folder):
    folder.mkdir()
    for index in range(3):
        array = np.random.default_rng(index).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{index}.png")
    return folder


def test_a_published_encoder_is_adapted_on_a_folder_of_pictures(recipe, tmp_path, monkeypatch):
    asked, folder, seen = small_encoder(monkeypatch), pictures(tmp_path / "pictures"), []
    read = FolderPictures.batch
    monkeypatch.setattr(FolderPictures, "batch", lambda self, indices: seen.extend(indices) or read(self, indices))
    models = []
    for ema in (None, 0.9):
        settings = recipe.Recipe(
            out=tmp_path / str(ema), encoder="dinov2_l", pictures=folder, steps=3, batch=2, precision="fp32", ema=ema
        )
        assert set(recipe.main(settings)) == {"adapting_cpu_seconds"}
        models.append(UniFlow.from_pretrained(settings.out / "model"))
    assert ("vit_large_patch14_dinov2.lvd142m", True) in asked
    assert models[0].latent_count.item() == 3 * 4
    assert max(seen) >= 3  # a later visit's crop
    assert not torch.equal(models[0].from_latent.c_fc.weight, models[1].from_latent.c_fc.weight)
    with pytest.raises(SystemExit, match="needs --pictures"):
        recipe.main(recipe.Recipe(out=tmp_path, encoder="dinov2_l"))


def test_a_picture_that_cannot_be_trained_on_is_named(recipe, tmp_path, monkeypatch):
    small_encoder(monkeypatch)
    folder = pictures(tmp_path / "pictures")
    settings = recipe.Recipe(
        out=tmp_path / "out", encoder="dinov2_l", pictures=folder, steps=1, batch=3, precision="fp32"
    )
    Image.new("RGBA", (40, 40)).save(folder / "1.png")
    with pytest.raises(ValueError, match=r"1\.png.*alpha"):
        recipe.main(settings)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png"):
        recipe.main(settings)


def test_the_probe_reads_what_is_there_and_nothing_else(recipe):
    class Coarse(torch.nn.Module):
        num_prefix_tokens = 0

        def forward_features(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)[:, None]

    class Blind(Coarse):
        def forward_features(self, images):
            return torch.ones(len(images), 1, 5) + 0.01 * torch.randn(len(images), 1, 5)

    preprocessing = UniFlow(recipe.tiny_config()).preprocessing
    assert recipe.linear_probe(Coarse(), preprocessing, train=360, test=180) > 0.5
    assert recipe.linear_probe(Blind(), preprocessing, train=360, test=180) < 0.15
