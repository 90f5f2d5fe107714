import dataclasses

import pytest
import torch

from headrace.tokenizers.auto import tokenizer_class
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_bridge import TextToImage, draw_flags, indicator_velocity, swap_flagged, transport
from headrace.tokenizers.flowtok_captions import CaptionConfig, CaptionIds
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_image import TokenVAE, TokenVAEConfig
from headrace.tokenizers.flowtok_import import image_config, load_image_tokenizer, official_state

CAPTIONS = ["red square top left", "blue circle bottom right"]


def randomised(model):
    """Zero-initialised layers drawn at random, so that velocities are not zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomised(FlowTok(FlowTokConfig.tiny()))


def images(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_tokens_have_one_shape_on_both_sides_and_the_scale_is_undone(model):
    tokens = model.encode(images())
    assert tokens.shape == (2, 12, 4) == model.to_image.projector(model.text_tokens(CAPTIONS)).mean.shape
    scaled = FlowTok(dataclasses.replace(model.config, scale_factor=2.0)).eval()
    state = model.state_dict() | {"scale": torch.tensor(2.0)}
    scaled.load_state_dict(state)
    torch.testing.assert_close(scaled.encode(images()), 2 * tokens)
    decoded = model.decode(tokens, captions=CAPTIONS)
    torch.testing.assert_close(scaled.decode(2 * tokens, captions=CAPTIONS), decoded, atol=1e-5, rtol=1e-5)
    assert decoded.shape == (2, 3, 32, 32)


@torch.no_grad()
def test_measured_scale_gives_tokens_of_deviation_one(model):
    fresh = FlowTok(FlowTokConfig.tiny()).eval()
    fresh.measure_scale(images(16))
    assert fresh.encode(images(16)).std().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_both_directions_run_and_the_seed_decides_the_image(model):
    one, again = model.generate(CAPTIONS, steps=2, seed=1), model.generate(CAPTIONS, steps=2, seed=1)
    assert torch.equal(one, again) and one.min() >= 0 and one.max() <= 1
    assert not torch.equal(one, model.generate(CAPTIONS, steps=2, seed=2))
    noise_free = model.generate(CAPTIONS, steps=2, seed=None)
    assert torch.equal(noise_free, model.generate(CAPTIONS, steps=2, seed=None))
    words = model.caption(images(3), steps=2)
    assert len(words) == 3 and all(isinstance(text, str) for text in words)


def test_saved_model_gives_the_same_images(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = FlowTok.from_pretrained(tmp_path)
    assert torch.equal(again.generate(CAPTIONS, steps=2), model.generate(CAPTIONS, steps=2))
    assert tokenizer_class("flowtok") is FlowTok


def test_an_image_is_its_tokens_decoded_with_the_caption(model):
    tokens = model.generate_tokens(CAPTIONS, steps=2, seed=1)
    assert torch.equal(model.decode(tokens, captions=CAPTIONS).clamp(0, 1), model.generate(CAPTIONS, steps=2, seed=1))
    assert not torch.equal(model.decode(tokens).clamp(0, 1), model.generate(CAPTIONS, steps=2, seed=1))


def test_tokens_begin_at_the_wanted_log_variance():
    config = FlowTokConfig.tiny()
    assert FlowTok(config).posterior(images()).logvar.mean().item() == pytest.approx(-10, abs=0.5)
    released = dataclasses.replace(config, image=dataclasses.replace(config.image, initial_logvar=0.0))
    assert FlowTok(released).posterior(images()).logvar.mean().item() == pytest.approx(0, abs=0.5)
    with pytest.raises(ValueError, match="initial_logvar"):
        dataclasses.replace(config.image, initial_logvar=99.0)


def test_guidance_of_a_model_trained_without_the_indicator_is_refused():
    with pytest.raises(ValueError, match="guidance=1"):
        dataclasses.replace(FlowTokConfig.tiny(), indicator_probability=0.0)
    config = dataclasses.replace(FlowTokConfig.tiny(), indicator_probability=0.0, guidance=1.0)
    plain = FlowTok(config).eval()
    plain.generate(CAPTIONS, steps=1)
    with pytest.raises(ValueError, match="trained without it"):
        plain.generate(CAPTIONS, steps=1, guidance=2.0)
    with pytest.raises(ValueError, match="trained without it"):
        plain.caption(images(), guidance=2.0)


@pytest.mark.parametrize("guidance", [-1.0, float("nan"), float("inf")])
def test_a_guidance_that_is_no_scale_is_refused(guidance):
    with pytest.raises(ValueError, match="finite number of at least 0"):
        FlowTok(FlowTokConfig.tiny()).generate(CAPTIONS, steps=1, guidance=guidance)


def test_no_image_to_text_half_is_said():
    with pytest.raises(ValueError, match="no image-to-text half"):
        FlowTok(dataclasses.replace(FlowTokConfig.tiny(), to_text=None)).caption(images())


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.rand(1, 4, 32, 32), "drop or blend the alpha"),
        (torch.rand(1, 3, 32, 32) * 255, "values in"),
        (torch.rand(1, 3, 48, 32), r"\(B, 3, 32, 32\)"),
    ],
)
def test_bad_images_are_named(model, batch, said):
    with pytest.raises(ValueError, match=said):
        model.encode(batch)


@pytest.mark.parametrize("shape", [(2, 11, 4), (2, 12, 5), (12, 4)])
def test_tokens_of_another_shape_are_named(model, shape):
    with pytest.raises(
        ValueError, match=rf"latents must have shape \(B, 12, 4\), got \({', '.join(map(str, shape))}\)"
    ):
        model.decode(torch.zeros(shape))


def test_bad_captions_are_named(model):
    with pytest.raises(ValueError, match=r"outside the vocabulary: purple"):
        model.generate(["purple square"])
    with pytest.raises(ValueError, match="may have 10 tokens, this one has 11"):
        model.generate([" ".join(["red"] * 11)])
    with pytest.raises(ValueError, match="list with at least one"):
        model.generate("red square")
    with pytest.raises(ValueError, match="2 images need as many captions, got 1"):
        model.decode(torch.zeros(2, 12, 4), captions=CAPTIONS[:1])


def test_caption_ids_round_trip_and_are_padded_after_the_end():
    ids = CaptionIds(CaptionConfig(words=("red", "dot"), context=6, width=8, heads=2))
    row = ids(["Red dot dot"])
    assert row.tolist() == [[1, 3, 4, 4, 2, 0]]
    assert ids.text(row) == ["red dot dot"]


@torch.no_grad()
def test_latents_are_unturned_and_patches_are_turned(model):
    batch, encoder = images(1), TokenVAE(model.config.image).encoder
    for block in encoder.tower.transformer:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    before = encoder(batch)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = TokenVAE(model.config.image).encoder
    shuffled.load_state_dict(encoder.state_dict())
    shuffled.queries.copy_(encoder.queries[order])
    shuffled.query_positions.copy_(encoder.query_positions[order])
    torch.testing.assert_close(shuffled(batch), before[:, order], atol=1e-5, rtol=1e-5)
    swapped = batch.clone()
    swapped[..., :8, :8], swapped[..., 8:16, :8] = batch[..., 8:16, :8], batch[..., :8, :8]
    assert (encoder(swapped) - before).abs().max() > 1e-4


@torch.no_grad()
def test_rotation_is_the_decoders_only_sense_of_place(model):
    decoder = model.image.decoder
    latents, text = torch.randn(1, 12, 4), model.text_tokens(CAPTIONS[:1])
    spread = decoder.cells(latents, text)
    assert (spread.amax(1) - spread.amin(1)).max() > 1e-4
    blind = TokenVAE(model.config.image).decoder
    blind.load_state_dict(decoder.state_dict())
    blind.tower.cos.fill_(1.0)
    blind.tower.sin.zero_()
    flat = blind.cells(latents, text)
    assert (flat.amax(1) - flat.amin(1)).max() < 1e-5


def test_published_sizes():
    with torch.device("meta"):
        for name, millions in (("b", 153), ("xl", 698), ("h", 1100)):
            config = getattr(FlowTokConfig, name)()
            bridge = TextToImage(768, config.projector, config.net)
            assert sum(p.numel() for p in bridge.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
        image = TokenVAE(TokenVAEConfig())
    assert image.config.tokens == FlowTokConfig.xl().net.tokens == 77
    assert image.encoder.tower.transformer[0].mlp.w3.in_features == 2048
    assert image.decoder.tower.transformer[0].mlp.w3.in_features == 2730


def test_a_tokenizer_of_another_resolution_is_refused_by_name(model):
    image, _ = official_state(model)
    # Where training began is no part of a checkpoint.
    assert image_config(image) == dataclasses.replace(model.config.image, initial_logvar=0.0, init_gain=0.0)
    larger = TokenVAE(dataclasses.replace(model.config.image, image_size=64))
    with pytest.raises(ValueError, match=r"grid of 4 x 4 \(32 px\), the model has 8 x 8 \(64 px\)"):
        load_image_tokenizer(larger, image)
    with pytest.raises(ValueError, match="no official FlowTok image tokenizer"):
        image_config({"weight": torch.zeros(1)})


def test_parts_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image.tokens is 12 but captions.context 9"):
        tiny = FlowTokConfig.tiny()
        dataclasses.replace(tiny, captions=dataclasses.replace(tiny.captions, context=9))


def test_flags_are_never_single_and_swapping_leaves_the_batch_alone():
    generator = torch.Generator().manual_seed(0)
    counts = {int(draw_flags(4, 0.25, generator=generator).sum()) for _ in range(200)}
    assert 1 not in counts and {0, 2, 3} <= counts
    targets = torch.arange(5.0)
    before = targets.clone()
    swapped = swap_flagged(targets, torch.tensor([True, False, True, True, False]))
    assert torch.equal(targets, before)
    assert swapped.tolist() == [2, 1, 3, 0, 4]


@torch.no_grad()
def test_guidance_algebra(model):
    net = model.to_image.velocity
    x, t = torch.randn(3, 12, 4), torch.rand(3)
    matched, unmatched = (net(x, t, torch.full((3,), label)) for label in (0, 1))
    torch.testing.assert_close(indicator_velocity(net, 1.0)(x, t), matched, rtol=0, atol=0)
    torch.testing.assert_close(indicator_velocity(net, 0.0)(x, t), unmatched, rtol=0, atol=0)
    wanted = unmatched + 3 * (matched - unmatched)
    torch.testing.assert_close(indicator_velocity(net, 3.0)(x, t), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_more_steps_converge_and_the_legacy_grid_does_too(model):
    net, source = model.to_image.velocity, torch.randn(2, 12, 4)
    ends = {n: transport(net, source, steps=n) for n in (5, 20, 200)}
    assert (ends[20] - ends[200]).abs().mean() < (ends[5] - ends[200]).abs().mean() / 3
    gaps = [
        (transport(net, source, steps=n, legacy_grid=True) - transport(net, source, steps=n)).abs().mean()
        for n in (10, 80)
    ]
    assert gaps[1] < gaps[0] / 4
