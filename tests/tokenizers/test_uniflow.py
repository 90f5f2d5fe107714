import dataclasses

import pytest
import torch

from headrace.nn.patches import unpatchify
from headrace.tokenizers.auto import tokenizer_class
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS, ViTConfig, build_vit
from headrace.tokenizers.uniflow_loss import uniflow_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniFlow(UniFlowConfig.tiny()).eval()


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_one_step_is_noise_plus_velocity(model):
    latents, noise = model.encode(pictures(2, 3, 64, 64)), torch.randn(128, 192)
    condition = model.condition(latents, (8, 8)).flatten(0, 1)
    wanted = noise + model.flow_head(noise, torch.zeros(128), condition)
    got = model.decode(latents, steps=1, noise=noise)
    torch.testing.assert_close(got, unpatchify(wanted.reshape(2, 64, 192), (8, 8)), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_an_image_decodes_alike_alone_and_in_a_batch(model):
    latents = model.encode(pictures(3, 3, 64, 64))
    together = model.decode(latents, steps=2)
    torch.testing.assert_close(model.decode(latents[1:2], steps=2), together[1:2], atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.decode(latents, seed=1), model.decode(latents, seed=2))


@torch.no_grad()
def test_wide_grids_pass_through_and_need_the_grid_back(model):
    wide = pictures(1, 3, 48, 96)
    latents = model.encode(wide)
    assert latents.shape == (1, 72, 32)
    assert model.decode(latents, grid=(6, 12)).shape == wide.shape
    assert model.reconstruct(wide).shape == wide.shape
    with pytest.raises(ValueError, match=r"72 tokens are no square"):
        model.decode(latents)
    with pytest.raises(ValueError, match=r"72 tokens do not fill a grid of 8 x 8"):
        model.decode(latents, grid=(8, 8))


def test_other_grids_are_refused_when_interpolation_is_off():
    config = UniFlowConfig(
        encoder=ENCODERS["tiny"], latent_channels=8, global_depth=1, flow_depth=1, interpolate_positions=False
    )
    model = UniFlow(config)
    with pytest.raises(ValueError, match=r"grid of 16 x 16.*interpolate_positions is off; resize to 64 x 64"):
        model.encode(pictures(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(1, 4, 64, 64), "drop the alpha channel"),
        (torch.full((1, 3, 64, 64), 255.0), r"values in \[255, 255\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 60, 64), "60 x 64 px does not divide into patches of 8 px"),
        (torch.zeros(0, 3, 64, 64), "shape"),
        (torch.full((1, 3, 64, 64), torch.nan), r"values in \[nan, nan\]"),
    ],
)
def test_bad_images_are_named(model, images, said):
    with pytest.raises(ValueError, match=said):
        model.encode(images)


@torch.no_grad()
def test_targets_of_narrow_encoders_are_widened_and_come_back(model):
    wide = UniFlow(dataclasses.replace(model.config, target_scale=2.0)).eval()
    wide.load_state_dict(model.state_dict())
    latents = model.encode(pictures(2, 3, 64, 64))
    torch.testing.assert_close(2 * wide.decode(latents, steps=2), model.decode(latents, steps=2))
    # A head that says nothing errs by target minus noise: mean square (2 * 0.5)^2 + 1 instead of 0.5^2 + 1.
    for scale, wanted in ((1.0, 1.25), (2.0, 2.0)):
        silent = UniFlow(dataclasses.replace(model.config, zero_init=True, target_scale=scale, distill_weight=0.0))
        terms = uniflow_loss(silent, torch.full((4, 3, 64, 64), 0.5), generator=torch.Generator().manual_seed(0))
        assert terms.flow.item() == pytest.approx(wanted, abs=0.05)


@torch.no_grad()
def test_latents_and_noise_of_another_shape_are_named(model):
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, T, 32\), got \(1, 64, 31\)"):
        model.decode(torch.zeros(1, 64, 31))
    with pytest.raises(ValueError, match=r"noise must have shape \(64, 192\), got \(64, 191\)"):
        model.decode(torch.zeros(1, 64, 32), noise=torch.zeros(64, 191))
    with pytest.raises(ValueError, match=r"noise must have shape \(128, 192\), got \(64, 192\)"):
        model.decode(torch.zeros(2, 64, 32), noise=torch.zeros(64, 192))


@torch.no_grad()
def test_merged_features_keep_neighbours_together(model):
    images = pictures(1, 3, 64, 64)
    plain, merged = model.features(images), model.features(images, merge=2)
    assert merged.shape == (1, 16, 1024)
    torch.testing.assert_close(merged[0, 0], torch.cat([plain[0, i] for i in (0, 1, 8, 9)]))
    with pytest.raises(ValueError, match="merge 3 does not divide a grid of 8 x 8"):
        model.features(images, merge=3)


def test_running_latent_statistics_are_those_of_all_latents_seen(model, tmp_path):
    fresh = UniFlow(UniFlowConfig.tiny())
    latents = torch.randn(6, 64, 32) * 3 + 1
    with pytest.raises(ValueError, match="observe_latents"):
        fresh.normalise_latents(latents)
    for part in latents.split([1, 2, 3]):
        fresh.observe_latents(part)
    normal = fresh.normalise_latents(latents).flatten(0, 1)
    torch.testing.assert_close(normal.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(fresh.denormalise_latents(fresh.normalise_latents(latents)), latents)
    fresh.save_pretrained(tmp_path)
    again = UniFlow.from_pretrained(tmp_path)
    assert torch.equal(again.latent_std(), fresh.latent_std())
    assert torch.equal(again.encode(pictures(1, 3, 64, 64)), fresh.eval().encode(pictures(1, 3, 64, 64)))


def test_the_table_finds_it_and_published_sizes_build():
    assert tokenizer_class("uniflow") is UniFlow
    with torch.device("meta"):
        sizes = {name: UniFlow(getattr(UniFlowConfig, name)()) for name in UniFlow.VARIANTS[:4]}
    assert [m.tokens_per_image for m in sizes.values()] == [1024, 1369, 256, 256]
    assert all(m.flow_head.config.width >= m.flow_head.config.patch_dim for m in sizes.values())


@pytest.mark.parametrize(("name", "prefix"), [("dinov2-l-reg4", 5), ("siglip2-so400m", 0), ("dfn-clip-l", 1)])
def test_prefix_tokens_of_every_encoder_kind_are_dropped(name, prefix):
    published = ENCODERS[name]
    patch = published.patch
    small = ViTConfig(
        name=published.name, tag="", image_size=4 * patch, patch=patch, width=32, depth=1, heads=4, drop_path=0.0
    )
    assert build_vit(small).num_prefix_tokens == prefix
    model = UniFlow(UniFlowConfig(encoder=small, global_heads=4, global_depth=1, flow_depth=1, flow_width=3 * patch**2))
    assert model.hidden(torch.zeros(1, 3, 2 * patch, 3 * patch))[1].shape == (1, 6, 32)


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="flow head is 384 wide but a patch has 588"):
        UniFlowConfig(encoder=ViTConfig(width=384, heads=6))
    with pytest.raises(ValueError, match=r"timm knows no architecture 'vit_nothing'"):
        ViTConfig(name="vit_nothing")
    with pytest.raises(ValueError, match="no tag"):
        UniFlow.adapt(UniFlowConfig.tiny())
