import pytest
import torch

from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity

TINY = BlockwiseConfig.tiny()


@pytest.fixture
def network():
    """Tiny, with the zero-initialised layers drawn, so that every part matters."""
    torch.manual_seed(0)
    model = BlockwiseVelocity(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(count=6, config=TINY):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, config.tokens, config.channels, generator=draw)
    return x, torch.rand(count, generator=draw), torch.randn(count, config.condition_dim, generator=draw)


def test_rows_go_through_the_stack_of_their_own_time(network):
    x, _, condition = batch()
    t = torch.tensor([0.0, 0.2, 0.499, 0.5, 0.9, 1.0])
    assert network.segment_of(t).tolist() == [0, 0, 0, 1, 1, 1]
    whole = network(x, t, condition)
    for row in range(6):
        one = slice(row, row + 1)
        moment = network.embed(t[one], condition[one])
        expected = network.velocity(x[one], moment, network.features(x[one], moment), 0 if row < 3 else 1)
        torch.testing.assert_close(whole[one], expected, atol=1e-5, rtol=1e-5)


def test_only_stacks_with_samples_get_a_gradient(network):
    x, _, condition = batch()
    network(x, torch.full((6,), 0.2), condition).square().mean().backward()
    first, second = (
        [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in stack.parameters()] for stack in network.stacks
    )
    assert all(first) and not any(second)
    network.zero_grad()
    network(x, torch.tensor([0.1, 0.2, 0.3, 0.6, 0.7, 0.8]), condition).square().mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for stack in network.stacks for p in stack.parameters())


def test_one_segment_without_trunk_is_a_plain_network():
    """Velocity of the plain form, computed from its blocks by hand."""
    torch.manual_seed(0)
    config = BlockwiseConfig(channels=3, width=16, heads=2, grid=(1, 5), trunk_depth=0, velocity_depth=3,
                             residual_depth=0, borders=(0.0, 1.0), condition_dim=4, modulation_rank=2,
                             align_dim=0)  # fmt: skip
    model = BlockwiseVelocity(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, condition = batch(config=config)
    silu = torch.nn.functional.silu
    c = (model.condition_in(condition) + model.time_embed(t))[:, None]
    h = model.velocity_in(x)
    for block in model.stacks[0]:
        h = block(h, silu(c), model.shared(silu(c)), model.angles)
    shift, scale = model.out_modulation(silu(c)).chunk(2, -1)
    expected = model.out(torch.nn.functional.layer_norm(h, (16,)) * (1 + scale) + shift)
    torch.testing.assert_close(model(x, t, condition), expected)


def test_a_new_network_says_zero():
    x, t, condition = batch()
    assert not BlockwiseVelocity(TINY)(x, t, condition).any()


def test_a_new_residual_holds_the_features():
    x, t, condition = batch()
    model = BlockwiseVelocity(TINY)
    assert not model.residual(x, model.embed(t, condition)).any()


def test_residual_training_touches_nothing_else(network):
    x, t, condition = batch()
    network.residual(x, network.embed(t, condition)).square().mean().backward()
    own = {id(p) for p in network.residual_parameters()}
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name


def test_tokens_of_the_patch_decoder_do_not_see_each_other():
    torch.manual_seed(0)
    config = BlockwiseConfig.patches(patch_dim=6, condition_dim=3, width=16, grid=(2, 2))
    model = BlockwiseVelocity(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 4, 6), torch.rand(2)
    condition = torch.randn(2, 4, 3)
    changed = x.clone()
    changed[:, 0] += 1.0
    moved = (model(changed, t, condition) - model(x, t, condition)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [True, False, False, False]


def test_action_decoder_sees_context_and_order():
    torch.manual_seed(0)
    model = BlockwiseVelocity(BlockwiseConfig.actions(action_dim=3, horizon=5, context_dim=7, width=32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, condition, context = torch.randn(2, 5, 3), torch.rand(2), torch.randn(2, 7), torch.randn(2, 4, 7)
    base = model(x, t, condition, context)
    assert (model(x, t, condition, context + 1.0) - base).abs().max() > 1e-3
    assert (model(x.flip(1), t, condition, context).flip(1) - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected"):
        model(x, t, condition)


def test_alignment_falls_to_minus_one_for_equal_directions(network):
    x, t, condition = batch()
    features = network.features(x, network.embed(t, condition))
    target = network.align_head(features).detach()
    assert network.alignment_loss(features, 3.0 * target).item() == pytest.approx(-1.0, abs=1e-5)
    with pytest.raises(ValueError, match="target"):
        network.alignment_loss(features, target[:, :3])


def test_saved_network_gives_the_same_velocity(network, tmp_path):
    network.save_pretrained(tmp_path)
    again = BlockwiseVelocity.from_pretrained(tmp_path)
    assert torch.equal(again(*batch()), network.eval()(*batch()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"borders": (0.0, 0.5)}, "borders"),
        ({"heads": 3}, "divisible"),
        ({"trunk_depth": 0}, "without a trunk"),
        ({"mixing": "none", "context_dim": 3}, "context needs attention"),
        ({"velocity_depth": 0}, "velocity_depth"),
    ],
)
def test_configs_that_do_not_fit_cannot_exist(change, message):
    with pytest.raises(ValueError, match=message):
        BlockwiseConfig(**{**vars(TINY), **change})


def test_published_size():
    with torch.device("meta"):
        model = BlockwiseVelocity(BlockwiseConfig())
    blocks = len(model.trunk) + sum(len(stack) for stack in model.stacks)
    assert blocks == 50 and model.config.segments == 6 and len(model.residual_blocks) == 4
