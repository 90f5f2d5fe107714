from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.contracts import ActionSpec
from headrace.flow.solver import SolverSettings
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_trunk import encode_text, words_of

SPEC = ActionSpec(
    names=("x", "y", "gripper"),
    frame="base_delta",
    rotation="none",
    gripper="open_is_1",
    rate=20.0,
    low=(-1, -1, -1),
    high=(1, 1, 1),
)


WORDS = words_of(["push the cube", "pull it"])


def some_inputs(batch: int = 2) -> PolicyInput:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 1, 1, 64, 64, 3), generator=generator, dtype=torch.uint8)
    words = ["push the cube", "pull it"][:batch]
    return PolicyInput(images, torch.randn(batch, 15, generator=generator), encode_text(words, WORDS))


@pytest.fixture
def model() -> VipraPolicy:
    torch.manual_seed(0)
    return VipraPolicy(VipraConfig.tiny(SPEC)).eval()


def with_attention(prefix: str, action: str) -> VipraPolicy:
    torch.manual_seed(0)
    return VipraPolicy(replace(VipraConfig.tiny(SPEC), prefix_attention=prefix, action_attention=action)).eval()


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
@pytest.mark.parametrize("action", ["causal", "bidirectional"])
def test_cached_sampling_equals_the_whole_sequence(prefix, action):
    model, inputs, noise = with_attention(prefix, action), some_inputs(), torch.randn(2, 4, 3)
    solver = SolverSettings(method="euler", steps=10)
    cached, uncached = model.sample(inputs, noise, solver), model.sample_uncached(inputs, noise, solver)
    torch.testing.assert_close(cached, uncached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_shipped_policy_acts_alike_on_both_paths(method):
    """The plain path is transformers' code as it was when the policy was trained."""
    torch.manual_seed(0)
    model = VipraPolicy.from_pretrained(Path(__file__).parents[2] / "checkpoints" / "demo")
    config = model.config
    size, horizon = config.camera_size, config.decoder.horizon
    images = torch.randint(0, 256, (2, len(config.cameras), len(config.history), size, size, 3), dtype=torch.uint8)
    text = encode_text(["push the cube", "pick up the red cube and move it"], config.words)
    inputs = PolicyInput(images, torch.randn(2, len(config.state_names)), text)
    noise, solver = torch.randn(2, horizon, config.decoder.action_dim), SolverSettings(method=method, steps=5)
    torch.testing.assert_close(
        model.sample(inputs, noise, solver), model.sample_uncached(inputs, noise, solver), rtol=1e-5, atol=1e-5
    )


def test_maps_that_do_more_than_their_weights_are_not_passed_by(model):
    """An adapter on the backbone must act in the cached path too."""
    inputs, noise, solver = some_inputs(), torch.randn(2, 4, 3), SolverSettings(method="euler", steps=3)
    plain = model.sample(inputs, noise, solver)
    attention = model.backbone.layers[0].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, nn.Linear(32, 32))
    adapted = model.sample(inputs, noise, solver)
    torch.testing.assert_close(adapted, model.sample_uncached(inputs, noise, solver), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def test_padding_of_the_instruction_changes_nothing(model):
    inputs, noise = some_inputs(), torch.randn(2, 4, 3)
    padded = inputs._replace(text=torch.nn.functional.pad(inputs.text, (7, 0)))
    solver = SolverSettings(method="euler", steps=2)
    torch.testing.assert_close(
        model.sample(inputs, noise, solver), model.sample(padded, noise, solver), atol=1e-5, rtol=1e-5
    )


def test_the_instruction_and_the_state_matter(model):
    inputs, noise = some_inputs(), torch.randn(2, 4, 3)
    solver = SolverSettings(method="euler", steps=1)
    base = model.sample(inputs, noise, solver)
    other_words = inputs._replace(text=encode_text(["pull the cube", "pull it"], WORDS))
    assert not torch.allclose(model.sample(other_words, noise, solver)[0], base[0])
    assert not torch.allclose(model.sample(inputs._replace(state=inputs.state + 1), noise, solver), base)


def test_unknown_words_are_read_as_unknown():
    assert encode_text(["Push the ball", "it"], WORDS).tolist() == [[5, 6, 1], [0, 0, 3]]
    assert WORDS == ("cube", "it", "pull", "push", "the")


def test_causal_action_tokens_do_not_see_later_ones(model):
    inputs = some_inputs()
    prefix = model.compute_prefix(inputs)
    noisy, t = torch.randn(2, 4, 3), torch.rand(2)
    changed = noisy.clone()
    changed[:, 2] += 1
    with torch.inference_mode():
        before, after = model.velocity(prefix, noisy, t), model.velocity(prefix, changed, t)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


def test_several_draws_share_one_prefix():
    """The mean over draws equals the loss of the same sample repeated, with the same times and noise."""
    torch.manual_seed(0)
    many = VipraPolicy(replace(VipraConfig.tiny(SPEC), draws=3)).eval()
    one = VipraPolicy(VipraConfig.tiny(SPEC)).eval()
    one.load_state_dict(many.state_dict())
    inputs, actions = some_inputs(), torch.randn(2, 4, 3)
    shared = many.loss(inputs, actions, None, torch.Generator().manual_seed(1))["total"]
    repeated = PolicyInput(*(part.repeat_interleave(3, 0) for part in inputs))
    separate = one.loss(repeated, actions.repeat_interleave(3, 0), None, torch.Generator().manual_seed(1))["total"]
    torch.testing.assert_close(shared, separate)


def test_it_learns_one_chunk():
    """A network that sees one sample only must reproduce its actions."""
    torch.manual_seed(0)
    model = VipraPolicy(replace(VipraConfig.tiny(SPEC), draws=32))
    inputs, actions = (
        some_inputs(1),
        torch.tensor([[[0.5, -0.5, 1.0], [0.2, 0.1, 1.0], [0.0, 0.3, -1.0], [0.1, 0.1, -1.0]]]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        loss = model.loss(inputs, actions, None, generator)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(1, 4, 3, generator=generator)
    made = model.eval().sample(inputs, noise, SolverSettings(method="euler", steps=10))
    assert (made - actions).abs().max() < 0.2


def test_saved_policy_acts_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VipraPolicy.from_pretrained(tmp_path)
    inputs, noise = some_inputs(), torch.randn(2, 4, 3)
    solver = SolverSettings(method="euler", steps=3)
    torch.testing.assert_close(again.sample(inputs, noise, solver), model.sample(inputs, noise, solver), rtol=0, atol=0)


def test_published_size_is_seven_billion():
    with torch.device("meta"):
        from headrace.datasets.normalize import NormalizerConfig
        from headrace.robot.action_decoder import ActionDecoderConfig

        config = VipraConfig(
            spec=SPEC.to_dict(),
            cameras=("front",),
            decoder=ActionDecoderConfig(action_dim=3),
            action_normalizer=NormalizerConfig.identity(3),
        )
        policy = VipraPolicy(config)
    assert sum(p.numel() for p in policy.backbone.parameters()) == pytest.approx(6.48e9, rel=0.01)
    assert config.decoder.horizon == 14 and policy.image_tokens.tokens == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": (0, -1)}, "rise to 0"),
        ({"cameras": ()}, "at least one camera"),
        ({"crop": (1, 0)}, "leaves the camera"),
        ({"state_names": ("a",)}, "statistics do not fit"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(VipraConfig.tiny(SPEC), **change)


def test_another_picture_size_is_named(model):
    inputs = some_inputs()
    with pytest.raises(ValueError, match=r"images must have shape .*64.*48"):
        model.compute_prefix(inputs._replace(images=inputs.images[..., :48, :, :].contiguous()))
