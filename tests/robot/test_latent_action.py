from dataclasses import replace

import pytest
import torch

from headrace.nn.quantizers.finite_scalar import FiniteScalarConfig
from headrace.nn.quantizers.noise_substitution import NoiseSubstitutionConfig
from headrace.nn.quantizers.vector import VectorConfig
from headrace.nn.spatiotemporal import SpatiotemporalConfig
from headrace.robot.frame_features import FrameFeaturesConfig
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.token_reducer import strides_to


def small(**changes):
    shape = {"width": 16, "heads": 2, "head_width": 8, "depth": 1}
    base = LatentActionConfig(
        image_size=32,
        frames=4,
        features=FrameFeaturesConfig(kind="stem", name="", width=16, patch=8),
        encoder=SpatiotemporalConfig(**shape),
        decoder=SpatiotemporalConfig(causal=True, conditioned=True, **shape),
        quantizer=NoiseSubstitutionConfig(codes=8, width=6),
        tokens=4,
    )
    return replace(base, **changes)


@pytest.fixture
def clip():
    return torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(**changes):
    torch.manual_seed(0)
    model = LatentActionModel(small(**changes))
    for block in model.decoder.blocks.blocks:  # FiLM starts at 0; a trained one does not
        torch.nn.init.normal_(block.film.scale_shift.weight, std=0.5)
    return model.eval()


def test_a_later_frame_changes_earlier_codes_but_no_earlier_prediction(clip):
    model = model_of()
    other = clip.clone()
    other[:, 3] = 1 - other[:, 3]
    rows, changed = model.encoder(clip), model.encoder(other)
    assert not torch.allclose(rows[:, 0], changed[:, 0])
    vectors = model.encode(clip).vectors
    before, after = model.decode(clip, vectors[:, [0, 1, 2, 2]]), model.decode(other, vectors[:, [0, 1, 2, 2]])
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_rollout_begins_as_one_step_and_feeds_itself(clip):
    model = model_of()
    vectors = model.encode(clip).vectors
    rolled = model.rollout(clip[:, :1], vectors)
    assert rolled.shape == (2, 3, 3, 32, 32)
    torch.testing.assert_close(rolled[:, :1], model.decode(clip[:, :1], vectors[:, :1]))
    second = torch.cat((clip[:, :1], rolled[:, :1]), 1)
    torch.testing.assert_close(rolled[:, 1], model.decode(second, vectors[:, :2])[:, 1])
    with pytest.raises(ValueError, match="at least 4 latent actions"):
        model.rollout(clip, vectors)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": VectorConfig(codes=4, width=6)},
        {"quantizer": VectorConfig(codes=4, width=6, decay=None), "reduction": "queries", "tokens": 3},
        {"quantizer": FiniteScalarConfig(levels=(3, 3), width=6), "differences": True},
        {"target": "features", "reduction": "queries"},
        {"unit_rows": True, "differences": True},
    ],
    ids=["ema", "queries", "scalar-differences", "features", "unit-rows"],
)
def test_every_setting_trains_every_parameter(clip, changes):
    model = model_of(**changes).train()
    if isinstance(changes.get("quantizer"), FiniteScalarConfig):  # fresh rows all round to the middle level
        torch.nn.init.normal_(model.quantizer.inp.weight, std=5.0)
    prediction = model(clip, generator=torch.Generator().manual_seed(0))
    (prediction.frames.square().mean() + prediction.actions.loss).backward()
    dry = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a bias on all logits of a head changes nothing, nor does a shift of all keys
    assert [name for name in dry if "position_bias.net.4.bias" not in name and "in_proj_bias" not in name] == []
    if changes.get("target") == "features":
        assert prediction.frames.shape == (2, 3, 16, 16)


def test_unit_rows_are_as_large_as_fresh_codes_whatever_the_clip(clip):
    """Without them a fresh model's rows are far smaller than its codes, and all of them fall to the same few."""
    assert model_of().encoder(clip).std() < 0.2
    rows = model_of(unit_rows=True, differences=True).encoder(0.5 + 0.01 * (clip - 0.5))
    torch.testing.assert_close(rows.mean(-1), torch.zeros(rows.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(-1, unbiased=False), torch.ones(rows.shape[:-1]), atol=0.1, rtol=0)


def test_codes_bring_the_vectors_back(clip, tmp_path):
    model = model_of()
    actions = model.encode(clip)
    assert actions.codes.shape == (2, 3, 4)
    assert torch.equal(model.vectors(actions.codes), actions.vectors)
    with pytest.raises(ValueError, match=r"0\.\.7"):
        model.vectors(actions.codes + 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(LatentActionModel.from_pretrained(tmp_path)(clip).frames, model(clip).frames)


def test_longer_windows_run_and_short_clips_are_refused(clip):
    model = model_of()
    assert model.encode(clip.repeat(1, 4, 1, 1, 1)).codes.shape == (2, 15, 4)
    with pytest.raises(ValueError, match="at least 2 frames"):
        model.encode(clip[:, :1])
    with pytest.raises(ValueError, match="clip must have shape"):
        model.encode(clip[..., :16])


def test_published_sizes():
    with torch.device("meta"):
        model = LatentActionModel(LatentActionConfig())
        tiny = LatentActionModel(LatentActionConfig.tiny())

    def millions(part):
        return sum(p.numel() for p in part.parameters()) / 1e6

    assert millions(model.encoder.blocks) == pytest.approx(66, abs=1)
    assert millions(model.decoder.blocks) == pytest.approx(136, abs=1)
    assert millions(model.encoder.features) == pytest.approx(86.6, abs=0.5)
    assert millions(tiny) == pytest.approx(4.15, abs=0.1)
    assert model.config.grid == (16, 16)


@pytest.mark.parametrize("name", ["lapa", "univla", "moto"])
def test_relatives_are_configurations(name):
    config = getattr(LatentActionConfig, name)()
    wanted = {"lapa": (4, 8, 32), "univla": (4, 16, 128), "moto": (8, 128, 32)}[name]
    assert (config.tokens, config.quantizer.codes, config.quantizer.width) == wanted
    with torch.device("meta"):
        model = LatentActionModel(config)
    assert model.config.frames == 2


def test_features_learn_slower_and_codes_do_not_decay():
    model = model_of()
    groups = model.optimizer_groups(1e-4)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rate = {id(p): g for g in groups for p in g["params"]}
    assert rate[id(model.encoder.features.net.mix.weight)]["lr"] == pytest.approx(1e-5)
    assert rate[id(model.decoder.out.weight)]["lr"] == 1e-4
    assert rate[id(model.quantizer.codebook)]["weight_decay"] == 0


def test_strides_follow_the_paper_at_its_grid():
    assert [strides_to(16, side) for side in (2, 4, 8, 16)] == [(2, 2, 2), (2, 2), (2, 1), (1, 1)]
    with pytest.raises(ValueError, match="never gives 3"):
        strides_to(16, 3)


def test_a_fresh_residual_model_repeats_the_present_frame_and_can_leave_it():
    torch.manual_seed(0)
    model = LatentActionModel(replace(LatentActionConfig.tiny(image_size=32), residual=True))
    clip = torch.rand(1, 3, 3, 32, 32)
    predicted = model(clip).frames
    torch.testing.assert_close(predicted, clip[:, :-1])
    (predicted - clip[:, 1:]).square().mean().backward()
    assert model.decoder.out.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="residual adds to pixels"):
        LatentActionConfig(target="features", residual=True)
